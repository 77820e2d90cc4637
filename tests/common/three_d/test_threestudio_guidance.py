"""Guidance for threestudio: its numbers, a tuned folder's words, and its registry where it is installed.

Numbers: threestudio-project/threestudio at 28d9d80d9d00f308244adfcf3be8b17ca0cb6465, run on a CPU: the whole of its
StableDiffusionGuidance.__call__ with rgb_as_latents, after torch.manual_seed(7). In the place of U-Net and embeddings
stand the closed forms below; noise is drawn in the order of the indices. Every 97th number of the gradients is kept.
"""

import importlib
import json
from types import ModuleType

import pytest
import torch
import yaml
from diffusers import DDIMScheduler

from common.backbones import Conditioning, load_backbone
from common.distillation import TimestepRange
from common.papers_index import REPOSITORY
from common.three_d.threestudio_guidance import TunedGuidance, prompt_of

FOLDER = REPOSITORY / "common" / "three_d" / "threestudio_custom" / "pcs_guidance"
AZIMUTHS, ELEVATIONS = torch.tensor([0.0, 75.0, 180.0, 20.0]), torch.tensor([0.0, 0.0, 0.0, 70.0])

# their guidance_scale, weighting, shares of the timesteps; loss_sds, grad_norm, min_step, max_step, gradient of rgb
THEIRS = [
    (
        100.0, "sigma2", (0.02, 0.98), 3222688.0, 5077.548828, 20, 980,
        [-69.110832, -70.081039, 120.007156, 7.029587, -131.909378, -66.090042, -4.760836, -6.723101, -42.976246,
         -51.369122, -63.656105],
    ),
    (
        6.5, "uniform", (0.1, 0.5), 29690.443359, 487.363831, 100, 500,
        [-4.240271, -14.141739, 10.738309, 7.261422, -25.629898, -15.927945, 5.944161, -0.339403, -25.758209,
         -10.623161, 5.061096],
    ),
]  # fmt: skip


def wave(*shape: int, k: float) -> torch.Tensor:
    return torch.sin(k * torch.arange(1.0, torch.Size(shape).numel() + 1)).view(shape)


class Waves:
    """A prior in closed form, whose prompts are known numbers."""

    dtype = torch.float32
    latent_shape = (4, 64, 64)
    noise_scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    add_noise = staticmethod(noise_scheduler.add_noise)

    def freeze(self) -> "Waves":
        return self

    def encode_prompt(self, prompts: list[str] | str) -> Conditioning:
        if prompts == "":
            return Conditioning(wave(1, 3, 6, k=1.9))
        rows = [("side", "front", "back", "overhead").index(text.split()[-2]) for text in prompts]
        return Conditioning(wave(4, 3, 6, k=0.7)[rows])

    def predict_noise(self, noisy: torch.Tensor, timesteps: torch.Tensor, told: Conditioning) -> torch.Tensor:
        amount = told.prompt_embeds.mean(1)[:, :4, None, None]
        return 0.6 * noisy + amount * torch.cos(2 * noisy.roll(1, -1) + timesteps.view(-1, 1, 1, 1) / 500)


@pytest.mark.parametrize(("omega", "weighting", "shares", "loss", "norm", "first", "last", "gradient"), THEIRS)
def test_whole_calls_against_threestudios(omega, weighting, shares, loss, norm, first, last, gradient):
    guidance = TunedGuidance(Waves(), "a bear", guidance_scale=1 + omega, weighting=weighting)
    rgb = wave(4, 8, 8, 4, k=0.37).requires_grad_()
    generator = torch.Generator().manual_seed(7)
    found = guidance(rgb, ELEVATIONS, AZIMUTHS, TimestepRange(*shares), generator, rgb_as_latents=True)
    found["loss_sds"].backward()
    assert found["loss_sds"].item() == pytest.approx(loss, rel=1e-4)
    assert found["grad_norm"].item() == pytest.approx(norm, rel=1e-4)
    assert (found["min_step"], found["max_step"]) == (first, last)
    torch.testing.assert_close(rgb.grad.flatten()[::97], torch.tensor(gradient), rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def tuned_folder(tmp_path_factory):
    """A pipeline's folder with artifact.json, as a method that tunes a whole model writes it."""
    folder = tmp_path_factory.mktemp("tuned")
    load_backbone("tiny-sd").to_pipeline().save_pretrained(folder)
    (folder / "artifact.json").write_text(json.dumps({"prompt": "a photo of sks dog"}))
    return folder


def test_a_tuned_folder_guides_pictures(tuned_folder):
    """In [0,1] and of another size than the model's; the gradient goes through the VAE, whose mean it is at."""
    backbone = load_backbone(tuned_folder)
    guidance = TunedGuidance(backbone, prompt_of(tuned_folder))
    assert guidance.prompts.texts[0] == "a photo of sks dog, front view"
    rgb = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    larger = torch.nn.functional.interpolate(rgb.detach().permute(0, 3, 1, 2), (64, 64), mode="bilinear")
    expected = backbone.vae.encode(larger * 2 - 1).latent_dist.mean * backbone.vae.config.scaling_factor
    torch.testing.assert_close(guidance.latents(rgb, False), expected, rtol=1e-4, atol=1e-4)
    times = TimestepRange()
    found = [
        guidance(rgb, torch.zeros(2), torch.tensor([0.0, 180.0]), times, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert found[0]["loss_sds"].item() == found[1]["loss_sds"].item() != found[2]["loss_sds"].item()
    found[0]["loss_sds"].backward()
    assert rgb.grad.isfinite().all() and rgb.grad.norm() > 0


def test_prompts_are_said_or_found(tmp_path):
    with pytest.raises(ValueError, match="artifact.json names no prompt: say one"):
        prompt_of(tmp_path)
    (tmp_path / "artifact.json").write_text("{}")
    with pytest.raises(ValueError, match="names no prompt"):
        prompt_of(tmp_path)


def test_the_config_names_what_is_registered():
    source = (FOLDER / "__init__.py").read_text(encoding="utf-8")
    system = yaml.safe_load((FOLDER / "dreamfusion-pcs.yaml").read_text(encoding="utf-8"))["system"]
    for kind in ("guidance_type", "prompt_processor_type"):
        assert f'@threestudio.register("{system[kind]}")' in source
    assert all(f"        {name}: " in source for name in system["guidance"])


@pytest.fixture(scope="module")
def registered() -> ModuleType:
    try:
        importlib.import_module("threestudio.utils.base")
    except ImportError as error:
        pytest.skip(
            f"threestudio does not import here ({error}); it needs a machine with an NVIDIA GPU: "
            "conda env create -f environment.yml"
        )
    return importlib.import_module("common.three_d.threestudio_custom.pcs_guidance")


def test_threestudio_makes_the_guidance_from_its_config(registered, tuned_folder):
    import threestudio

    settings = yaml.safe_load((FOLDER / "dreamfusion-pcs.yaml").read_text(encoding="utf-8"))["system"]["guidance"]
    settings |= {"model": str(tuned_folder), "half_precision_weights": False, "max_step_percent": [0, 0.98, 0.5, 10]}
    guidance = threestudio.find("pcs-tuned-guidance")(settings)
    assert threestudio.find("pcs-no-prompt-processor")({})() is None
    rgb = torch.rand(2, 16, 16, 3, device=guidance.device).requires_grad_()
    batch = {"elevation": torch.zeros(2), "azimuth": torch.tensor([0.0, 90.0]), "camera_distances": torch.ones(2)}
    batch = {name: value.to(guidance.device) for name, value in batch.items()} | {"height": 16}
    found = {}
    for step in (0, 5, 5, 10):
        guidance.do_update_step(0, step)
        found.setdefault(step, []).append(guidance(rgb, None, **batch, rgb_as_latents=False))
    assert [of[0]["max_step"] for of in found.values()] == [980, 740, 500]
    assert found[5][0]["loss_sds"].item() == found[5][1]["loss_sds"].item()  # a function of the step
    found[0][0]["loss_sds"].backward()
    assert rgb.grad.isfinite().all() and rgb.grad.norm() > 0
    with pytest.raises(ValueError, match="system.freq.guidance_eval=0"):
        guidance(rgb, None, **batch, guidance_eval=True)

"""Presets, hub ids and folders; the dtype of the weights."""

import json
import shutil

import pytest
import torch
from transformers import CLIPTextConfig

from common.backbones import PRESETS, load_backbone
from common.toyworld.pretrain.data import HELD_OUT_FIRST_SEED, to_pixel_values
from common.toyworld.shards import render


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def fp16_folder(tmp_path_factory):
    """tiny-sd as it may be shipped: float16, in shards of at most 4 MB."""
    folder = tmp_path_factory.mktemp("models") / "fp16"
    backbone = load_backbone("tiny-sd", weights="random", dtype=torch.float16)
    backbone.to_pipeline().save_pretrained(folder, max_shard_size="4MB")
    return folder


@pytest.mark.parametrize(
    ("name", "unet", "text_encoders", "resolution_px", "prediction_type"),
    [
        ("sd14", 859_520_964, [123_060_480], 512, "epsilon"),
        ("sd15", 859_520_964, [123_060_480], 512, "epsilon"),
        ("sd21", 865_910_724, [340_387_840], 768, "v_prediction"),
        ("sdxl", 2_567_463_684, [123_060_480, 694_659_840], 1024, "epsilon"),
    ],
)
def test_published_architectures_have_the_published_sizes(name, unet, text_encoders, resolution_px, prediction_type):
    """Reference: parameter counts of the released weights."""
    backbone = load_backbone(name, weights="meta")
    assert count(backbone.unet) == unet
    assert count(backbone.vae) == 83_653_863
    assert [count(encoder) for encoder in backbone.text_encoders] == text_encoders
    assert (backbone.resolution_px, backbone.latent_size) == (resolution_px, resolution_px // 8)
    assert backbone.noise_scheduler.config.prediction_type == prediction_type
    tensors = [t for m in backbone.modules for t in (*m.parameters(), *m.buffers())]
    assert all(tensor.is_meta for tensor in tensors)  # so nothing is allocated


def test_betas_are_those_of_stable_diffusion():
    """Reference: linear in the square root, from 0.00085 to 0.012; alpha_bar_999 = 0.0047 (0.00466 in float64)."""
    scheduler = load_backbone("sd15", weights="meta").noise_scheduler
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), torch.cumprod(1 - betas, 0), rtol=1e-4, atol=1e-7)
    assert not scheduler.config.clip_sample


def test_tiny_sd_is_a_small_stable_diffusion():
    tiny, sd15 = (load_backbone(name, weights="meta") for name in ("tiny-sd", "sd15"))
    assert 11e6 < count(tiny.unet) < 22e6
    assert (tiny.resolution_px, tiny.latent_size) == (64, 16)
    assert list(tiny.unet.attn_processors) == list(sd15.unet.attn_processors)
    names = [{key for key in b.unet.state_dict() if "conv_shortcut" not in key} for b in (tiny, sd15)]
    assert names[0] == names[1]  # shortcuts exist where the width changes


def test_latents_of_the_shipped_tiny_sd_have_unit_variance_and_a_narrow_posterior():
    images = render(range(HELD_OUT_FIRST_SEED, HELD_OUT_FIRST_SEED + 64)).images
    with torch.no_grad():
        posterior = load_backbone("tiny-sd").vae.encode(to_pixel_values(images)).latent_dist
    torch.testing.assert_close(posterior.mean.std((0, 2, 3)), torch.ones(4), atol=0.15, rtol=0)
    assert posterior.std.max() < 0.1  # else whoever samples it trains on noise


def test_text_config_of_tiny_sd_agrees_with_its_tokenizer():
    backbone = load_backbone("tiny-sd", weights="meta")
    written = CLIPTextConfig.from_pretrained(PRESETS["tiny-sd"].architecture / "text_encoder")
    built = backbone.text_encoder.config
    assert (built.vocab_size, built.eos_token_id) == (written.vocab_size, written.eos_token_id)
    assert built.eos_token_id == backbone.text_encoder.eos_token_id == backbone.tokenizer.eos_token_id


def test_random_weights_depend_on_the_seed_alone():
    random_state = torch.random.get_rng_state()
    first, again, other = (load_backbone("tiny-sd", weights="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    for a, b, c in zip(first.modules, again.modules, other.modules, strict=True):
        a, b, c = a.state_dict(), b.state_dict(), c.state_dict()
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert not all(torch.equal(a[key], c[key]) for key in a)
    assert not any(module.training for module in first.modules)


def test_half_precision_files_give_float32_weights_that_train(fp16_folder):
    """The trap: transformers keeps the dtype of the file, and small updates of float16 weights round to nothing."""
    assert len(list((fp16_folder / "unet").glob("*.safetensors"))) > 1
    master = load_backbone(fp16_folder)
    half = load_backbone(fp16_folder, dtype=torch.float16)
    for a, b in zip(master.modules, half.modules, strict=True):
        assert {p.dtype for p in a.parameters()} == {torch.float32}
        assert {p.dtype for p in b.parameters()} == {torch.float16}
        assert all(torch.equal(p.half(), q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    moved = {}
    for backbone in (master, half):
        weight = backbone.unet.conv_in.weight
        before = weight.detach().clone()
        optimizer = torch.optim.SGD([weight], lr=1e-6)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved[backbone] = (weight != before).float().mean().item()
    assert moved[master] > 0.99
    assert moved[half] < 0.1


def test_a_saved_folder_loads_equal_and_gives_its_tokenizer(fp16_folder):
    saved = load_backbone("tiny-sd", weights="random", dtype=torch.float16)
    loaded = load_backbone(str(fp16_folder), dtype=torch.float16)
    for a, b in zip(saved.modules, loaded.modules, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert loaded.tokenizer("a red dog").input_ids == saved.tokenizer("a red dog").input_ids
    assert loaded.noise_scheduler.config.beta_end == 0.012


def test_random_architecture_of_a_local_folder(fp16_folder):
    assert count(load_backbone(fp16_folder, weights="meta").unet) == count(
        load_backbone("tiny-sd", weights="meta").unet
    )


def test_the_old_end_token_id_is_corrected(fp16_folder, tmp_path):
    """SD 1.x configs say 2, for which transformers pools at the largest id, such as a placeholder's."""
    folder = shutil.copytree(fp16_folder, tmp_path / "old")
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    backbone = load_backbone(folder)
    assert backbone.text_encoder.eos_token_id == backbone.tokenizer.eos_token_id != 2


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_without_a_part_is_named(fp16_folder, tmp_path, part):
    folder = shutil.copytree(fp16_folder, tmp_path / "model")
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=f"(?s){folder}.*{part}"):
        load_backbone(folder)


def test_a_broken_weight_file_names_the_folder(fp16_folder, tmp_path):
    folder = shutil.copytree(fp16_folder, tmp_path / "model")
    file = next((folder / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match=str(folder)):
        load_backbone(folder)


def test_bad_names_say_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tiny-sd.*no hub id"):
        load_backbone("tinysd")
    with pytest.raises(FileNotFoundError, match="has no model_index.json"):
        load_backbone(tmp_path)
    with pytest.raises(FileNotFoundError, match="hf download someone/some-model.*path of that folder"):
        load_backbone("someone/some-model")
    with pytest.raises(FileNotFoundError, match="hf download stable-diffusion-v1-5/"):
        load_backbone("sd15")
    with pytest.raises(ValueError, match="weights must be"):
        load_backbone("sd15", weights="none")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="single file"):
        load_backbone(tmp_path / "model.safetensors")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="is a FluxPipeline"):
        load_backbone(tmp_path)


def test_missing_trained_weights_say_how_to_make_them(tmp_path, monkeypatch):
    from common.backbones.presets import Preset

    monkeypatch.setitem(PRESETS, "tiny-sd", Preset(tmp_path / "absent", PRESETS["tiny-sd"].architecture))
    with pytest.raises(FileNotFoundError, match="common.toyworld.pretrain"):
        load_backbone("tiny-sd")

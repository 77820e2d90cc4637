"""VMC (Jeong, Park and Ye, CVPR 2024, arXiv 2312.00845): temporal attention adapted to the motion of one clip.

Paper -> here:  v^n -> frame n of latents (D1)   delta v^n = v^(n+1) - v^n -> frame_residuals   eps -> noise
    eps_theta -> noise_pred   abar_t -> alpha_bar   c, the appearance-invariant prompt -> prompt
Departures D1 to D7 are explained in the card. Baselines are in variants.py.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from common.backbones import load_backbone
from common.backbones.adapters import DenseDelta, LowRank, WeightResidual, attach
from common.backbones.video import VideoBackbone
from common.data.prompt_cache import PromptCache
from common.io import atomic_save_safetensors, atomic_write_text, load_safetensors
from common.sampling import ddim_invert
from common.sampling.video import mixed_noise, sample_clips
from common.training.noising import noise_batch, timesteps_between
from common.training.seeding import derive_seed, seeded_generator

from .config import ResidualLoss, VMCConfig

SLUG = Path(__file__).parent.name
ARTIFACT = "temporal_attention.safetensors"
SOURCE = "source_latents"  # the clip that was learned from, beside the changes


def temporal_projections(unet: nn.Module) -> dict[str, Tensor]:
    """What is tuned: queries, keys and values of temporal attention, name in the UNet -> weight.

    A block has two temporal self-attentions, attn1 and attn2, and both count. Outputs, feed-forward layers, temporal
    convolutions and transformer_in are no part of it.
    """
    return {
        f"{name}.weight": module.weight
        for name, module in unet.named_modules()
        if "temp_attentions" in name and name.endswith((".to_q", ".to_k", ".to_v"))
    }


def frame_residuals(frames: Tensor) -> Tensor:
    """delta v^n = v^(n+1) - v^n of consecutive frames: (B,C,F,h,w) -> (B,C,F-1,h,w), at least float32."""
    return frames.to(torch.promote_types(frames.dtype, torch.float32)).diff(dim=2)


def denoised_residuals(noisy_residuals: Tensor, noise_pred_residuals: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Tweedie's formula for differences: the motion of the clean clip as the network sees it.

    delta v_0(t) = (delta v_t - sqrt(1 - abar_t) delta eps_theta) / sqrt(abar_t)

    It is nearest to the true delta v_0 where delta eps_theta is nearest to delta eps, so aligning the differences of
    noise aligns motion: |delta v_0 - delta v_0(t)|^2 = (1 - abar_t) / abar_t |delta eps - delta eps_theta|^2.
    """
    alpha_bar = torch.as_tensor(alpha_bar, dtype=noisy_residuals.dtype, device=noisy_residuals.device)
    return (noisy_residuals - (1 - alpha_bar).sqrt() * noise_pred_residuals) / alpha_bar.sqrt()


def residual_cosine_loss(noise_pred: Tensor, noise: Tensor) -> Tensor:
    """Motion distillation: mean over n of 1 - cos(delta eps^n, delta eps_theta^n), signed, over C x h x w; (B,)."""
    predicted, true = (frame_residuals(x).transpose(1, 2).flatten(2) for x in (noise_pred, noise))  # (B,F-1,C*h*w)
    return 1 - F.cosine_similarity(predicted, true, dim=-1).mean(1)


def absolute_residual_loss(noise_pred: Tensor, noise: Tensor) -> Tensor:
    """The code's form: cosines along the frames of |delta eps| and |delta eps_theta|, mean over C, h and w; (B,) (D2).

    Absolute values are blind to the sign: a clip that runs backwards has the same loss.
    """
    predicted, true = (frame_residuals(x).abs() for x in (noise_pred, noise))
    return 1 - F.cosine_similarity(predicted, true, dim=2).flatten(1).mean(1)


def residual_l2_loss(noise_pred: Tensor, noise: Tensor) -> Tensor:
    """The paper's other distance: |delta eps - delta eps_theta|^2 as a mean over frames, channels and pixels; (B,)."""
    return (frame_residuals(noise_pred) - frame_residuals(noise)).square().flatten(1).mean(1)


LOSSES: dict[ResidualLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "paper": residual_cosine_loss,
    "official": absolute_residual_loss,
    "l2": residual_l2_loss,
}


def new_change(weight: Tensor, rank: int, generator: torch.Generator) -> WeightResidual:
    """A change of a matrix that is 0: whole (rank 0), or `up` @ `down` of a rank."""
    if rank == 0:
        return DenseDelta(torch.zeros_like(weight))
    down = torch.randn(rank, weight.shape[1], generator=generator) / rank
    return LowRank(down.to(weight), weight.new_zeros(len(weight), rank))


class VMC:
    """Changes of temporal attention's queries, keys and values, and the clip whose motion they hold.

    Args: backbone: gets the changes and makes clips of `config.num_frames`; its own weights stay as they are.
    """

    select = staticmethod(temporal_projections)  # what is tuned

    def __init__(self, backbone: VideoBackbone, config: VMCConfig) -> None:
        self.backbone, self.config = backbone.freeze(), config
        weights = self.select(backbone.unet)
        if not weights:
            raise ValueError(
                f"{backbone.name} has no layers called temp_attentions; VMC tunes those of tiny-video, modelscope and "
                "zeroscope"
            )
        backbone.num_frames = config.num_frames
        generator = seeded_generator(config.seed, "changes")
        self.changes = {name: new_change(weight, config.rank, generator) for name, weight in weights.items()}
        self._attached = attach(self.changes, backbone.unet)
        self.source_latents: Tensor | None = None  # (1,4,F,h,w)
        self.prompt = ""
        self._prompts = PromptCache(backbone)
        self._inverted: dict[int, Tensor] = {}  # number of steps -> noise, until a weight moves

    def set_source(self, latents: Tensor, prompt: str) -> None:
        """Say which clip is learned.

        Args:
            latents: of the clip, (4,F,h,w).
            prompt: what moves and how, without appearance and background: "a cat is roaring".
        Raises: ValueError for another number of frames than the config's.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.num_frames:
            raise ValueError(f"the clip must be (4,{self.config.num_frames},h,w), got {tuple(latents.shape)}")
        self.source_latents = latents[None].to(self.backbone.device, self.backbone.dtype)
        self.prompt = prompt
        self._inverted.clear()

    def set_strength(self, strength: float) -> None:
        """How much of the changes is in use: 1 = as trained, 0 = the backbone itself."""
        self._attached.set_strength(strength)
        self._inverted.clear()

    def parameters(self) -> list[tuple[str, Parameter]]:
        """The changes."""
        return [
            (f"{name}.{part}", parameter)
            for name, change in self.changes.items()
            for part, parameter in change.named_parameters()
        ]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """The residual loss of clips (B,4,F,h,w); there is no denoising loss beside it."""
        noise_pred, noise = self.predict_noise(batch)
        return LOSSES[self.config.residual_loss](noise_pred, noise).mean()

    def predict_noise(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the network takes for the noise, and the noise: one timestep a clip."""
        self._inverted.clear()  # a step of the optimiser follows
        noised = noise_batch(self.backbone, batch["latents"], batch["sample_keys"], seed=self.config.seed)
        told = self._prompts.batch(list(batch["prompt"]))
        return self.backbone.predict_noise(noised["noisy_latents"], noised["timesteps"], told), noised["noise"]

    @torch.no_grad()
    def validation_loss(self, timesteps: tuple[int, ...] = tuple(range(50, 1000, 100))) -> float:
        """The residual loss of the clip at these timesteps, with noise that never changes."""
        seed, told = derive_seed(0, "validation"), self.backbone.encode_prompt(self.prompt)
        losses = []
        for t in timesteps:
            at_t = timesteps_between(t, t + 1)
            noised = noise_batch(self.backbone, self._source(), torch.tensor([t]), seed=seed, timestep_sampler=at_t)
            noise_pred = self.backbone.predict_noise(noised["noisy_latents"], noised["timesteps"], told)
            losses.append(LOSSES[self.config.residual_loss](noise_pred, noised["noise"]))
        return torch.cat(losses).mean().item()

    def inverted_noise(self, num_inference_steps: int) -> Tensor:
        """DDIM inversion of the clip by the tuned network, told the empty prompt, without guidance; (1,4,F,h,w)."""
        if num_inference_steps not in self._inverted:
            nothing = self.backbone.encode_prompt("")
            self._inverted[num_inference_steps] = ddim_invert(
                self.backbone, self._source(), nothing, num_inference_steps=num_inference_steps
            )
        return self._inverted[num_inference_steps]

    def _source(self) -> Tensor:
        if self.source_latents is None:
            raise ValueError("no clip to learn from or to invert: call set_source first, or load an artifact")
        return self.source_latents

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        *,
        seeds: list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        inverted_share: float | None = None,
        batch_size: int = 4,
    ) -> Tensor:
        """Clips for a prompt such as "a tiger is roaring in the snow", one per seed, (B,3,F,H,W) in [-1,1].

        They begin at the inverted noise of the clip. At an inverted share of 1 nothing is drawn, so all seeds give one
        clip, which is made once.

        Args:
            num_inference_steps, guidance_scale, inverted_share: None = those of the config.
            batch_size: clips at a time.
        """
        config = self.config
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        share = config.inverted_share if inverted_share is None else inverted_share
        drawn = seeds[:1] if share == 1 else seeds
        clips = sample_clips(
            self.backbone,
            prompt,
            seeds=drawn,
            noise=mixed_noise(self.backbone, self.inverted_noise(steps), drawn, share) if share else None,
            batch_size=batch_size,
            num_inference_steps=steps,
            guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
        )
        return clips.repeat(len(seeds) // len(drawn), 1, 1, 1, 1)

    def save(self, folder: Path) -> None:
        """Write temporal_attention.safetensors, the changes and the latents of the clip, and artifact.json.

        The header names slug, backbone, prompt and config.
        """
        header = {
            "slug": SLUG,
            "version": "1",
            "backbone": self.backbone.name,
            "prompt": self.prompt,
            "config": json.dumps(asdict(self.config)),
        }
        tensors = {name: parameter.detach().cpu() for name, parameter in self.parameters()}
        path = Path(folder) / ARTIFACT
        atomic_save_safetensors({**tensors, SOURCE: self._source()[0].float().cpu()}, path, header)
        atomic_write_text(path.with_name("artifact.json"), json.dumps({**header, "file": ARTIFACT}, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read the changes and the clip that `save` wrote. Raises: ValueError naming the file if a matrix differs."""
        tensors, header = read_artifact(folder)
        source, own = tensors.pop(SOURCE), dict(self.parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != found:
            name = next(name for name in {**shapes, **found} if shapes.get(name) != found.get(name))
            raise ValueError(
                f"{folder} was trained on {header['backbone']} with other matrices or another rank: {name} is "
                f"{found.get(name, 'absent')}, but {shapes.get(name, 'not trained')} here"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        self.set_source(source, header["prompt"])


def load_method(artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu") -> VMC:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: temporal_attention.safetensors, or the folder that holds it.
        backbone_name: None = the one that it was trained on.
    """
    _, header = read_artifact(artifact_path)
    config = VMCConfig(**json.loads(header["config"]))
    method = VMC(load_backbone(backbone_name or header["backbone"], device=device), config)
    method.load(Path(artifact_path))
    return method


def read_artifact(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of an artifact. Raises: ValueError naming the file if it is no such file."""
    path = Path(path)
    path = path / ARTIFACT if path.is_dir() else path
    tensors, header = load_safetensors(path)
    if header.get("slug") != SLUG:
        raise ValueError(f"{path} was not written by this method, but by {header.get('slug', 'something unknown')}")
    return tensors, header

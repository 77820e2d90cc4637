"""MotionDirector (Zhao, Gu, Wu et al., ECCV 2024, arXiv 2310.08465), in the order of its method section.

Paper -> here:  eps -> target   eps_theta -> backbone.predict, model_pred   z_t -> noisy_latents
    eps_anchor -> frame number `anchors`   beta -> debias_strength   spatial and temporal LoRAs -> paths of dual_path.py
Departures D1 to D7 are explained in the card.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from common.backbones import Conditioning, load_backbone
from common.backbones.video import VideoBackbone
from common.data.prompt_cache import PromptCache
from common.io import atomic_save_safetensors, atomic_write_text, load_safetensors
from common.sampling import ddim_invert, mixed_noise, sample_clips
from common.training.losses import fixed_noise_validation, per_sample_mse
from common.training.noising import NoisedBatch, noise_batch
from common.training.seeding import seeded_integers, seeded_uniform

from .config import MotionDirectorConfig
from .dual_path import FILE, TEMPORAL, DualPath, spatial_path

SLUG = Path(__file__).parent.name
HEADER = "artifact.json"
INVERTED = "inverted_noise.safetensors"


def frames_of(clips: Tensor, numbers: Tensor) -> Tensor:
    """One frame of each clip, (B,C,1,h,w), of clips (B,C,F,h,w) and frame numbers (B,) int64."""
    return clips[torch.arange(len(clips)), :, numbers.to(clips.device)].unsqueeze(2)


def spatial_loss(backbone: VideoBackbone, noised: NoisedBatch, conditioning: Conditioning, numbers: Tensor) -> Tensor:
    """L_spatial: |eps_i - eps_theta(z_t,i, t, c)|^2 of one frame i of each clip, (B,).

    The layers across frames are left out, as in the code: nothing of the motion can reach the spatial path.
    """
    frames = frames_of(noised["noisy_latents"], numbers)
    model_pred = backbone.predict(frames, noised["timesteps"], conditioning, temporal=False)
    return original_loss(model_pred, frames_of(noised["target"], numbers))


def original_loss(model_pred: Tensor, target: Tensor) -> Tensor:
    """L_org-temp: |eps - eps_theta(z_t, t, c)|^2 as a mean over channels, frames and pixels, (B,)."""
    return per_sample_mse(model_pred, target)


def debiased(noise: Tensor, anchors: Tensor, strength: float) -> Tensor:
    """Eq. 5: phi(eps_i) = sqrt(beta^2 + 1) eps_i - beta eps_anchor, of all frames i, (B,4,F,h,w).

    What all frames share, as the look of things, is subtracted; what tells them apart stays.

    Args:
        noise: predicted or true, (B,4,F,h,w).
        anchors: number of each clip's anchor frame, (B,) int64; it stays among the frames.
        strength: beta >= 0; 0 changes nothing.
    """
    return (strength**2 + 1) ** 0.5 * noise - strength * frames_of(noise, anchors)


def debiased_loss(model_pred: Tensor, target: Tensor, anchors: Tensor, strength: float) -> Tensor:
    """L_ad-temp: |phi(eps) - phi(eps_theta)|^2 with one anchor for both, (B,)."""
    return original_loss(debiased(model_pred, anchors, strength), debiased(target, anchors, strength))


def temporal_loss(model_pred: Tensor, target: Tensor, anchors: Tensor, strength: float) -> Tensor:
    """L_temporal = L_org-temp + L_ad-temp, (B,)."""
    return original_loss(model_pred, target) + debiased_loss(model_pred, target, anchors, strength)


def sized(backbone: VideoBackbone, num_frames: int, resolution_px: int) -> VideoBackbone:
    """The backbone itself, making clips of another length and size than it was trained on.

    Raises: ValueError if it makes pictures, or if the size is no whole number of latent pixels.
    """
    if not isinstance(backbone, VideoBackbone):
        raise ValueError(f"{backbone.name} makes pictures; MotionDirector needs a video backbone (tiny-video, ...)")
    factor = backbone.resolution_px // backbone.latent_size
    if resolution_px % factor:
        raise ValueError(f"resolution_px must be a multiple of {factor} for {backbone.name}, got {resolution_px}")
    backbone.num_frames = num_frames
    backbone.unet.register_to_config(sample_size=resolution_px // factor)
    return backbone


class MotionDirector:
    """The motion of some clips as a temporal path, their looks kept apart in spatial ones.

    Args:
        backbone: gets the pairs, and the config's size; everything in it is frozen.
        num_clips: that are learned from; each has a spatial path, unless `single_spatial_lora`.
        temporal: False leaves the temporal path out.
    """

    def __init__(
        self, backbone: VideoBackbone, config: MotionDirectorConfig, num_clips: int = 1, *, temporal: bool = True
    ) -> None:
        self.backbone, self.config = sized(backbone.freeze(), config.num_frames, config.resolution_px), config
        self.num_spatial = 1 if config.single_spatial_lora else num_clips
        self.paths = DualPath(
            backbone.unet, rank=config.rank, dropout=config.dropout, num_spatial=self.num_spatial, temporal=temporal,
            seed=config.seed,
        )  # fmt: skip
        self.inverted: Tensor | None = None  # of the clips, (N,4,F,h,w)
        self.last_losses: dict[str, float] = {}
        self._prompts = PromptCache(backbone)

    def parameters(self) -> list[tuple[str, Parameter]]:
        """D and U of all paths, (r,in) and (out,r)."""
        return [pair for path in self.paths.paths for pair in self.paths.pairs(path)]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """L_spatial of this clip's spatial path plus L_temporal of the temporal path.

        Each loss reaches its own path only, so one backward pass and one step update both as two of each would (D2).

        Args: batch: of `ClipDataset`, one clip: latents (1,4,F,h,w), prompt, clip_index.
        Raises: ValueError for more than one clip: each has a spatial path of its own.
        """
        if len(batch["latents"]) != 1:
            raise ValueError(f"a step takes one clip, got {len(batch['latents'])}: set batch_size to 1")
        keys, config = batch["sample_keys"], self.config
        noised = noise_batch(self.backbone, batch["latents"], keys, seed=config.seed)
        conditioning = self._prompts.batch(list(batch["prompt"]))
        spatial = spatial_path(int(batch["clip_index"]) % self.num_spatial)
        is_off = seeded_uniform(keys, seed=config.seed, stream="spatial off").item() < config.spatial_off_share
        losses = {} if is_off else {"spatial_loss": self._spatial_loss(noised, conditioning, spatial, keys)}
        with self.paths.using({TEMPORAL: 1.0} | ({} if is_off else {spatial: 1.0}), learning=[TEMPORAL]):
            model_pred = self.backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning)
        losses["temporal_loss"] = self._temporal_loss(model_pred, noised["target"], keys).mean()
        self.last_losses = {name: loss.item() for name, loss in losses.items()}
        return sum(losses.values())

    def _spatial_loss(self, noised: NoisedBatch, conditioning: Conditioning, path: str, keys: Tensor) -> Tensor:
        with self.paths.using({path: 1.0}, learning=[path]):
            return spatial_loss(self.backbone, noised, conditioning, self._draw(noised["target"], keys, "frame")).mean()

    def _temporal_loss(self, model_pred: Tensor, target: Tensor, keys: Tensor) -> Tensor:
        return temporal_loss(model_pred, target, self._draw(target, keys, "anchor"), self.config.debias_strength)

    def _draw(self, clips: Tensor, keys: Tensor, stream: str) -> Tensor:
        """A frame number of each clip (B,C,F,h,w), new in every step, (B,)."""
        return seeded_integers(keys, 0, clips.shape[2], seed=self.config.seed, stream=stream)

    def invert(self, latents: Tensor) -> None:
        """Keep the noise from which the backbone alone, without a prompt, makes the clips (N,4,F,h,w)."""
        empty = self.backbone.encode_prompt("")
        steps = self.config.num_inversion_steps
        clips = [ddim_invert(self.backbone, clip[None], empty, num_inference_steps=steps) for clip in latents]
        self.inverted = torch.cat(clips).cpu()

    def generate(
        self,
        prompt: str,
        *,
        seeds: list[int],
        noise_prior: float | None = None,
        spatial_scale: float | None = None,
        clip_index: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 4,
    ) -> Tensor:
        """Clips for a prompt that move like those learned from, one per seed, (B,3,F,H,W) in [-1,1].

        Args:
            noise_prior: p of x_T = sqrt(p) z_inv + sqrt(1 - p) noise.   spatial_scale: strength of a spatial path.
            clip_index: whose spatial path and inverted noise, where they are used.
            num_inference_steps, guidance_scale: DDIM steps and s.   None = those of the config, for all five.
            batch_size: clips at a time.
        Raises: ValueError if p > 0 and nothing was inverted.
        """
        config = self.config
        share = config.noise_prior if noise_prior is None else noise_prior
        scale = config.spatial_scale if spatial_scale is None else spatial_scale
        strengths = {TEMPORAL: 1.0} if TEMPORAL in self.paths.paths else {}
        if scale:
            strengths[spatial_path(clip_index % self.num_spatial)] = scale
        with self.paths.using(strengths):
            return sample_clips(
                self.backbone,
                prompt,
                seeds=seeds,
                batch_size=batch_size,
                num_inference_steps=config.num_inference_steps if num_inference_steps is None else num_inference_steps,
                guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
                noise=self._initial_noise(seeds, share, clip_index) if share else None,
            )

    def _initial_noise(self, seeds: list[int], share: float, clip_index: int) -> Tensor:
        if self.inverted is None:
            raise ValueError(f"noise_prior {share} needs inverted noise: call invert(latents) after training")
        return mixed_noise(self.backbone, self.inverted[clip_index : clip_index + 1], seeds, share)

    @torch.no_grad()
    def validation_loss(self, latents: Tensor, prompts: list[str]) -> float:
        """L_org-temp of clips (B,4,F,h,w) with the temporal path alone; noise and timesteps never change."""
        with self.paths.using({TEMPORAL: 1.0}):
            return fixed_noise_validation(self.backbone, latents, self._prompts.batch(prompts))

    def save(self, folder: Path) -> None:
        """Write PATH_lora.safetensors for each path, the inverted noise if there is any, and artifact.json."""
        folder = Path(folder)
        header = {
            "slug": SLUG,
            "version": "1",
            "backbone": self.backbone.name,
            "paths": json.dumps(self.paths.paths),
            "config": json.dumps(asdict(self.config)),
        }
        for path in self.paths.paths:
            self.paths.save(path, folder, header)
        if self.inverted is not None:
            atomic_save_safetensors({"latents": self.inverted}, folder / INVERTED, header)
        atomic_write_text(folder / HEADER, json.dumps(header, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        folder = Path(folder)
        for path in self.paths.paths:
            self.paths.load(path, folder / FILE.format(path))
        if (folder / INVERTED).is_file():
            self.inverted = load_safetensors(folder / INVERTED)[0]["latents"]

    def load_appearance(self, folder: Path) -> None:
        """Put the spatial path that `Appearance` learned in the place of the first clip's, and use it from now on."""
        self.paths.load(spatial_path(0), Path(folder) / FILE.format(spatial_path(0)))
        self.config = replace(self.config, spatial_scale=1.0)


class Appearance(MotionDirector):
    """A spatial path alone, from pictures: to be combined with a temporal path that was learned elsewhere."""

    def __init__(self, backbone: VideoBackbone, config: MotionDirectorConfig) -> None:
        super().__init__(backbone, config, temporal=False)

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """L_spatial of pictures.   batch: of `SubjectDataset`: latents (B,4,h,w), prompt."""
        noised = noise_batch(self.backbone, batch["latents"].unsqueeze(2), batch["sample_keys"], seed=self.config.seed)
        conditioning = self._prompts.batch(list(batch["prompt"]))
        return self._spatial_loss(noised, conditioning, spatial_path(0), batch["sample_keys"])


def load_method(
    artifact_path: str | Path,
    backbone_name: str | None = None,
    device: torch.device | str = "cpu",
    *,
    appearance: str | Path | None = None,
) -> MotionDirector:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: the folder that `save` wrote, or a file in it.
        backbone_name: None = the one that it was trained on.
        appearance: folder of an `Appearance`, to be combined with the motion.
    Raises: ValueError naming the folder if it was not written by this method.
    """
    path = Path(artifact_path)
    folder = path if path.is_dir() else path.parent
    header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    if header.get("slug") != SLUG:
        raise ValueError(f"{folder} was not written by this method, but by {header.get('slug', 'something unknown')}")
    config, paths = MotionDirectorConfig(**json.loads(header["config"])), json.loads(header["paths"])
    backbone = load_backbone(backbone_name or header["backbone"], device=device)
    num_spatial = len([path for path in paths if path != TEMPORAL])
    method = MotionDirector(backbone, config, num_spatial, temporal=TEMPORAL in paths)
    method.load(folder)
    if appearance is not None:
        method.load_appearance(Path(appearance))
    return method

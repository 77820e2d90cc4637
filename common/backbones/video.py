"""`VideoBackbone`: a backbone whose network denoises clips, (B,C,F,H,W), and its verbs for clips."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel, UNetMotionModel
from torch import Tensor

from common.backbones.backbone import Backbone
from common.backbones.conditioning import Conditioning
from common.backbones.inflate import without_temporal_layers

FRAMES_AT_ONCE = 16  # that the VAE encodes or decodes, to bound memory


def frames_in_common(own: Tensor, shared: Tensor, share: float) -> Tensor:
    """Noise of clips of which frames have a part in common: sqrt(share) shared + sqrt(1 - share) own, (B,C,F,h,w).

    The mixed noise of PYoCo (Ge et al., ICCV 2023, arXiv 2305.10474); `share` is the correlation between frames.

    Args:
        own: standard normal, of each frame, (B,C,F,h,w).   shared: standard normal, of each clip, (B,C,1,h,w).
        share: in [0, 1).
    """
    return share**0.5 * shared + (1 - share) ** 0.5 * own


@dataclass(eq=False)
class VideoBackbone(Backbone):
    """A backbone whose latents are clips, (B,4,F,h,w); one prompt and one timestep for all frames of a clip.

    num_frames: F of a clip where nothing else is said.
    noise_share: of the noise of a clip, in training and at the start of sampling, what all its frames have in common,
        [0, 1); see `frames_in_common`.
    """

    num_frames: int = 16
    noise_share: float = 0.0

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents of one clip, (4,F,h,w)."""
        channels, height, width = super().latent_shape
        return (channels, self.num_frames, height, width)

    def mix_noise(self, own: Tensor, shared: Tensor) -> Tensor:
        """`frames_in_common` with the share of this backbone."""
        return frames_in_common(own, shared, self.noise_share)

    def encode_clips(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """VAE latents of every frame, (B,4,F,h,w), from clips (B,3,F,H,W) in [-1,1]; `generator` as in `encode_images`.

        Raises: ValueError for another shape.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 3:
            raise ValueError(f"clips must be (B,3,F,H,W), got {tuple(pixel_values.shape)}")
        frames = pixel_values.transpose(1, 2).flatten(0, 1)
        latents = torch.cat([self.encode_images(part, generator) for part in frames.split(FRAMES_AT_ONCE)])
        return latents.unflatten(0, (len(pixel_values), -1)).transpose(1, 2)

    def decode_clips(self, latents: Tensor) -> Tensor:
        """Clips (B,3,F,H,W) in [-1,1] from scaled latents (B,4,F,h,w)."""
        frames = latents.transpose(1, 2).flatten(0, 1)
        images = torch.cat([self.decode_latents(part) for part in frames.split(FRAMES_AT_ONCE)])
        return images.unflatten(0, (len(latents), -1)).transpose(1, 2)

    def predict(
        self, latents: Tensor, timesteps: Tensor | int, conditioning: Conditioning, *, temporal: bool = True
    ) -> Tensor:
        """The network's own output (epsilon or v), (B,4,F,h,w).

        Args:
            latents: noisy latents, (B,4,F,h,w).
            timesteps, conditioning: as in `Backbone.predict`; of B clips.
            temporal: False leaves out the layers across frames, so that every frame is denoised by itself: for single
                frames (F = 1), which stock networks would send through them.
        """
        if latents.ndim != 5:
            raise ValueError(f"a video network takes latents (B,4,F,h,w), got {tuple(latents.shape)}")
        with nullcontext() if temporal else without_temporal_layers(self.unet):
            return super().predict(latents, timesteps, conditioning)

    def _context(self, conditioning: Conditioning, latents: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        context = super()._context(conditioning, latents)
        if not isinstance(self.unet, UNetMotionModel):
            return context
        if not conditioning.is_plain:
            raise ValueError(f"{self.name} takes plain prompts only: its network wants one context for each frame")
        return context.repeat_interleave(latents.shape[2], dim=0)

    def to_pipeline(self) -> TextToVideoSDPipeline | AnimateDiffPipeline:
        """A diffusers pipeline of the same objects, with a DDIM scheduler."""
        scheduler = DDIMScheduler.from_config(self.noise_scheduler.config, set_alpha_to_one=False)
        shared = {
            "vae": self.vae, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer, "unet": self.unet,
            "scheduler": scheduler,
        }  # fmt: skip
        if isinstance(self.unet, UNetMotionModel):
            return AnimateDiffPipeline(**shared, motion_adapter=None)
        assert isinstance(self.unet, UNet3DConditionModel)
        return TextToVideoSDPipeline(**shared)

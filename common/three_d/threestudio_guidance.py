"""threestudio's guidance with a tuned model, without threestudio: `threestudio_custom/pcs_guidance` registers it there.

As in threestudio-project/threestudio at 28d9d80, `StableDiffusionGuidance` (Apache-2.0): loss_sds is
1/2 |z - sg(z - g)|^2 / B, a sum over all other numbers, with g = w(t) (eps_hat - eps); its gradient with regard to z is
g / B. Other than there: prompts go through the tuned model's own text encoder; pictures are scaled to the size that the
model was made for, not to 512; the VAE's mean is taken, not a sample; guidance_scale is s = 1 + theirs.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.backbones import Backbone
from common.distillation import TimestepRange, ViewPrompts, guided_predictor, picture_latents, sds_gradient, sds_loss
from common.distillation.sds import Weighting


def prompt_of(folder: str | Path) -> str:
    """The prompt that a tuned folder's artifact.json names, "a photo of sks dog".

    Raises: ValueError if there is none, as in a folder of another origin.
    """
    path = Path(folder) / "artifact.json"
    prompt = json.loads(path.read_text(encoding="utf-8")).get("prompt") if path.is_file() else None
    if not prompt:
        raise ValueError(f"{path} names no prompt: say one, with the identifier and class word the model was tuned on")
    return prompt


class TunedGuidance:
    """Score distillation from one model for pictures of one thing.

    Args:
        backbone: frozen here.   prompt: "a photo of sks dog"; the views' names are added to it.
        guidance_scale: s of eps_uncond + s (eps_cond - eps_uncond); 1 = off.
        view_prompts: False tells the prompt alone, whatever the view.
    """

    def __init__(
        self, backbone: Backbone, prompt: str, *, guidance_scale: float = 101.0, weighting: Weighting = "sigma2",
        view_prompts: bool = True,
    ) -> None:  # fmt: skip
        self.backbone, self.guidance_scale, self.weighting = backbone.freeze(), guidance_scale, weighting
        self.prompts = ViewPrompts(backbone, prompt, names=view_prompts)

    def latents(self, rgb: Tensor, rgb_as_latents: bool) -> Tensor:
        """Pictures (B,H,W,3) in [0,1], or latents (B,H,W,4) of any size, as the model's latents (B,4,h,w), float32."""
        images = rgb.permute(0, 3, 1, 2)
        if rgb_as_latents:
            size = self.backbone.latent_shape[1:]
            return F.interpolate(images, size, mode="bilinear", align_corners=False).float()
        return picture_latents(self.backbone, images * 2 - 1).float()

    def __call__(
        self, rgb: Tensor, elevations_deg: Tensor, azimuths_deg: Tensor, times: TimestepRange,
        generator: torch.Generator, *, rgb_as_latents: bool = False,
    ) -> dict[str, Tensor | int]:  # fmt: skip
        """What threestudio asks of a guidance.

        Args:
            rgb: (B,H,W,3) in [0,1], or (B,H,W,4) with rgb_as_latents.
            elevations_deg, azimuths_deg: (B,), azimuth 0 = front: threestudio's are the same as ours.
            times: which timesteps are drawn.   generator: on the CPU; timesteps, then noise.
        Returns: "loss_sds", a scalar; "grad_norm" of g; "min_step" and "max_step" of the draw.
        """
        latents = self.latents(rgb, rgb_as_latents)
        count, steps = len(latents), self.backbone.noise_scheduler.config.num_train_timesteps
        timesteps = times.sample(count, steps, generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        told, empty = self.prompts.at(azimuths_deg, elevations_deg), self.prompts.empty(count)
        gradient = sds_gradient(
            self.backbone, latents.detach(), guided_predictor(self.backbone, told, empty, self.guidance_scale),
            timesteps=timesteps, noise=noise, weighting=self.weighting,
        )  # fmt: skip
        return {
            "loss_sds": sds_loss(latents, gradient),
            "grad_norm": gradient.norm(),
            "min_step": int(times.low * steps),
            "max_step": int(times.high * steps),
        }

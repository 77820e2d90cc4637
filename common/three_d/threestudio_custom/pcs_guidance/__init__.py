"""For threestudio's folder `custom/`: guidance by a model that was tuned here. README.md says how to use it.

Written against threestudio-project/threestudio at 28d9d80, whose launch.py imports every folder in custom/.
"""

from dataclasses import dataclass
from typing import Any

import threestudio
import torch
from threestudio.utils.base import BaseObject
from threestudio.utils.misc import C, get_rank
from torch import Tensor

from common.backbones import load_backbone
from common.distillation import TimestepRange
from common.three_d.threestudio_guidance import TunedGuidance, prompt_of
from common.training.seeding import seeded_generator


@threestudio.register("pcs-tuned-guidance")
class TunedModelGuidance(BaseObject):
    """Score distillation from a tuned model, which tells it prompts in its own words."""

    @dataclass
    class Config(BaseObject.Config):
        model: str = "???"  # a tuned folder, a diffusers folder, a preset, or a hub id
        prompt: str | None = None  # with identifier and class word; None = that of the folder's artifact.json
        guidance_scale: float = 101.0  # s; 1 + threestudio's 100
        weighting: str = "sigma2"  # sigma2 = threestudio's "sds", or uniform
        min_step_percent: Any = 0.02  # a number, or threestudio's schedule [step, from, to, step]
        max_step_percent: Any = 0.98  # likewise
        view_dependent_prompting: bool = True
        half_precision_weights: bool = True
        seed: int = 0  # of timesteps and noise

    cfg: Config

    def configure(self) -> None:
        dtype = torch.float16 if self.cfg.half_precision_weights else torch.float32
        prompt = self.cfg.prompt or prompt_of(self.cfg.model)
        threestudio.info(f"Loading {self.cfg.model} for {prompt!r} ...")
        self.guidance = TunedGuidance(
            load_backbone(self.cfg.model, device=self.device, dtype=dtype), prompt,
            guidance_scale=self.cfg.guidance_scale, weighting=self.cfg.weighting,
            view_prompts=self.cfg.view_dependent_prompting,
        )  # fmt: skip
        self.update_step(0, 0)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """threestudio calls it before each batch."""
        shares = (C(value, epoch, global_step) for value in (self.cfg.min_step_percent, self.cfg.max_step_percent))
        self.times, self.global_step = TimestepRange(*shares), global_step

    def __call__(
        self, rgb: Tensor, prompt_utils: Any, elevation: Tensor, azimuth: Tensor, camera_distances: Tensor,
        rgb_as_latents: bool = False, guidance_eval: bool = False, **kwargs: Any,
    ) -> dict[str, Tensor | int]:  # fmt: skip
        """threestudio's contract. Neither its prompts nor distances are looked at.

        Raises: ValueError if pictures of the denoising are asked for.
        """
        if guidance_eval:
            raise ValueError("pcs-tuned-guidance makes no pictures of the denoising: system.freq.guidance_eval=0")
        generator = seeded_generator(self.cfg.seed, "guidance", get_rank(), self.global_step)
        with torch.autocast(self.device.type, enabled=False):
            return self.guidance(
                rgb.float(), elevation, azimuth, self.times, generator, rgb_as_latents=rgb_as_latents
            )  # fmt: skip


@threestudio.register("pcs-no-prompt-processor")
class NoPromptProcessor(BaseObject):
    """In the place of threestudio's, which would load another text encoder; the guidance has prompts of its own."""

    def __call__(self) -> None:
        return None

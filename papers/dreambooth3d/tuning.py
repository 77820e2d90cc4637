"""DreamBooth of a U-Net (Sec. 3): partially, fully, and on pseudo views too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from common.backbones import Backbone
from common.io import atomic_save_safetensors, load_safetensors
from common.sampling import sample_images
from common.sampling.sampler import sample_latents
from common.training.losses import denoising_loss
from common.training.noising import noise_batch
from common.training.seeding import derive_seed

from .config import DreamBooth3DConfig

UNET = "unet.safetensors"
CLASS_STREAM = "class images"
BATCH = 8  # class images made at a time


def instance_prompt(config: DreamBooth3DConfig) -> str:
    """ "a photo of [V] <class>"."""
    return config.prompt_template.format(f"{config.identifier} {config.class_noun}")


def class_prompt(config: DreamBooth3DConfig) -> str:
    """ "a photo of <class>"."""
    return config.prompt_template.format(config.class_noun)


def field_prompt(config: DreamBooth3DConfig) -> str:
    """The instance prompt with its context; the views' names are added to it."""
    return f"{instance_prompt(config)} {config.context}".strip()


class SubjectTuning:
    """The whole U-Net on pictures of the subject, and with prior loss on pictures of its class.

    Args:
        backbone: its U-Net is trained in place, from what it is now.
        seed: of noise and timesteps; another one for each stage.
    """

    def __init__(self, backbone: Backbone, config: DreamBooth3DConfig, seed: int) -> None:
        self.backbone, self.config, self.seed = backbone.freeze(), config, seed
        backbone.unet.requires_grad_(True)
        with torch.no_grad():
            self._instance, self._class = (
                backbone.encode_prompt(text) for text in (instance_prompt(config), class_prompt(config))
            )

    def parameters(self) -> list[tuple[str, Parameter]]:
        """All of the U-Net."""
        return list(self.backbone.unet.named_parameters())

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """L_d, with epsilon in the place of x0 (D1), for {"latents"} and, with prior loss, {"class_latents"}."""
        keys = batch["sample_keys"]
        noised = noise_batch(self.backbone, batch["latents"], keys, seed=self.seed)
        loss = denoising_loss(self.backbone, noised, self._instance.repeat(len(keys))).mean()
        if self.config.tuning.prior_loss_weight == 0:
            return loss
        noised = noise_batch(self.backbone, batch["class_latents"], keys, seed=derive_seed(self.seed, CLASS_STREAM))
        prior = denoising_loss(self.backbone, noised, self._class.repeat(len(keys))).mean()
        return loss + self.config.tuning.prior_loss_weight * prior

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        """Pictures for a prompt, one per seed, (B,3,H,W) in [-1,1]."""
        steps, scale = self.config.num_inference_steps, self.config.guidance_scale
        return sample_images(self.backbone, prompt, seeds=seeds, num_inference_steps=steps, guidance_scale=scale)

    def save(self, folder: Path) -> None:
        """Write unet.safetensors."""
        atomic_save_safetensors(self.backbone.unet.state_dict(), Path(folder) / UNET)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        load_unet(self.backbone, folder)


def load_unet(backbone: Backbone, folder: Path) -> Backbone:
    """Put a tuned U-Net into a backbone. Raises: ValueError naming the file if it is another architecture's."""
    path = Path(folder) / UNET
    tensors, _ = load_safetensors(path)
    try:
        backbone.unet.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the U-Net of {backbone.name}: {error}") from error
    return backbone


@torch.no_grad()
def class_latents(backbone: Backbone, config: DreamBooth3DConfig, path: Path) -> Tensor:
    """Latents of class images (N,4,h,w): ancestral samples of the untuned model, made once and kept in a file."""
    if not path.is_file():
        count = config.tuning.num_class_images
        seeds = [derive_seed(config.seed, CLASS_STREAM, index) for index in range(count)]
        told = backbone.encode_prompt(class_prompt(config))
        made = [
            sample_latents(
                backbone, told, seeds=seeds[start : start + BATCH], eta=1.0,
                num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
            ).cpu()
            for start in range(0, count, BATCH)
        ]  # fmt: skip
        atomic_save_safetensors({"latents": torch.cat(made)}, path)
    return load_safetensors(path)[0]["latents"]


def tuning_items(latents: Tensor, of_class: Tensor | None) -> list[Mapping[str, Tensor]]:
    """What `fit` draws from: pictures' latents, each with those of a class image if there are any."""
    if of_class is None:
        return [{"latents": own} for own in latents]
    count = max(len(latents), len(of_class))
    return [{"latents": latents[i % len(latents)], "class_latents": of_class[i % len(of_class)]} for i in range(count)]

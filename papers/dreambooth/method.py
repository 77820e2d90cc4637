"""DreamBooth (Ruiz et al., CVPR 2023, arXiv 2208.12242), in the order of its Section 3.

Paper -> here:  x -> latents (D1)   x_pr -> latents of class images   epsilon -> noise   c_s -> instance conditioning
    c_pr -> class conditioning   [V] -> identifier   lambda -> prior_loss_weight
Departures D1 to D5, from the paper and from its code, are explained in the card. Class images: class_images.py.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from common.backbones import Backbone, Conditioning, load_backbone
from common.data.prompt_cache import PromptCache
from common.io import atomic_write_text
from common.sampling import sample_images
from common.training.losses import fixed_noise_validation
from common.training.noising import NoisedBatch, noise_batch
from common.training.seeding import derive_seed

from .config import DreamBoothConfig

SLUG = Path(__file__).parent.name
ARTIFACT = "artifact.json"
CLIP_RARE_TOKENS = range(40_000, 49_406)  # ids grow with rarity; not in the paper for CLIP: T5-XXL's are 5000..10000
CLASS_STREAM = "class images"  # random numbers of the class term: t' and epsilon' are drawn apart from t and epsilon


def denoising_loss(backbone: Backbone, noised: NoisedBatch, conditioning: Conditioning) -> Tensor:
    """Eq. 1 in the form Stable Diffusion was trained with, ||epsilon_theta(z_t, t, c) - epsilon||^2 (D1).

    Returns: the mean over channels and pixels, one value per sample, (B,).
    """
    model_pred = backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning)  # (B,4,h,w)
    return F.mse_loss(model_pred.float(), noised["target"].float(), reduction="none").flatten(1).mean(1)


def rare_token_identifier(
    tokenizer: CLIPTokenizer,
    *,
    token_ids: Sequence[int] = CLIP_RARE_TOKENS,
    num_tokens: int = 1,
    max_characters: int = 3,
    generator: torch.Generator,
) -> str:
    """Sec. 3.2, "Rare-token Identifiers": draw k token ids without replacement and decode them to the text [V].

    Args:
        token_ids: the look-up range, of rare tokens.
        num_tokens: k, 1 to 3 in the paper.
        max_characters: longest token, in Unicode characters without spaces; 3 in the paper.
        generator: of the uniform draw, on the CPU.
    Raises: ValueError if the range has too few such tokens, or if none of 1000 draws is read back as it was drawn.
    """
    short = [i for i in token_ids if i < len(tokenizer) and 0 < len(tokenizer.decode([i]).strip()) <= max_characters]
    short = [i for i in short if i not in tokenizer.all_special_ids]
    if not 1 <= num_tokens <= len(short):
        raise ValueError(
            f"cannot draw {num_tokens} tokens from the {len(short)} with at most {max_characters} characters among ids "
            f"{token_ids[0]}..{token_ids[-1]} of {len(tokenizer)}: pass other token_ids, or choose an identifier"
        )
    for _ in range(1000):
        drawn = [short[i] for i in torch.randperm(len(short), generator=generator)[:num_tokens].tolist()]
        text = tokenizer.decode(drawn).strip()
        if tokenizer(text, add_special_tokens=False).input_ids == drawn:  # not so for pieces of words
            return text
    raise ValueError(f"no draw of {num_tokens} tokens is a text that is read back as the same tokens")


def instance_prompt(config: DreamBoothConfig) -> str:
    """Sec. 3.2, "Designing Prompts for Few-Shot Personalization": "a [identifier] [class noun]"."""
    return config.prompt_template.format(f"{config.identifier} {config.class_noun}".strip())


def class_prompt(config: DreamBoothConfig) -> str:
    """Sec. 3.3: "a [class noun]"."""
    return config.prompt_template.format(config.class_noun)


def prior_preservation_loss(instance_losses: Tensor, class_losses: Tensor, prior_loss_weight: float) -> Tensor:
    """Eq. 2, a scalar. Subject and class samples are two arguments, so no batch order can mix them."""
    return instance_losses.mean() + prior_loss_weight * class_losses.mean()


class DreamBooth:
    """The whole U-Net, and if wanted the text encoder, bound to one subject.

    Args:
        backbone: is trained in place; its VAE stays frozen.
    """

    def __init__(self, backbone: Backbone, config: DreamBoothConfig) -> None:
        if config.identifier is None:
            raise ValueError("the config has no identifier; draw one with rare_token_identifier and put it there")
        self.backbone, self.config = backbone.freeze(), config
        for module in self.trained_modules().values():
            module.requires_grad_(True)
        self._cached_prompts = None if config.train_text_encoder else PromptCache(backbone)

    def trained_modules(self) -> dict[str, nn.Module]:
        """Name in the backbone -> network."""
        names = ["unet"]
        if self.config.train_text_encoder:
            names += ["text_encoder", "text_encoder_2"][: len(self.backbone.text_encoders)]
        return {name: getattr(self.backbone, name) for name in names}

    def parameters(self) -> list[dict[str, Any]]:
        """Everything in the trained networks. Weight decay spares the vocabulary (D4)."""
        decayed, vocabulary = [], []
        for name, module in self.trained_modules().items():
            for key, parameter in module.named_parameters():
                group = vocabulary if key.endswith("token_embedding.weight") else decayed
                group.append((f"{name}.{key}", parameter))
        groups = [{"params": decayed}]
        return groups + [{"params": vocabulary, "weight_decay": 0.0}] if vocabulary else groups

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """Eq. 2 for {"instance": {"latents", "prompt"}, "class": the same}; Eq. 1, without "class", if lambda is 0."""
        keys, seed = batch["sample_keys"], self.config.seed
        instance = noise_batch(self.backbone, batch["instance"]["latents"], keys, seed=seed)
        prompts = list(batch["instance"]["prompt"])
        if self.config.prior_loss_weight == 0:
            return denoising_loss(self.backbone, instance, self.encode(prompts)).mean()
        of_class = noise_batch(self.backbone, batch["class"]["latents"], keys, seed=derive_seed(seed, CLASS_STREAM))
        both = NoisedBatch(**{name: torch.cat([instance[name], of_class[name]]) for name in instance})
        losses = denoising_loss(self.backbone, both, self.encode(prompts + list(batch["class"]["prompt"])))  # (2B,), D3
        instance_losses, class_losses = losses.split(len(keys))
        return prior_preservation_loss(instance_losses, class_losses, self.config.prior_loss_weight)

    def encode(self, prompts: list[str]) -> Conditioning:
        """Of B prompts; from a cache where the text encoder is frozen, through the encoder where it is trained."""
        return (
            self.backbone.encode_prompt(prompts)
            if self._cached_prompts is None
            else self._cached_prompts.batch(prompts)
        )

    def generate(
        self,
        prompt: str | None = None,
        *,
        seeds: list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Pictures for a prompt such as "a sks dog on the beach", one per seed, (B,3,H,W) in [-1,1].

        Args:
            prompt: None = the one of training, "a [V] [class noun]".
            num_inference_steps, guidance_scale: DDIM steps and s; None = those of the config.
            batch_size: pictures at a time.
        """
        config = self.config
        return sample_images(
            self.backbone,
            instance_prompt(config) if prompt is None else prompt,
            seeds=seeds,
            batch_size=batch_size,
            num_inference_steps=config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
        )

    @torch.no_grad()
    def validation_loss(self, latents: Tensor) -> float:
        """Eq. 1 of pictures (B,4,h,w) under "a [V] [class noun]", with noise and timesteps that never change."""
        conditioning = self.backbone.encode_prompt(instance_prompt(self.config))
        return fixed_noise_validation(self.backbone, latents, conditioning)

    def save(self, folder: Path) -> None:
        """Write the folder of a diffusers pipeline, and artifact.json last: without it the folder is not complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ARTIFACT).unlink(missing_ok=True)
        for leftover in folder.glob(".saving-*"):
            shutil.rmtree(leftover)
        with TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            self.backbone.to_pipeline().save_pretrained(temporary)
            for path in (path for path in Path(temporary).rglob("*") if path.is_file()):
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            for part in Path(temporary).iterdir():
                if (folder / part.name).is_dir():
                    shutil.rmtree(folder / part.name)
                os.replace(part, folder / part.name)
        header = {
            "slug": SLUG,
            "version": "1",
            "backbone": Path(self.backbone.name).name,
            "class_noun": self.config.class_noun,
            "identifier": self.config.identifier,
            "prompt": instance_prompt(self.config),
            "config": asdict(self.config),
        }
        atomic_write_text(folder / ARTIFACT, json.dumps(header, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read the networks that `save` wrote into this method's backbone."""
        saved = load_backbone(folder)
        for name, module in self.trained_modules().items():
            module.load_state_dict(getattr(saved, name).state_dict())


def load_method(
    artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu"
) -> DreamBooth:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: the folder that `save` wrote.
        backbone_name: takes all that was not trained from there; None = from the artifact, which is a whole pipeline.
    """
    path = Path(artifact_path) / ARTIFACT
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: this is no trained folder, or it was not written to its end")
    config = DreamBoothConfig(**json.loads(path.read_text(encoding="utf-8"))["config"])
    method = DreamBooth(load_backbone(backbone_name or artifact_path, device=device), config)
    if backbone_name is not None:
        method.load(Path(artifact_path))
    return method

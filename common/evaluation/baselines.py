"""The two baselines that most papers compare with, in their plainest form, as candidates of a study.

Papers that own these methods have them in full; these are the few lines that a comparison needs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from common.backbones import Backbone, PlaceholderTokens, load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset
from common.evaluation.study import PLAIN_PROMPT, Candidate
from common.io import atomic_save_safetensors
from common.sampling import sample_images
from common.toyworld.benchmark import Subject
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.losses import denoising_loss, fixed_noise_validation
from common.training.noising import noise_batch
from common.training.optimize import default_device

PLACEHOLDER, IDENTIFIER = "<subject>", "sks"


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Settings of a baseline. Steps and batch size are those of the method that it is compared with."""

    train_steps: int
    batch_size: int
    learning_rate: float
    num_inference_steps: int = 30
    guidance_scale: float = 5.0  # s of uncond + s * (cond - uncond)
    seed: int = 0


class _Baseline:
    """What the two share: the loss, sampling, and the prompt with the subject's words."""

    backbone: Backbone
    words: str

    def __init__(self, config: BaselineConfig) -> None:
        self.config = config

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        noised = noise_batch(self.backbone, batch["latents"], batch["sample_keys"], seed=self.config.seed)
        return denoising_loss(self.backbone, noised, self.backbone.encode_prompt(list(batch["prompt"]))).mean()

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        steps, scale = self.config.num_inference_steps, self.config.guidance_scale
        return sample_images(self.backbone, prompt, seeds=seeds, num_inference_steps=steps, guidance_scale=scale)

    def validation_loss(self, latents: Tensor) -> float:
        return fixed_noise_validation(self.backbone, latents, self.backbone.encode_prompt(self.plain_prompt()))

    def plain_prompt(self) -> str:
        return PLAIN_PROMPT.format(self.words)


class TokenInversion(_Baseline):
    """Textual Inversion (Gal et al., arXiv 2208.01618) with one vector, from the class noun."""

    def __init__(self, backbone: Backbone, class_noun: str, config: BaselineConfig) -> None:
        super().__init__(config)
        self.backbone, self.words = backbone.freeze(), PLACEHOLDER
        self.tokens = PlaceholderTokens(backbone)
        self.tokens.add(PLACEHOLDER, initializer_token=class_noun)

    def parameters(self) -> list[Parameter]:
        return self.tokens.parameters()

    def save(self, folder: Path) -> None:
        self.tokens.export_learned_embeds(folder / "learned_embeds.safetensors")


class FullFineTuning(_Baseline):
    """DreamBooth (Ruiz et al., arXiv 2208.12242) without prior loss: the whole UNet on "a photo of a sks dog"."""

    def __init__(self, backbone: Backbone, class_noun: str, config: BaselineConfig) -> None:
        super().__init__(config)
        self.backbone, self.words = backbone.freeze(), f"{IDENTIFIER} {class_noun}"
        self.backbone.unet.requires_grad_(True)

    def parameters(self) -> list[Parameter]:
        return list(self.backbone.unet.parameters())

    def save(self, folder: Path) -> None:
        atomic_save_safetensors(self.backbone.unet.state_dict(), folder / "unet.safetensors")


def token_inversion(backbone_name: str, config: BaselineConfig) -> Candidate:
    """Textual Inversion as a candidate; 5e-3 is the rate at which it learns best on tiny-sd."""
    return _candidate(TokenInversion, PLACEHOLDER, backbone_name, config)


def full_fine_tuning(backbone_name: str, config: BaselineConfig) -> Candidate:
    """DreamBooth without prior loss as a candidate; 2e-4 suits tiny-sd, 5e-6 a Stable Diffusion."""
    return _candidate(FullFineTuning, f"{IDENTIFIER} {{class}}", backbone_name, config)


def _candidate(kind: type[_Baseline], words: str, backbone_name: str, config: BaselineConfig) -> Candidate:
    def train(subject: Subject, photos: Path, run: Path) -> _Baseline:
        method = kind(load_backbone(backbone_name, device=default_device()), subject.class_noun, config)
        latents = LatentCache(ImageFolder(photos, resolution_px=method.backbone.resolution_px), method.backbone)
        settings = FitConfig(
            train_steps=config.train_steps,
            learning_rate=config.learning_rate,
            batch_size=config.batch_size,
            max_grad_norm=1.0 if kind is FullFineTuning else None,
            seed=config.seed,
            keep_checkpoints=1,
        )
        dataset = SubjectDataset(latents, [method.plain_prompt()], seed=config.seed)
        fit(method, dataset, settings, run, resume=True)
        return method

    settings: Mapping[str, object] = {"baseline": kind.__name__, **asdict(config)}
    return Candidate(words=words, settings=settings, train=train)

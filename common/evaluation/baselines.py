"""The two baselines that most papers compare with, in their plainest form, as candidates of a study.

Papers that own these methods have them in full; these are the few lines that a comparison needs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from common.backbones import Backbone, PlaceholderTokens, load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset
from common.evaluation.study import PLAIN_PROMPT
from common.evaluation.trials import Candidate
from common.io import atomic_save_safetensors
from common.sampling import sample_images
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

    @classmethod
    def like(cls, config: Any, learning_rate: float) -> "BaselineConfig":
        """As many steps and samples, and the same sampling, as a method's config says."""
        same = ("train_steps", "batch_size", "num_inference_steps", "guidance_scale")
        return cls(learning_rate=learning_rate, **{name: getattr(config, name) for name in same})


class _Baseline:
    """What the two share: the loss, sampling, and the prompt with the learned words."""

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

    def validation_loss(self, latents: Tensor, prompts: Sequence[str] | None = None) -> float:
        told = self.plain_prompt() if prompts is None else list(prompts)
        return fixed_noise_validation(self.backbone, latents, self.backbone.encode_prompt(told))

    def plain_prompt(self) -> str:
        return PLAIN_PROMPT.format(self.words)


class TokenInversion(_Baseline):
    """Textual Inversion (Gal et al., arXiv 2208.01618) with one vector, which starts as a word."""

    def __init__(self, backbone: Backbone, initializer_token: str, config: BaselineConfig) -> None:
        super().__init__(config)
        self.backbone, self.words = backbone.freeze(), PLACEHOLDER
        self.tokens = PlaceholderTokens(backbone)
        self.tokens.add(PLACEHOLDER, initializer_token=initializer_token)

    def parameters(self) -> list[Parameter]:
        return self.tokens.parameters()

    def save(self, folder: Path) -> None:
        self.tokens.export_learned_embeds(folder / "learned_embeds.safetensors")


class FullFineTuning(_Baseline):
    """DreamBooth (Ruiz et al., arXiv 2208.12242) without prior loss: the whole UNet on "a photo of a sks dog"."""

    def __init__(self, backbone: Backbone, class_noun: str, config: BaselineConfig) -> None:
        super().__init__(config)
        self.backbone, self.words = backbone.freeze(), f"{IDENTIFIER} {class_noun}".strip()
        self.backbone.unet.requires_grad_(True)

    def parameters(self) -> list[Parameter]:
        return list(self.backbone.unet.parameters())

    def save(self, folder: Path) -> None:
        atomic_save_safetensors(self.backbone.unet.state_dict(), folder / "unet.safetensors")


def token_inversion(backbone_name: str, config: BaselineConfig) -> Candidate:
    """Textual Inversion of a subject, from its class noun; 5e-3 is the rate at which it learns best on tiny-sd."""
    return _candidate(TokenInversion, PLACEHOLDER, backbone_name, config, lambda subject: subject.class_noun)


def full_fine_tuning(backbone_name: str, config: BaselineConfig) -> Candidate:
    """DreamBooth of a subject without prior loss; 2e-4 suits tiny-sd, 5e-6 a Stable Diffusion."""
    words = f"{IDENTIFIER} {{class}}"
    return _candidate(FullFineTuning, words, backbone_name, config, lambda subject: subject.class_noun)


def captioned_token_inversion(backbone_name: str, config: BaselineConfig, initializer_token: str) -> Candidate:
    """Textual Inversion of what captioned exemplars share, for `exemplar_study`."""
    return _candidate(TokenInversion, PLACEHOLDER, backbone_name, config, lambda task: initializer_token)


def captioned_full_fine_tuning(backbone_name: str, config: BaselineConfig) -> Candidate:
    """DreamBooth of what captioned exemplars share, for `exemplar_study`: "a photo of a duck sks a chair"."""
    return _candidate(FullFineTuning, IDENTIFIER, backbone_name, config, lambda task: "")


def _candidate(
    kind: type[TokenInversion] | type[FullFineTuning], words: str, backbone_name: str, config: BaselineConfig,
    word_of: Callable[[Any], str],
) -> Candidate:  # fmt: skip
    """word_of: the initializer token or class noun of a thing. Photos with captions are trained on under these."""

    def train(thing: Any, photos: Path, run: Path) -> _Baseline:
        method = kind(load_backbone(backbone_name, device=default_device()), word_of(thing), config)
        folder = ImageFolder(photos, resolution_px=method.backbone.resolution_px)
        prompts = [method.plain_prompt()] if folder.captions is None else None
        settings = FitConfig(
            train_steps=config.train_steps,
            learning_rate=config.learning_rate,
            batch_size=config.batch_size,
            max_grad_norm=1.0 if kind is FullFineTuning else None,
            seed=config.seed,
            keep_checkpoints=1,
        )
        dataset = SubjectDataset(LatentCache(folder, method.backbone), prompts, seed=config.seed)
        fit(method, dataset, settings, run, resume=True)
        return method

    settings: Mapping[str, object] = {"baseline": kind.__name__, **asdict(config)}
    return Candidate(words=words, settings=settings, train=train)

"""What Lego is compared with: the same pictures without Subject Separation, and the backbone's own words."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common.backbones import Backbone
from common.data.prompts import fill_templates
from common.io import atomic_write_text
from common.sampling import sample_images
from common.training.losses import fixed_noise_validation

from .config import TEMPLATES, LegoConfig


def unseparated_prompts(config: LegoConfig) -> tuple[list[str], list[str]]:
    """For S the class noun, which is frozen; for C the concept alone, which has to explain the subject too."""
    templates = TEMPLATES[config.kind]
    return fill_templates(templates, config.class_noun), fill_templates(templates, config.placeholder)


def in_plain_words(prompt: str, placeholder: str, words: str) -> str:
    """ "a photo of a chair <concept>" -> "a photo of a melting chair".

    Raises: ValueError for a prompt that does not end in a noun and the placeholder.
    """
    start, _, noun = prompt.removesuffix(f" {placeholder}").rpartition(" a ")
    if not start or " " in noun or not prompt.endswith(placeholder):
        raise ValueError(f"the prompt must end in 'a NOUN {placeholder}', got {prompt!r}")
    return f"{start} {'an' if words[0] in 'aeiou' else 'a'} {words} {noun}"


@dataclass(frozen=True)
class PlainWords:
    """The natural-language baseline: what the backbone makes of the concept's own words, without training."""

    backbone: Backbone
    config: LegoConfig
    words: str

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        steps, scale = self.config.num_inference_steps, self.config.guidance_scale
        told = in_plain_words(prompt, self.config.placeholder, self.words)
        return sample_images(self.backbone, told, seeds=seeds, num_inference_steps=steps, guidance_scale=scale)

    def validation_loss(self, latents: Tensor, prompts: list[str]) -> float:
        told = [in_plain_words(prompt, self.config.placeholder, self.words) for prompt in prompts]
        return fixed_noise_validation(self.backbone, latents, self.backbone.encode_prompt(told))

    def save(self, folder: Path) -> None:
        """The artifact is the words."""
        atomic_write_text(folder / "words.txt", self.words + "\n")

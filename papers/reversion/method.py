"""ReVersion (Huang, Wu et al., SIGGRAPH Asia 2024, arXiv 2303.13495): relation inversion.

Paper -> here:  <R> -> placeholder, relation (D,)   c -> prompt   P, N -> positives (P,D), negatives (N,D)
    gamma -> temperature   alpha -> focal_skew   lambda_steer -> steering_weight   eps -> noise
Departures D1 to D4 are explained in the card. Which words are in P and N: words.py.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from common.backbones import Backbone, PlaceholderTokens, load_backbone
from common.io import atomic_write_text, load_safetensors
from common.sampling import sample_images
from common.training.losses import fixed_noise_validation
from common.training.noising import NoisedBatch, noise_batch
from common.training.seeding import seeded_generator, seeded_uniform

from .config import ReVersionConfig
from .words import ignored_ids, preposition_ids

SLUG = Path(__file__).parent.name
ARTIFACT = "learned_embeds.safetensors"  # the name that diffusers looks for in a folder


def relation_focal_density(num_timesteps: int, skew: float) -> Tensor:
    """f(t) = (1 - alpha cos(pi t / T)) / T for t = 0 .. T-1, scaled to the sum 1; (T,) float64.

    Args: skew: alpha in [0, 1]; 0 = uniform, 1 = hardly any small t.
    """
    t = torch.arange(num_timesteps, dtype=torch.float64)
    density = (1 - skew * torch.cos(torch.pi * t / num_timesteps)) / num_timesteps
    return density / density.sum()


def relation_focal_timesteps(uniform: Tensor, density: Tensor) -> Tensor:
    """Timesteps (B,) int64 that follow a density (T,), from uniform numbers (B,) in [0, 1): the inverse of its sum."""
    return torch.searchsorted(density.cumsum(0), uniform.double(), right=True).clamp(max=len(density) - 1)


def relation_steering_loss(relation: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """-log( sum_P exp(r.p / gamma) / (sum_P exp(r.p / gamma) + sum_N exp(r.n / gamma)) ), all of unit length; a scalar.

    Args:
        relation: the embedding of <R>, (D,); the only one that gets a gradient.
        positives: embeddings of prepositions, (P,D), P >= 1.   negatives: of the captions' other words, (N,D).
    """
    direction = F.normalize(relation, dim=-1)
    others = F.normalize(torch.cat([positives, negatives]).detach(), dim=-1)
    similarities = others @ direction / temperature  # (P + N,)
    return similarities.logsumexp(0) - similarities[: len(positives)].logsumexp(0)


def denoising_loss(backbone: Backbone, noised: NoisedBatch, prompts: Sequence[str]) -> Tensor:
    """|eps - eps_theta(z_t, t, c)|^2 as a mean over channels and pixels; one value per sample, (B,).

    For a v-prediction backbone the velocity takes the place of eps, as in the code.
    """
    conditioning = backbone.encode_prompt(list(prompts))
    model_pred = backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning)  # (B,4,h,w)
    return F.mse_loss(model_pred.float(), noised["target"].float(), reduction="none").flatten(1).mean(1)


class ReVersion:
    """One relation as a pseudo-word on a frozen backbone."""

    def __init__(self, backbone: Backbone, config: ReVersionConfig) -> None:
        if len(backbone.text_encoders) > 1:
            raise ValueError(f"{backbone.name} has two text encoders; ReVersion is defined for one, as in sd15")
        self.backbone, self.config = backbone.freeze(), config
        self.tokens = PlaceholderTokens(backbone) if backbone.placeholders is None else backbone.placeholders
        (self.relation,) = self.tokens.add(config.placeholder_token, initializer_token=config.initializer_token)

    @cached_property
    def prepositions(self) -> list[int]:
        """Token ids of P."""
        return preposition_ids(self.backbone.tokenizer, self.config.num_positives)

    @cached_property
    def ignored(self) -> set[int]:
        """Token ids that are not in N."""
        tokenizer = self.backbone.tokenizer
        return {*ignored_ids(tokenizer), tokenizer.convert_tokens_to_ids(self.config.placeholder_token)}

    @property
    def word_table(self) -> Tensor:
        """Embeddings of all words, (V,D), frozen."""
        return self.backbone.text_encoder.get_input_embeddings().weight

    @cached_property
    def density(self) -> Tensor:
        """f(t), (T,)."""
        return relation_focal_density(self.backbone.noise_scheduler.config.num_train_timesteps, self.config.focal_skew)

    def parameters(self) -> list[tuple[str, Parameter]]:
        """<R>, (1,D)."""
        return [("relation", self.relation)]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """Denoising and steering loss for latents (B,4,h,w), one caption a sample."""
        keys, seed = batch["sample_keys"], self.config.seed

        def focal(sample_keys: Tensor, seed: int, num_train_timesteps: int) -> Tensor:
            return relation_focal_timesteps(seeded_uniform(sample_keys, seed=seed, stream="timesteps"), self.density)

        noised = noise_batch(self.backbone, batch["latents"], keys, seed=seed, timestep_sampler=focal)
        prompts = list(batch["prompt"])
        loss = denoising_loss(self.backbone, noised, prompts).mean()
        return loss + self.config.steering_weight * self.steering_loss(prompts, keys)

    def steering_loss(self, prompts: Sequence[str], sample_keys: Tensor) -> Tensor:
        """Of a batch: `num_positives` prepositions for each sample, and all other content words of the captions."""
        positives = [token for key in sample_keys.tolist() for token in self.positives_of(key)]
        negatives = self.negatives_of(prompts)
        return relation_steering_loss(
            self.relation[0], self.word_table[positives], self.word_table[negatives], self.config.temperature
        )

    def positives_of(self, sample_key: int) -> list[int]:
        """Token ids of distinct prepositions, drawn for a sample."""
        generator = seeded_generator(self.config.seed, "positives", sample_key)
        order = torch.randperm(len(self.prepositions), generator=generator)[: self.config.num_positives]
        return [self.prepositions[i] for i in order.tolist()]

    def negatives_of(self, prompts: Sequence[str]) -> list[int]:
        """Token ids of the words that are neither special, <R>, stop word nor preposition; as often as they stand."""
        rows = self.backbone.tokenizer(list(prompts), add_special_tokens=False).input_ids
        return [token for row in rows for token in row if token not in self.ignored]

    @torch.no_grad()
    def cosines(self, nouns: Sequence[str]) -> dict[str, float]:
        """Cosine of <R> with the mean preposition and with the mean of some nouns, which are one token each."""
        table = F.normalize(self.word_table.float(), dim=-1)
        ids = [token for noun in nouns for token in self.backbone.tokenizer(noun, add_special_tokens=False).input_ids]
        groups = {"prepositions": self.prepositions, "nouns": ids}
        return {
            name: F.cosine_similarity(self.relation[0], table[rows].mean(0), dim=0).item()
            for name, rows in groups.items()
        }

    def generate(
        self,
        prompt: str,
        *,
        seeds: list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Pictures for a prompt such as "cat <R> stone in the desert", one per seed, (B,3,H,W) in [-1,1].

        Args:
            num_inference_steps, guidance_scale: DDIM steps and s; None = those of the config.
            batch_size: pictures at a time.
        """
        config = self.config
        return sample_images(
            self.backbone,
            prompt,
            seeds=seeds,
            batch_size=batch_size,
            num_inference_steps=config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
        )

    @torch.no_grad()
    def validation_loss(
        self, latents: Tensor, prompts: Sequence[str], timesteps: tuple[int, ...] = tuple(range(50, 1000, 100))
    ) -> float:
        """The denoising loss of pictures (B,4,h,w) under B prompts, with noise and timesteps that never change."""
        conditioning = self.backbone.encode_prompt(list(prompts))
        return fixed_noise_validation(self.backbone, latents, conditioning, timesteps=timesteps)

    def save(self, folder: Path) -> None:
        """Write learned_embeds.safetensors, which diffusers' `load_textual_inversion` reads, and artifact.json."""
        header = {
            "slug": SLUG,
            "version": "1",
            "backbone": self.backbone.name,
            "config": json.dumps(asdict(self.config)),
        }
        path = Path(folder) / ARTIFACT
        self.tokens.export_learned_embeds(path, self.config.placeholder_token, metadata=header)
        atomic_write_text(path.with_name("artifact.json"), json.dumps({**header, "file": ARTIFACT}, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read the word that `save` wrote. Raises: ValueError naming the file if it has another shape."""
        path = _artifact_file(folder)
        (vector,) = load_safetensors(path)[0].values()
        if vector.shape != self.relation.shape:
            raise ValueError(
                f"{path} holds {tuple(vector.shape)}, but {self.backbone.name} needs {tuple(self.relation.shape)}"
            )
        with torch.no_grad():
            self.relation.copy_(vector)


def load_method(
    artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu"
) -> ReVersion:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: learned_embeds.safetensors, or the folder that holds it.
        backbone_name: None = the one that it was trained on.
    """
    path = _artifact_file(artifact_path)
    _, header = load_safetensors(path)
    if header.get("slug") != SLUG:
        raise ValueError(f"{path} was not written by this method, but by {header.get('slug', 'something unknown')}")
    config = ReVersionConfig(**json.loads(header["config"]))
    method = ReVersion(load_backbone(backbone_name or header["backbone"], device=device), config)
    method.load(path)
    return method


def _artifact_file(path: str | Path) -> Path:
    path = Path(path)
    return path / ARTIFACT if path.is_dir() else path

"""Textual Inversion (Gal et al., ICLR 2023, arXiv 2208.01618), in the order of its Section 3.

Paper -> here:  x -> pixel_values   z = E(x) -> latents   y -> prompt   S* -> placeholder   v* -> vectors (V,D)
    c_theta(y) -> conditioning   eps -> noise   z_t, t -> noisy_latents, timesteps   v_init -> initial_vectors
Departures D1 to D6, from the paper and from its code, are explained in the card. Ablations are in variants.py.
"""

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from common.backbones import Backbone, Conditioning, PlaceholderTokens, load_backbone
from common.io import atomic_write_text, load_safetensors
from common.sampling import sample_images
from common.training.losses import fixed_noise_validation
from common.training.noising import NoisedBatch, noise_batch

from .config import TextualInversionConfig

SLUG = Path(__file__).parent.name
ARTIFACT = "learned_embeds.safetensors"  # the name that diffusers looks for in a folder


def insert_pseudo_word(token_embeds: Tensor, token_ids: Tensor, placeholder_id: int, vectors: Tensor) -> Tensor:
    """Sec. 3, "Text embeddings": v* takes the place of the placeholder's row, before positions are added.

    V > 1 vectors take V positions; what follows moves to the right and is cut at the end. The equation in plain sight:
    training and sampling use `PlaceholderTokens`, which gives the same wherever nothing is cut, and an error elsewhere.

    Args:
        token_embeds: rows of the embedding table, (B,L,D).
        token_ids: (B,L) int64, where the placeholder is one id.
        vectors: v*, (V,D).
    Returns: (B,L,D).
    """
    sequences = []
    for embeds, ids in zip(token_embeds, token_ids, strict=True):
        pieces = [vectors if i == placeholder_id else e[None] for e, i in zip(embeds, ids.tolist(), strict=True)]
        sequences.append(torch.cat(pieces)[: len(ids)])
    return torch.stack(sequences)


def denoising_loss(backbone: Backbone, noised: NoisedBatch, conditioning: Conditioning) -> Tensor:
    """Eq. 2, |eps - eps_theta(z_t, t, c_theta(y))|^2 as a mean over channels and pixels; one value per sample, (B,)."""
    noise_pred = backbone.predict_noise(noised["noisy_latents"], noised["timesteps"], conditioning)  # (B,4,h,w)
    return F.mse_loss(noise_pred.float(), noised["noise"].float(), reduction="none").flatten(1).mean(1)


def distance_to_start(vectors: Tensor, initial_vectors: Tensor) -> Tensor:
    """Sec. 5, "Regularization": |v - v_init|^2, the mean over the V vectors (D4); a scalar.

    Args:
        vectors, initial_vectors: (V,D).
    """
    return (vectors - initial_vectors).square().sum(-1).mean()


class TextualInversion:
    """One pseudo-word on a frozen backbone.

    The backbone may hold the pseudo-words of other concepts too; prompts can use them all.

    Args:
        backbone: is frozen here.
        initial_vectors: where training starts, (V,D), one per text encoder; None = the initializer token's embedding.
    """

    def __init__(
        self, backbone: Backbone, config: TextualInversionConfig, *, initial_vectors: list[Tensor] | None = None
    ) -> None:
        self.backbone, self.config = backbone.freeze(), config
        self.tokens = PlaceholderTokens(backbone) if backbone.placeholders is None else backbone.placeholders
        self.vectors: list[Parameter] = self.tokens.add(
            config.placeholder,
            config.num_vectors,
            initializer_token=config.initializer_token if initial_vectors is None else None,
            initial_vectors=initial_vectors,
        )
        self.initial_vectors = [vectors.detach().clone() for vectors in self.vectors]

    def parameters(self) -> list[tuple[str, Parameter]]:
        """v*, (V,D); for SDXL one per text encoder."""
        return [(f"vectors.{i}", vectors) for i, vectors in enumerate(self.vectors)]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """Eq. 2 for latents (B,4,h,w), one template a sample. The text encoder runs each step: it carries gradients."""
        noised = noise_batch(self.backbone, batch["latents"], batch["sample_keys"], seed=self.config.seed)
        conditioning = self.backbone.encode_prompt(self.prompts(batch))
        loss = denoising_loss(self.backbone, noised, conditioning).mean()
        if self.config.regularisation_weight == 0:
            return loss
        distances = [distance_to_start(v, start) for v, start in zip(self.vectors, self.initial_vectors, strict=True)]
        return loss + self.config.regularisation_weight * sum(distances)

    def prompts(self, batch: dict[str, Any]) -> list[str]:
        """The templates that were drawn for a batch, with S* in their gap."""
        return list(batch["prompt"])

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """Mean length of v*, and its ratio to the median word: far above 1 is the usual sign of lost editability."""
        length = torch.cat([vectors.norm(dim=-1) for vectors in self.vectors]).mean().item()
        return {"vector_norm": length, "vector_norm_ratio": length / self._word_norm}

    @cached_property
    def _word_norm(self) -> float:
        tables = [encoder.get_input_embeddings().weight for encoder in self.backbone.text_encoders]
        return torch.cat([table.detach().float().norm(dim=-1) for table in tables]).median().item()

    def generate(
        self,
        prompt: str,
        *,
        seeds: list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Pictures for a prompt such as "a photo of a S* on the beach", one per seed, (B,3,H,W) in [-1,1].

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
    def validation_loss(self, latents: Tensor) -> float:
        """Eq. 2 of pictures (B,4,h,w) under the plain prompt, with noise and timesteps that never change."""
        conditioning = self.backbone.encode_prompt(self.config.plain_prompt())
        return fixed_noise_validation(self.backbone, latents, conditioning)

    def save(self, folder: Path) -> None:
        """Write learned_embeds.safetensors, which diffusers' `load_textual_inversion` reads, and artifact.json."""
        header = {
            "slug": SLUG,
            "version": "1",
            "backbone": self.backbone.name,
            "class_noun": self.config.initializer_token,
            "config": json.dumps(asdict(self.config)),
        }
        path = Path(folder) / ARTIFACT
        self.tokens.export_learned_embeds(path, self.config.placeholder, metadata=header)
        atomic_write_text(path.with_name("artifact.json"), json.dumps({**header, "file": ARTIFACT}, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read the vectors that `save` wrote. Raises: ValueError naming the file if they are of other shapes."""
        path = _artifact_file(folder)
        tensors = list(load_safetensors(path)[0].values())  # one per text encoder
        shapes, own = [tuple(t.shape) for t in tensors], [tuple(v.shape) for v in self.vectors]
        if sorted(shapes) != sorted(own):
            raise ValueError(f"{path} has vectors of shapes {shapes}, but {self.config.placeholder} needs {own}")
        by_shape = {tuple(t.shape): t for t in tensors}  # the text encoders of SDXL differ in width
        with torch.no_grad():
            for vectors in self.vectors:
                vectors.copy_(by_shape[tuple(vectors.shape)])


def load_method(
    artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu"
) -> TextualInversion:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: learned_embeds.safetensors, or the folder that holds it.
        backbone_name: None = the one that it was trained on.
    """
    path = _artifact_file(artifact_path)
    _, header = load_safetensors(path)
    if "config" not in header:
        raise ValueError(f"{path} was not written by this method; load it with PlaceholderTokens.load_learned_embeds")
    config = TextualInversionConfig(**json.loads(header["config"]))
    method = TextualInversion(load_backbone(backbone_name or header["backbone"], device=device), config)
    method.load(path)
    return method


def _artifact_file(path: str | Path) -> Path:
    path = Path(path)
    return path / ARTIFACT if path.is_dir() else path

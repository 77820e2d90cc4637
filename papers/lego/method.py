"""Lego (Motamed, Paudel, Van Gool, ECCV 2024, arXiv 2311.13833): concepts beyond appearance, from two sets of pictures.

Paper -> here:  set S, the subject as it is -> batch["subject"]   set C, the same subject with the concept ->
    batch["concept"]   s -> subject (1,D)   c_1 .. c_k -> concept (k,D)   P_i, N_i -> positives, negatives
    tau -> temperature   lambda -> context_weight   eps -> noise   L_den -> denoising_loss   L_ctx -> context_losses
The abstract is all that could be looked up: departures D1 to D5 are explained in the card. The lists are in words.py.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
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
from common.training.seeding import derive_seed

from .config import LegoConfig
from .words import concept_from_json, context_rows, phrase_of, table_rows

SLUG = Path(__file__).parent.name
ARTIFACT = "learned_embeds.safetensors"  # c_1 .. c_k alone, under the name that diffusers looks for
SUBJECT_ARTIFACT = "subject_embeds.safetensors"  # s, which is dropped after training
SUBJECT_STREAM = "subject set"  # of random draws, so that the two sets share none


def denoising_loss(backbone: Backbone, noised: NoisedBatch, conditioning: Conditioning) -> Tensor:
    """|eps - eps_theta(z_t, t, c(y))|^2 as a mean over channels and pixels; one value per sample, (B,).

    For a v-prediction backbone the velocity takes the place of eps.
    """
    model_pred = backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning)  # (B,4,h,w)
    return F.mse_loss(model_pred.float(), noised["target"].float(), reduction="none").flatten(1).mean(1)


def context_losses(
    concept: Tensor, positives: Sequence[Tensor], negatives: Sequence[Tensor], temperature: float
) -> Tensor:
    """The Context Loss of every vector, with several positives in the manner of MIL-NCE (D2); (k,), >= 0.

    L_ctx(i) = -log( sum_p exp(c_i.p / tau) / (sum_p exp(c_i.p / tau) + sum_n exp(c_i.n / tau)) ), of unit vectors.

    Args:
        concept: c_1 .. c_k, (k,D).
        positives, negatives: rows of the frozen token table for each vector, k tensors (|P_i|,D) and (|N_i|,D).
        temperature: tau, > 0.
    Source: with the lists in the place of its words, `calculate_steer_loss` of ziqihuangg/ReVersion, train.py, 4b24980.
    """
    losses = []
    for vector, p, n in zip(F.normalize(concept, dim=-1), positives, negatives, strict=True):
        to_positives = F.normalize(p.detach(), dim=-1) @ vector / temperature  # (|P_i|,)
        to_negatives = F.normalize(n.detach(), dim=-1) @ vector / temperature  # (|N_i|,)
        losses.append(torch.cat([to_positives, to_negatives]).logsumexp(0) - to_positives.logsumexp(0))
    return torch.stack(losses)


def lego_loss(subject_losses: Tensor, concept_losses: Tensor, context: Tensor, context_weight: float) -> Tensor:
    """L = L_den + lambda * mean_i L_ctx(i), a scalar, with both sets weighing the same in L_den (Subject Separation).

    Args:
        subject_losses, concept_losses: of samples of S under "s" and of C under "s c_1 .. c_k", (B,) each.
        context: (k,).
    """
    return (subject_losses.mean() + concept_losses.mean()) / 2 + context_weight * context.mean()


def cosine_gaps(concept: Tensor, positives: Sequence[Tensor], negatives: Sequence[Tensor]) -> Tensor:
    """How much nearer each vector points to the mean of its positives than of its negatives, (k,) in [-2,2].

    Args: as for `context_losses`; rows are normalised before they are averaged.
    """
    means = [torch.stack([F.normalize(rows, dim=-1).mean(0) for rows in lists]) for lists in (positives, negatives)]
    near, far = (F.cosine_similarity(concept, mean, dim=-1) for mean in means)
    return near - far


class Lego:
    """A concept as one vector for each word of its phrase, learned beside a vector for the subject that shows it.

    Args:
        backbone: is frozen here; only the vectors are trained.
        config: with the concept's words.
    Raises: ValueError if there are no words, one is not a single token, or the backbone has two text encoders.
    """

    def __init__(self, backbone: Backbone, config: LegoConfig) -> None:
        if len(backbone.text_encoders) > 1:
            raise ValueError(f"{backbone.name} has two text encoders; Lego is defined for one, as in sd14, sd15, sd21")
        if not config.concept:
            raise ValueError("the config has no concept; give it the words of a phrase (read_concept, --concept-words)")
        self.backbone, self.config = backbone.freeze(), config
        self.positives, self.negatives = context_rows(backbone, config.concept)
        self.tokens = PlaceholderTokens(backbone) if backbone.placeholders is None else backbone.placeholders
        (self.subject,) = self.tokens.add(config.subject_placeholder, initializer_token=config.class_noun)
        starts = table_rows(backbone, [entry.word for entry in config.concept])
        (self.concept,) = self.tokens.add(config.placeholder, len(starts), initial_vectors=starts)

    def parameters(self) -> list[tuple[str, Parameter]]:
        """s, (1,D), and c_1 .. c_k, (k,D)."""
        return [("subject", self.subject), ("concept", self.concept)]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """L for a batch {"subject", "concept": {"latents" (B,4,h,w), "prompt"}} of both sets, in one pass."""
        keys, seed, config = batch["sample_keys"], self.config.seed, self.config
        of_subject = noise_batch(
            self.backbone, batch["subject"]["latents"], keys, seed=derive_seed(seed, SUBJECT_STREAM)
        )
        of_concept = noise_batch(self.backbone, batch["concept"]["latents"], keys, seed=seed)
        noised = NoisedBatch(**{name: torch.cat([of_subject[name], of_concept[name]]) for name in of_subject})
        prompts = [*batch["subject"]["prompt"], *batch["concept"]["prompt"]]
        losses = denoising_loss(self.backbone, noised, self.backbone.encode_prompt(prompts))  # (2B,)
        context = context_losses(self.concept, self.positives, self.negatives, config.temperature)
        return lego_loss(*losses.split(len(keys)), context, config.context_weight)

    @torch.no_grad()
    def cosines(self) -> dict[str, float]:
        """`cosine_gaps`, mean over the vectors."""
        return {"cosine_gap": cosine_gaps(self.concept, self.positives, self.negatives).mean().item()}

    def generate(
        self,
        prompt: str,
        *,
        seeds: list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Pictures for a prompt such as "a photo of a cat <concept>", one per seed, (B,3,H,W) in [-1,1].

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
    def validation_loss(self, latents: Tensor, prompts: Sequence[str]) -> float:
        """The denoising loss of pictures (B,4,h,w), each under its prompt; noise and timesteps never change."""
        return fixed_noise_validation(self.backbone, latents, self.backbone.encode_prompt(list(prompts)))

    def save(self, folder: Path) -> None:
        """Write learned_embeds.safetensors, {placeholder: (k,D)} float32, which diffusers' `load_textual_inversion`
        reads, subject_embeds.safetensors, {subject placeholder: (1,D)}, and artifact.json with phrase and lists."""
        config, folder = self.config, Path(folder)
        header = {
            "slug": SLUG,
            "version": "1",
            "backbone": self.backbone.name,
            "class_noun": config.class_noun,
            "phrase": phrase_of(config.concept),
            "config": json.dumps(asdict(config)),
        }
        self.tokens.export_learned_embeds(folder / SUBJECT_ARTIFACT, config.subject_placeholder, metadata=header)
        self.tokens.export_learned_embeds(folder / ARTIFACT, config.placeholder, metadata=header)
        page = {**header, "file": ARTIFACT, "subject_file": SUBJECT_ARTIFACT, "placeholder": config.placeholder}
        page["concept"] = [asdict(entry) for entry in config.concept]
        atomic_write_text(folder / "artifact.json", json.dumps(page, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read both files that `save` wrote. Raises: ValueError naming the file if its vectors are of other shapes."""
        files = ((SUBJECT_ARTIFACT, self.subject), (ARTIFACT, self.concept))
        for name, parameter in files:
            path = Path(folder) / name
            (vectors,) = load_safetensors(path)[0].values()
            if vectors.shape != parameter.shape:
                raise ValueError(f"{path} has vectors {tuple(vectors.shape)}, this method {tuple(parameter.shape)}")
            with torch.no_grad():
                parameter.copy_(vectors)


def load_method(
    artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu"
) -> Lego:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: the folder that holds the two files, or learned_embeds.safetensors in it.
        backbone_name: None = the one that it was trained on.
    Raises: ValueError naming the file if it is of another method.
    """
    folder = Path(artifact_path) if Path(artifact_path).is_dir() else Path(artifact_path).parent
    _, header = load_safetensors(folder / ARTIFACT)
    if header.get("slug") != SLUG:
        raise ValueError(
            f"{folder / ARTIFACT} was not written by this method, but by {header.get('slug', 'something unknown')}; "
            "PlaceholderTokens.load_learned_embeds loads any such file"
        )
    fields = json.loads(header["config"])
    config = LegoConfig(**{**fields, "concept": concept_from_json(fields["concept"])})
    method = Lego(load_backbone(backbone_name or header["backbone"], device=device), config)
    method.load(folder)
    return method

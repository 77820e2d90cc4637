"""ADI (Huang, Gong et al., CVPR 2024, arXiv 2311.15841): layer-wise identifiers, and gradient masks from triples.

Paper -> here:  <A> -> placeholder   v^l -> identifiers[l]   x^(a,c), x^(a,c'), x^(a',c) -> a triple: anchor,
    other_context, other_action   g -> gradients (L,D)   beta -> kept_share   m -> masks   eps -> noise
Departures D1 to D7 are explained in the card. How triples are drawn is in triples.py, ablations are in variants.py.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

from common.backbones import Backbone, Conditioning, PlaceholderTokens, load_backbone
from common.backbones.attention import attention_layers
from common.io import atomic_save_safetensors, atomic_write_text, load_safetensors
from common.sampling import sample_images
from common.training.losses import fixed_noise_validation
from common.training.noising import NoisedBatch, noise_batch

from .config import ADIConfig, Merge

SLUG = Path(__file__).parent.name
ARTIFACT = "identifiers.safetensors"
KEY = "identifiers"  # the one tensor in it, (L,D)
TRIPLE = ("anchor", "other_context", "other_action")


def encode_words(text_encoder: Module, token_ids: Tensor, is_placeholder: Tensor, words: Tensor) -> Tensor:
    """Layer-wise identifiers: the context of a prompt in which v^l stands for <A>, one word a row, (R,77,D).

    Args:
        text_encoder: CLIP; it is run as it is, with the words written in where tokens are looked up.
        token_ids: (R,77) int64.   is_placeholder: (R,77) bool.   words: (R,D).
    """

    def write(_: Module, args: tuple[Tensor], token_embeds: Tensor) -> Tensor:
        return torch.where(is_placeholder[..., None], words[:, None].to(token_embeds.dtype), token_embeds)

    handle = text_encoder.get_input_embeddings().register_forward_hook(write)
    try:
        return text_encoder(token_ids).last_hidden_state
    finally:
        handle.remove()


def denoising_loss(backbone: Backbone, noised: NoisedBatch, conditioning: Conditioning) -> Tensor:
    """|eps - eps_theta(z_t, t, {c^l})|^2 as a mean over channels and pixels; one value per sample, (B,).

    For a v-prediction backbone the velocity takes the place of eps.
    """
    model_pred = backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning)  # (B,4,h,w)
    return F.mse_loss(model_pred.float(), noised["target"].float(), reduction="none").flatten(1).mean(1)


def num_kept(share: float, channels: int) -> int:
    """How many of the channels a share is: the nearest whole number."""
    return round(share * channels)


def context_mask(anchor: Tensor, other_context: Tensor, kept_share: float) -> Tensor:
    """m1: the channels where g_(a,c) and g_(a,c') differ least. What two contexts agree on is the action.

    Args:
        anchor, other_context: gradients (...,L,D); channels are ranked within a layer.
        kept_share: beta.
    Returns: (...,L,D) bool, True in beta x D channels of each layer.
    """
    difference = (anchor - other_context).abs()
    kept = difference.topk(num_kept(kept_share, difference.shape[-1]), dim=-1, largest=False).indices
    return torch.zeros_like(difference, dtype=torch.bool).scatter(-1, kept, True)


def action_mask(anchor: Tensor, other_action: Tensor, kept_share: float) -> Tensor:
    """m2: the channels where g_(a,c) and g_(a',c) differ most. What two actions agree on is the context.

    Args, Returns: as in `context_mask`.
    """
    difference = (anchor - other_action).abs()
    kept = difference.topk(num_kept(kept_share, difference.shape[-1]), dim=-1, largest=True).indices
    return torch.zeros_like(difference, dtype=torch.bool).scatter(-1, kept, True)


def identifier_masks(
    anchor: Tensor, other_context: Tensor, other_action: Tensor, kept_share: float, merge: Merge
) -> Tensor:
    """m, from the gradients of a triple, each (...,L,D): True where the channel may learn, (...,L,D) bool.

    Args: merge: "union" or "intersection" of both masks (D3); "context" or "action" for m1 or m2 alone.
    """
    by_context = context_mask(anchor, other_context, kept_share)
    by_action = action_mask(anchor, other_action, kept_share)
    merged = {
        "union": by_context | by_action,
        "intersection": by_context & by_action,
        "context": by_context,
        "action": by_action,
    }
    return merged[merge]


def with_gradient(value: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
    """A scalar that equals `value` and whose gradient is `gradient`, whatever it was computed from.

    The loop differentiates a loss. What ADI follows, m * g_(a,c), is the gradient of none: the masks depend on it.
    """
    return value.detach() + ((parameter - parameter.detach()) * gradient.detach()).sum()


class ADI:
    """An action as one identifier for each cross-attention layer, on a frozen backbone."""

    def __init__(self, backbone: Backbone, config: ADIConfig) -> None:
        if len(backbone.text_encoders) > 1:
            raise ValueError(f"{backbone.name} has two text encoders; ADI is defined for one, as in sd15, sd21")
        self.backbone, self.config = backbone.freeze(), config
        cross = [layer.info for layer in attention_layers(backbone.unet) if layer.info.kind == "cross"]
        self.layer_names = [info.name for info in cross]
        self.tokens = PlaceholderTokens(backbone) if backbone.placeholders is None else backbone.placeholders
        (start,) = self.tokens.add(config.placeholder, initializer_token=config.initializer_token)
        start.requires_grad_(False)  # (1,D); the identifiers are written over it
        self.identifiers = Parameter(start.detach().repeat(len(self.layer_names), 1))

    @property
    def num_layers(self) -> int:
        """L, of the UNet: 16 in SD 1.x and 2.x."""
        return len(self.layer_names)

    def parameters(self) -> list[tuple[str, Parameter]]:
        """V = v^1 .. v^L, (L,D)."""
        return [("identifiers", self.identifiers)]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """The anchors' loss; its gradient is that of the anchors, masked for each triple by itself (D2, D4).

        Args: batch: of `TripleDataset`: latents (B,4,h,w) under the names of TRIPLE, prompts of B texts.
        """
        losses, gradients = self.sample_gradients(batch)
        masks = self.masks(gradients, batch["sample_keys"])
        return with_gradient(losses[0].mean(), self.identifiers, (masks * gradients[0]).mean(0))

    def masks(self, gradients: Tensor, sample_keys: Tensor) -> Tensor:
        """m of each triple, (B,L,D) bool.   gradients: (3,B,L,D), in the order of TRIPLE."""
        return identifier_masks(*gradients, self.config.kept_share, self.config.merge)

    def sample_gradients(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Losses (3,B) and their gradients by V (3,B,L,D), in the order of TRIPLE.

        Every sample gets a copy of V, so that one backward pass over the batch keeps the samples' gradients apart. The
        three of a triple share timestep and noise (D1).
        """
        count = len(batch["anchor"])
        latents = torch.cat([batch[name] for name in TRIPLE])
        prompts = [*batch["prompt"], *batch["other_context_prompt"], *batch["prompt"]]
        noised = noise_batch(self.backbone, latents, batch["sample_keys"].repeat(3), seed=self.config.seed)
        copies = self.identifiers.detach().repeat(3 * count, 1, 1).requires_grad_()  # (3B,L,D)
        losses = denoising_loss(self.backbone, noised, self.conditioning(prompts, copies))
        (gradients,) = torch.autograd.grad(losses.sum(), copies)
        return losses.detach().unflatten(0, (3, count)), gradients.unflatten(0, (3, count))

    def conditioning(self, prompts: Sequence[str], identifiers: Tensor | None = None) -> Conditioning:
        """A context for each cross-attention layer; the B x L texts are encoded as one batch.

        Args:
            prompts: B texts with <A> in them.
            identifiers: (B,L,D), for each prompt its own; None = V for all.
        """
        given = self.identifiers.expand(len(prompts), -1, -1) if identifiers is None else identifiers
        token_ids, is_placeholder = (rows.repeat_interleave(self.num_layers, 0) for rows in self._read(prompts))
        contexts = encode_words(self.backbone.text_encoder, token_ids, is_placeholder, given.flatten(0, 1))
        layers = contexts.unflatten(0, (len(prompts), self.num_layers)).unbind(1)  # L x (B,77,D)
        return Conditioning(layers[0], layer_prompt_embeds=layers)

    def _read(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B,77), and where <A> is, (B,77) bool."""
        tokenizer, limit = self.backbone.tokenizer, self.backbone.text_encoder.config.max_position_embeddings
        ids = tokenizer(list(prompts), padding="max_length", max_length=limit).input_ids
        placeholder = tokenizer.convert_tokens_to_ids(self.config.placeholder)
        for prompt, row in zip(prompts, ids, strict=True):
            if placeholder not in row:
                raise ValueError(f"the prompt has no {self.config.placeholder}: {prompt!r}")
            if len(row) > limit:
                raise ValueError(f"{len(row)} tokens, but {self.backbone.name} reads {limit}: {prompt!r}")
        token_ids = torch.tensor(ids, device=self.backbone.device)
        return token_ids, token_ids == placeholder

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        *,
        seeds: list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Pictures for a prompt such as "a photo of a bear <A>", one per seed, (B,3,H,W) in [-1,1].

        The unconditional half of guidance is told the empty prompt in all layers. Without <A> in the prompt, the
        backbone alone.

        Args:
            num_inference_steps, guidance_scale: DDIM steps and s; None = those of the config.
            batch_size: pictures at a time.
        """
        config = self.config
        return sample_images(
            self.backbone,
            self.conditioning([prompt]) if config.placeholder in prompt else prompt,
            seeds=seeds,
            batch_size=batch_size,
            num_inference_steps=config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
        )

    @torch.no_grad()
    def validation_loss(self, latents: Tensor, prompts: Sequence[str]) -> float:
        """The loss of pictures (B,4,h,w), each under its prompt, with noise and timesteps that never change."""
        return fixed_noise_validation(self.backbone, latents, self.conditioning(prompts))

    def set_identifiers(self, identifiers: Tensor) -> None:
        """Put other vectors in the place of V.   identifiers: (L,D), or (1,D) for all layers."""
        with torch.no_grad():
            self.identifiers.copy_(identifiers.expand(self.num_layers, -1))

    def save(self, folder: Path) -> None:
        """Write identifiers.safetensors, {"identifiers": (L,D) float32}, and artifact.json.

        The header names slug, backbone, initial word, placeholder, config and the modules that the rows belong to.
        """
        header = {
            "slug": SLUG,
            "version": "1",
            "backbone": self.backbone.name,
            "class_noun": self.config.initializer_token,
            "placeholder": self.config.placeholder,
            "layers": json.dumps(self.layer_names),
            "config": json.dumps(asdict(self.config)),
        }
        path = Path(folder) / ARTIFACT
        atomic_save_safetensors({KEY: self.identifiers.detach().cpu()}, path, header)
        atomic_write_text(path.with_name("artifact.json"), json.dumps({**header, "file": ARTIFACT}, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read the identifiers that `save` wrote. Raises: ValueError naming the file if its layers or width differ."""
        identifiers, header = read_artifact(folder)
        own = tuple(self.identifiers.shape)
        if tuple(identifiers.shape) != own or json.loads(header["layers"]) != self.layer_names:
            raise ValueError(
                f"{folder} holds identifiers {tuple(identifiers.shape)} for the layers of {header['backbone']}; "
                f"{self.backbone.name} needs {own} in its own order"
            )
        self.set_identifiers(identifiers)


def load_method(artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu") -> ADI:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: identifiers.safetensors, or the folder that holds it.
        backbone_name: None = the one that it was trained on.
    """
    _, header = read_artifact(artifact_path)
    config = ADIConfig(**json.loads(header["config"]))
    method = ADI(load_backbone(backbone_name or header["backbone"], device=device), config)
    method.load(Path(artifact_path))
    return method


def read_artifact(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """V, (L,D), and the header of an artifact. Raises: ValueError naming the file if it is no such file."""
    path = Path(path)
    path = path / ARTIFACT if path.is_dir() else path
    tensors, header = load_safetensors(path)
    if header.get("slug") != SLUG:
        raise ValueError(f"{path} was not written by this method, but by {header.get('slug', 'something unknown')}")
    return tensors[KEY], header

"""NeTI (Alaluf, Richardson et al., SIGGRAPH Asia 2023, arXiv 2305.15391): the text encoder's side, and the method.

mapper.py has the neural mapper M(t, l) -> (v_base, v_pass).
Paper -> here:  E -> features (R,77,D), before the last LayerNorm   S* -> placeholder   eps -> noise   l -> layer index
Departures D1 to D5 are explained in the card. Ablations and XTI are in variants.py.
"""

import json
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
from common.sampling import make_scheduler, sample_latents
from common.training.losses import fixed_noise_validation
from common.training.noising import NoisedBatch, noise_batch

from .config import NeTIConfig
from .mapper import HIDDEN, Mapper, draw_truncation

SLUG = Path(__file__).parent.name
ARTIFACT = "mapper.safetensors"
BYPASS_SCALE = 0.2  # share of |E| that the bypass adds (code)


def write_words(token_embeds: Tensor, is_placeholder: Tensor, words: Tensor) -> Tensor:
    """v_base takes the place of the placeholder's row, before positions are added.

    Args:
        token_embeds: (R,77,D).   is_placeholder: (R,77) bool.   words: v_base, (R,D).
    """
    return torch.where(is_placeholder[..., None], words[:, None].to(token_embeds.dtype), token_embeds)


def add_bypass(features: Tensor, is_placeholder: Tensor, bypass: Tensor, scale: float = BYPASS_SCALE) -> Tensor:
    """Textual bypass: E' = E + 0.2 |E| v_pass / |v_pass| at the placeholder, E' = E elsewhere.

    Args:
        features: E, output of the text transformer before its last LayerNorm, (R,77,D).
        is_placeholder: (R,77) bool.   bypass: v_pass, (R,D).
    """
    direction = F.normalize(bypass, dim=-1)[:, None].to(features.dtype)  # (R,1,D)
    return features + scale * is_placeholder[..., None] * features.norm(dim=-1, keepdim=True) * direction


def text_contexts(
    text_encoder: Module, token_ids: Tensor, is_placeholder: Tensor, words: Tensor, bypass: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What the keys and what the values of cross-attention read: LN(E) and LN(E'), each (R,77,D); None without bypass.

    Args:
        text_encoder: CLIP; it is run as it is, with the words written in where tokens are looked up.
        token_ids: (R,77) int64.   is_placeholder: (R,77) bool.   words, bypass: (R,D).
    """
    kept: list[Tensor] = []
    table, last_norm = text_encoder.get_input_embeddings(), text_encoder.final_layer_norm
    handles = [
        table.register_forward_hook(lambda _, args, output: write_words(output, is_placeholder, words)),
        last_norm.register_forward_pre_hook(lambda _, args: kept.append(args[0])),
    ]
    try:
        keys = text_encoder(token_ids).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return keys, None if bypass is None else last_norm(add_bypass(kept[0], is_placeholder, bypass))


def denoising_loss(backbone: Backbone, noised: NoisedBatch, conditioning: Conditioning) -> Tensor:
    """|eps - eps_theta(z_t, t, {E_l, E'_l})|^2 as a mean over channels and pixels; one value per sample, (B,).

    For a v-prediction backbone the velocity takes the place of eps, as in the code.
    """
    model_pred = backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning)  # (B,4,h,w)
    return F.mse_loss(model_pred.float(), noised["target"].float(), reduction="none").flatten(1).mean(1)


class NeTI:
    """One concept as a mapper from (timestep, layer) to words, on a frozen backbone."""

    def __init__(self, backbone: Backbone, config: NeTIConfig) -> None:
        if len(backbone.text_encoders) > 1:
            raise ValueError(f"{backbone.name} has two text encoders; NeTI is defined for one, as in sd14, sd15, sd21")
        self.backbone, self.config = backbone.freeze(), config
        self.tokens = PlaceholderTokens(backbone) if backbone.placeholders is None else backbone.placeholders
        (row,) = self.tokens.add(config.placeholder, initializer_token=config.super_category_token)
        self.word = row.requires_grad_(False)  # (1,D), the super-category's; stays, and the mapper writes over it
        self.num_layers = sum(layer.info.kind == "cross" for layer in attention_layers(backbone.unet))
        self.mapper = self.make_mapper().to(backbone.device)

    def make_mapper(self) -> Module:
        """The trained part."""
        config = self.config
        return Mapper(
            self.num_layers,
            self.word.shape[1],
            self.word.norm(),
            bypass=config.bypass,
            normalise_halves=config.normalise_halves,
            seed=config.seed,
        )

    def parameters(self) -> list[tuple[str, Parameter]]:
        """The mapper; w is a buffer of it."""
        return list(self.mapper.named_parameters())

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """The denoising loss for latents (B,4,h,w), one template a sample."""
        noised = noise_batch(self.backbone, batch["latents"], batch["sample_keys"], seed=self.config.seed)
        keep = draw_truncation(batch["sample_keys"], self.num_layers, self.config.nested_dropout, seed=self.config.seed)
        conditioning = self.conditioning(list(batch["prompt"]), noised["timesteps"], keep)
        return denoising_loss(self.backbone, noised, conditioning).mean()

    def conditioning(self, prompts: list[str], timesteps: Tensor, keep: Tensor | None = None) -> Conditioning:
        """A context for the keys and one for the values of each cross-attention layer.

        The B x L calls of mapper and text encoder are one batch.

        Args:
            prompts: B texts with S* in them, once or more.
            timesteps: (B,), one per prompt.
            keep: (B,L) int64, hidden units that stay; None = all.
        """
        layers = torch.arange(self.num_layers, device=self.backbone.device)
        keys, values = self.contexts(prompts, timesteps, layers, keep)
        return Conditioning(
            keys[:, 0],
            layer_prompt_embeds=keys.unbind(1),
            layer_value_embeds=None if values is None else values.unbind(1),
        )

    def contexts(
        self, prompts: list[str], timesteps: Tensor, layers: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Keys' and values' contexts of B prompts in some layers, each (B,number of layers,77,D); values may be None.

        Args: as in `conditioning`; layers: their indices, int64; keep: (B,number of layers).
        """
        token_ids, is_placeholder = self._read(prompts)
        count = len(layers)
        words, bypass = self.mapper(
            timesteps.to(self.backbone.device).repeat_interleave(count),
            layers.repeat(len(prompts)),
            None if keep is None else keep.flatten(),
        )
        rows = (token_ids.repeat_interleave(count, 0), is_placeholder.repeat_interleave(count, 0))
        keys, values = text_contexts(self.backbone.text_encoder, *rows, words, bypass)
        shape = (len(prompts), count)
        return keys.unflatten(0, shape), None if values is None else values.unflatten(0, shape)

    def _read(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B,77), and where the placeholder is, (B,77) bool."""
        tokenizer, limit = self.backbone.tokenizer, self.backbone.text_encoder.config.max_position_embeddings
        ids = tokenizer(prompts, padding="max_length", max_length=limit).input_ids
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
        keep: int | None = None,
        batch_size: int = 4,
    ) -> Tensor:
        """Pictures for a prompt such as "a photo of a S* on the beach", one per seed, (B,3,H,W) in [-1,1].

        The contexts of all steps and layers are computed first: on SD 1.5 in fp16, 189 MB a prompt, and that much again
        for each picture of a batch and for its unconditional half. Without S* in the prompt, the backbone alone.

        Args:
            num_inference_steps, guidance_scale: s; None = those of the config.
            keep: hidden units of the mapper that stay, 0..128: fewer follow the prompt more and the subject less.
            batch_size: pictures at a time.
        """
        if keep is not None and not 0 <= keep <= HIDDEN:
            raise ValueError(f"keep must be in 0..{HIDDEN}, got {keep}")
        backbone, config = self.backbone, self.config
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        if config.placeholder in prompt:
            rows = None if keep is None else torch.full((1, self.num_layers), keep)
            timesteps = make_scheduler(config.scheduler, backbone.noise_scheduler, steps).timesteps
            conditioning = [self.conditioning([prompt], timestep[None], rows) for timestep in timesteps.long()]
        else:
            conditioning = backbone.encode_prompt(prompt)
        images = [
            backbone.decode_latents(
                sample_latents(
                    backbone,
                    conditioning,
                    seeds=seeds[start : start + batch_size],
                    num_inference_steps=steps,
                    guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
                    scheduler=config.scheduler,
                )
            )
            for start in range(0, len(seeds), batch_size)
        ]
        return torch.cat(images).float().cpu()

    @torch.no_grad()
    def validation_loss(self, latents: Tensor, *, keep: int | None = None) -> float:
        """The loss of pictures (B,4,h,w) under the plain prompt, with noise and timesteps that never change.

        keep: as in `generate`.
        """
        rows = None if keep is None else torch.full((1, self.num_layers), keep)
        prompts = [self.config.plain_prompt()]
        return fixed_noise_validation(self.backbone, latents, lambda t: self.conditioning(prompts, t[:1], rows))

    def save(self, folder: Path) -> None:
        """Write mapper.safetensors (weights, w and the output's length) and artifact.json."""
        header = {
            "slug": SLUG,
            "version": "1",
            "backbone": self.backbone.name,
            "class_noun": self.config.super_category_token,
            "placeholder": self.config.placeholder,
            "config": json.dumps(asdict(self.config)),
        }
        path = Path(folder) / ARTIFACT
        atomic_save_safetensors(self.mapper.state_dict(), path, header)
        atomic_write_text(path.with_name("artifact.json"), json.dumps({**header, "file": ARTIFACT}, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read the mapper that `save` wrote. Raises: ValueError naming the file if it is of other shapes."""
        path = _artifact_file(folder)
        tensors, own = load_safetensors(path)[0], self.mapper.state_dict()
        shapes, own_shapes = ({name: tuple(t.shape) for name, t in part.items()} for part in (tensors, own))
        if shapes != own_shapes:
            different = sorted(n for n in shapes | own_shapes if shapes.get(n) != own_shapes.get(n))
            raise ValueError(f"{path} does not fit {self.backbone.name} and the config; different: {different}")
        self.mapper.load_state_dict(tensors)


def load_method(
    artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu"
) -> NeTI:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: mapper.safetensors, or the folder that holds it.
        backbone_name: None = the one that it was trained on.
    """
    path = _artifact_file(artifact_path)
    _, header = load_safetensors(path)
    if header.get("slug") != SLUG:
        raise ValueError(f"{path} was not written by this method, but by {header.get('slug', 'something unknown')}")
    config = NeTIConfig(**json.loads(header["config"]))
    method = NeTI(load_backbone(backbone_name or header["backbone"], device=device), config)
    method.load(path)
    return method


def _artifact_file(path: str | Path) -> Path:
    path = Path(path)
    return path / ARTIFACT if path.is_dir() else path

"""Custom Diffusion (Kumari et al., CVPR 2023, arXiv 2212.04488), in the order of its Sections 3.1 and 3.2.

Paper -> here:  x -> latents   c -> conditioning   V* -> placeholders "<new1>", "<new2>"   epsilon -> noise
    W^k, W^v -> weights of to_k, to_v   W - W_0 -> changes   Delta_l -> relative_change
Departures D1 to D6, from the paper and from its code, are explained in the card. Scales of the pictures:
augmentation.py; regularisation images: regularisation.py; merging several concepts (Sec. 3.2): merge.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.backbones import Backbone, Conditioning, PlaceholderTokens, load_backbone
from common.backbones.adapters import DenseDelta, attach
from common.backbones.attention import AttentionCall, AttentionHook, LayerInfo, Projections, attention_layers, install
from common.data.latent_cache import posterior_moments
from common.io import atomic_write_text
from common.sampling import sample_images
from common.training.losses import fixed_noise_validation
from common.training.noising import NoisedBatch, noise_batch
from common.training.seeding import derive_seed, seeded_randn

from .artifact import HEADER, read_changes, read_header, read_rows, write_changes
from .config import CustomDiffusionConfig

SLUG = Path(__file__).parent.name
REGULARISATION_STREAM = "regularisation images"  # their noise and timesteps are drawn apart from the subject's
KEYS_VALUES, ALL_OF_CROSS_ATTENTION = ("to_k", "to_v"), ("to_q", "to_k", "to_v", "to_out.0")


def relative_change(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, float]:
    """Sec. 3.1, "Rate of change of weights": Delta_l = ||theta'_l - theta_l|| / ||theta_l|| of every layer l.

    Args: tuned, base: the U-Net's state_dict after and before all of it was fine-tuned. Biases are left out.
    """
    weights = [name for name in base if name.endswith(".weight") and base[name].ndim > 1]
    return {name: ((tuned[name] - base[name]).norm() / base[name].norm()).item() for name in weights}


def layer_kind(name: str) -> str:
    """The groups that the paper compares; in cross-attention, what reads the text apart from the rest."""
    if ".attn2." in name:
        return "cross-attention K, V" if ".to_k." in name or ".to_v." in name else "cross-attention Q, out"
    if ".attn1." in name:
        return "self-attention"
    return "convolutions" if any(part in name for part in (".conv", "conv_", "samplers")) else "others"


def text_projections(unet: nn.Module, names: Sequence[str] = KEYS_VALUES) -> dict[str, Tensor]:
    """Sec. 3.1, "Model fine-tuning": W^k and W^v of every cross-attention layer, name in the U-Net -> weight."""
    layers = [layer.info.name for layer in attention_layers(unet) if layer.info.kind == "cross"]
    paths = [f"{layer}.{name}" for layer in layers for name in names]
    return {f"{path}.weight": unet.get_submodule(path).weight for path in paths}


class DetachStartToken(AttentionHook):
    """Code: keys and values of the start token stay in use but give no gradient, so that it is not what learns (D1)."""

    def applies_to(self, layer: LayerInfo) -> bool:
        return layer.kind == "cross"

    def projections(self, call: AttentionCall, projections: Projections) -> Projections:
        key, value = (torch.cat([x[:, :, :1].detach(), x[:, :, 1:]], 2) for x in (projections.key, projections.value))
        return projections._replace(key=key, value=value)


def masked_denoising_loss(backbone: Backbone, noised: NoisedBatch, conditioning: Conditioning, mask: Tensor) -> Tensor:
    """Sec. 3.1: |epsilon - epsilon_theta(x_t, c, t)|^2 where the mask is 1, a mean over channels and pixels, (B,) (D3).

    Args: mask: (B,1,h,w), 0 or 1: where a shrunken picture was pasted (augmentation.py), ones elsewhere.
    """
    model_pred = backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning)  # (B,4,h,w)
    squared_error = F.mse_loss(model_pred.float(), noised["target"].float(), reduction="none")
    return (mask * squared_error).mean(1).flatten(1).sum(1) / mask.flatten(1).sum(1)


def compress(change: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Appendix, "Model compression": W - W_0 = U S V^T, cut where the singular values pass a share of their sum (D5).

    Args:
        change: W - W_0, (out, in).
        share: in (0, 1]; 0.6 in the paper.
    Returns: U S (out, r) and V^T (r, in) of the leading r, the fewest whose sum is at least the share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    u, s, vt = torch.linalg.svd(change, full_matrices=False)
    passed = s.cumsum(0) < share * s.sum()
    rank = len(s) if share == 1 else min(int(passed.sum()) + 1, len(s))
    return u[:, :rank] * s[:rank], vt[:rank]


class CustomDiffusion:
    """Changes of W^k and W^v and one new word per concept, on a frozen backbone.

    Args: backbone: gets the changes and the words; its own weights stay as they are.
    """

    def __init__(self, backbone: Backbone, config: CustomDiffusionConfig) -> None:
        if not config.class_nouns:
            raise ValueError("the config has no class_nouns: give one for each concept (--class-nouns cat)")
        if backbone.placeholders is not None:
            raise ValueError(f"{backbone.name} has learned words already: load a fresh backbone")
        self.backbone, self.config = backbone.freeze(), config
        self.tokens = PlaceholderTokens(backbone)
        for placeholder, start in zip(config.placeholders, config.initializer_tokens, strict=False):
            if placeholder:
                self.tokens.add(placeholder, initializer_token=start)
        names = KEYS_VALUES if config.trained == "crossattn_kv" else ALL_OF_CROSS_ATTENTION
        self.base_weights = text_projections(backbone.unet, names)
        self.changes = {name: DenseDelta(torch.zeros_like(weight)) for name, weight in self.base_weights.items()}
        self.attached = attach(self.changes, backbone.unet)  # attached.set_strength(0) is the backbone itself

    def parameters(self) -> list[dict[str, Any]]:
        """W - W_0 of every matrix, and the rows V* without weight decay; no other row of the vocabulary (D2)."""
        matrices = [(name, residual.change) for name, residual in self.changes.items()]
        rows = [(f"{token}.{i}", row) for token in self.tokens.placeholder_tokens
                for i, row in enumerate(self.tokens.parameters(token))]  # fmt: skip
        return [{"params": matrices}, *([{"params": rows, "weight_decay": 0.0}] if rows else [])]

    def weights(self) -> dict[str, Tensor]:
        """W of every matrix, detached."""
        return {name: (base + self.changes[name].change).detach() for name, base in self.base_weights.items()}

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take W of every matrix from elsewhere."""
        with torch.no_grad():
            for name, residual in self.changes.items():
                residual.change.copy_(weights[name].to(residual.change) - self.base_weights[name])

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """Loss of {"instance": {"pixel_values", "mask", "prompt"}} and, with a prior weight > 0, of "class" images."""
        keys, seed, weight = batch["sample_keys"], self.config.seed, self.config.prior_loss_weight
        latents = self._encode_images(batch["instance"]["pixel_values"], keys)
        noised, mask = noise_batch(self.backbone, latents, keys, seed=seed), batch["instance"]["mask"]
        conditioning = self.backbone.encode_prompt(list(batch["instance"]["prompt"]))  # V* gets its gradient here
        if weight > 0:
            seed = derive_seed(seed, REGULARISATION_STREAM)
            regular = noise_batch(self.backbone, batch["class"]["latents"], keys, seed=seed)
            noised = NoisedBatch(**{name: torch.cat([noised[name], regular[name]]) for name in noised})
            with torch.no_grad():
                captions = self.backbone.encode_prompt(list(batch["class"]["prompt"]))
            conditioning = Conditioning.cat([conditioning, captions])
            mask = torch.cat([mask, torch.ones_like(mask)])
        with install(self.backbone.unet, [DetachStartToken()]):
            losses = masked_denoising_loss(self.backbone, noised, conditioning, mask)
        return losses[: len(keys)].mean() + (weight * losses[len(keys) :].mean() if weight > 0 else 0.0)

    def _encode_images(self, pixel_values: Tensor, sample_keys: Tensor) -> Tensor:
        """Latents drawn from the VAE's posterior, (B,4,h,w): each picture has its own scale, so none can be kept."""
        mean, std = posterior_moments(self.backbone, pixel_values)
        noise = seeded_randn(sample_keys, tuple(mean.shape[1:]), seed=self.config.seed, stream="posterior")
        return (mean + std * noise).to(pixel_values.device)

    def generate(
        self,
        prompt: str,
        *,
        seeds: list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Pictures for a prompt such as "photo of a <new1> cat on the beach", one per seed, (B,3,H,W) in [-1,1].

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
            eta=config.eta,
        )

    @torch.no_grad()
    def validation_loss(self, latents: Tensor) -> float:
        """The loss of pictures (B,4,h,w) under "photo of a <new1> cat", with noise and timesteps that never change."""
        conditioning = self.backbone.encode_prompt(self.config.instance_prompt())
        return fixed_noise_validation(self.backbone, latents, conditioning)

    def save(self, folder: Path, *, share: float | None = None) -> None:
        """Write the matrices, one file per word, and artifact.json last. Stock diffusers reads the matrices and words.

        Args: share: write `compress`ed changes instead of whole matrices, 0.6 in the paper; they need the base weights.
        """
        folder = Path(folder)
        header = {"slug": SLUG, "version": "1", "backbone": self.backbone.name}
        if share is None:
            write_changes(folder, header, self.backbone.unet, self.weights())
        else:
            factors = {name: compress(residual.change.detach(), share) for name, residual in self.changes.items()}
            write_changes(folder, header, self.backbone.unet, factors)
        for token in self.tokens.placeholder_tokens:
            self.tokens.export_learned_embeds(folder / f"{token}.safetensors", token, metadata=header)
        text = json.dumps({**header, "share": share, "config": asdict(self.config)}, indent=2)
        atomic_write_text(folder / HEADER, text + "\n")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises: ValueError naming the file if it is of another backbone or setting."""
        found = read_changes(Path(folder), {name: w.shape for name, w in self.base_weights.items()})
        with torch.no_grad():
            for name, value in found.items():
                base, change = self.base_weights[name], self.changes[name].change
                own = value.to(base) - base if isinstance(value, Tensor) else (value[0] @ value[1]).to(base)
                change.copy_(own)
        for token in self.tokens.placeholder_tokens:
            self.set_word(token, read_rows(Path(folder) / f"{token}.safetensors"))

    def set_word(self, token: str, rows: Sequence[Tensor]) -> None:
        """Take V* from elsewhere, (1,D) for each text encoder."""
        with torch.no_grad():
            for own, row in zip(self.tokens.parameters(token), rows, strict=True):
                own.copy_(row)


def load_method(
    artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu"
) -> CustomDiffusion:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: the folder that `save` wrote, or its file of matrices.
        backbone_name: None = the one that it was trained on.
    """
    folder = Path(artifact_path) if Path(artifact_path).is_dir() else Path(artifact_path).parent
    config, header = read_header(folder)
    method = CustomDiffusion(load_backbone(backbone_name or header["backbone"], device=device), config)
    method.load(folder)
    return method

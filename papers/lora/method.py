"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685), in the order of its Section 4, as it personalises diffusion models.

Paper -> here:  W_0 -> weight   A -> down (r, in)   B -> up (out, r)   alpha / r -> scale   h -> output
    Delta W = s B A -> weight_delta(factors)
PEFT computes the layers; the formulas stand here in plain sight, and tests hold both equal. Departures D1 to D6 are in
the card. Sums, averages and SVD of pairs: merging.py. New tokens: pivotal.py. Files of others: formats.py.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.backbones import Backbone, Conditioning, PlaceholderTokens, load_backbone
from common.backbones.adapters import add_lora, export_lora, lora_layers, merge_lora, set_lora_strength, unmerge_lora
from common.data.prompt_cache import PromptCache
from common.io import atomic_write_text, load_safetensors
from common.sampling import sample_images
from common.training.losses import fixed_noise_validation
from common.training.noising import NoisedBatch, noise_batch, timesteps_between
from common.training.seeding import derive_seed

from .config import TEXT_ATTENTION, LoRAConfig
from .formats import Factors, read_diffusers

SLUG = Path(__file__).parent.name
ARTIFACT = "pytorch_lora_weights.safetensors"  # the names that diffusers looks for in a folder
TOKEN = "learned_embeds.safetensors"


def weight_delta(factors: Factors) -> Tensor:
    """Sec. 4.1: Delta W = (alpha / r) B A, in the shape of the weight, (out, in) or (out, in, k, k).

    A convolution k x k to r channels and a 1 x 1 one behind it are one matrix product too. rsLoRA's alpha / sqrt(r) is
    the same thing with another alpha.
    """
    scale = factors.alpha / len(factors.down)
    change = scale * (factors.up.flatten(1) @ factors.down.flatten(1))
    return change.reshape(len(factors.up), *factors.down.shape[1:])


def adapted_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, strength: float = 1.0
) -> Tensor:
    """Eq. 3: h = W_0 x + Delta W x = W_0 x + s B A x, without ever building Delta W.

    Args:
        inputs: x, (..., in).
        weight, bias: W_0 (out, in) and its bias (out,), frozen.
        strength: the scale that is chosen at inference; 0 = the base.
    """
    scale = factors.alpha / len(factors.down)
    return F.linear(inputs, weight, bias) + strength * scale * F.linear(F.linear(inputs, factors.down), factors.up)


def merged_weight(weight: Tensor, factors: Factors, strength: float = 1.0) -> Tensor:
    """Sec. 4.1, "No Additional Inference Latency": W = W_0 + strength * Delta W."""
    return weight + strength * weight_delta(factors)


def mask_weights(masks: Tensor, size: tuple[int, int], temperature: float = 1.0) -> Tensor:
    """(mask + 0.01)^temperature / max, for prediction and target; not in the paper: cloneofsimo/lora.

    Args:
        masks: 1 = subject, (B,1,H,W).
        size: (h, w) of the latents; nearest neighbour.
    Returns: (B,1,h,w); each sample's largest value is 1 (the code divides by the batch's largest).
    """
    weights = (F.interpolate(masks.float(), size=size, mode="nearest") + 0.01) ** temperature
    return weights / weights.amax(dim=(1, 2, 3), keepdim=True)


def denoising_loss(
    backbone: Backbone, noised: NoisedBatch, conditioning: Conditioning, weights: Tensor | None = None
) -> Tensor:
    """||w (model(z_t, t, c) - target)||^2, the loss Stable Diffusion was trained with; one value per sample, (B,)."""
    model_pred = backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning).float()  # (B,4,h,w)
    target = noised["target"].float()
    if weights is not None:
        model_pred, target = weights * model_pred, weights * target
    return F.mse_loss(model_pred, target, reduction="none").flatten(1).mean(1)


class LoRA:
    """Pairs on the attention of a frozen U-Net, and if wanted of the text encoder.

    Args:
        backbone: gets the pairs; everything in it is frozen, learned tokens too.
    """

    def __init__(self, backbone: Backbone, config: LoRAConfig) -> None:
        if config.text_encoder_learning_rate > 0 and backbone.text_encoder_2 is not None:
            raise ValueError(f"{backbone.name} has two text encoders: only the U-Net can be adapted, set the rate to 0")
        self.backbone, self.config = backbone.freeze(), config
        for vectors in () if backbone.placeholders is None else backbone.placeholders.parameters():
            vectors.requires_grad_(False)
        self.originals: dict[str, dict[str, Tensor]] = {}  # weights of before, while merged
        for name, network in self.networks().items():
            layers = config.layers if name == "unet" else TEXT_ATTENTION
            seed = derive_seed(config.seed, "pairs", name)
            add_lora(network, config.rank, alpha=config.alpha, target_modules=layers, init=config.init, seed=seed)
        self._cached_prompts = None if config.text_encoder_learning_rate else PromptCache(backbone)

    def networks(self) -> dict[str, nn.Module]:
        """What has pairs, by its name in the backbone."""
        names = ["unet", "text_encoder"] if self.config.text_encoder_learning_rate else ["unet"]
        return {name: getattr(self.backbone, name) for name in names}

    def parameters(self) -> list[dict[str, Any]]:
        """All A and B, with the learning rate of their network."""
        rates = {"unet": self.config.learning_rate, "text_encoder": self.config.text_encoder_learning_rate}
        groups = []
        for name, network in self.networks().items():
            pairs = [(f"{name}.{key}", p) for key, p in network.named_parameters() if "lora_" in key]
            groups.append({"params": pairs, "lr": rates[name]})
        return groups

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """DreamBooth's loss, for {"instance": {"latents", "prompt", maybe "mask"}, "class": the same if lambda > 0}."""
        loss = self._loss("instance", batch)
        if self.config.prior_loss_weight > 0:
            loss = loss + self.config.prior_loss_weight * self._loss("class", batch)
        return loss

    def _loss(self, part: str, batch: dict[str, Any]) -> Tensor:
        samples, keys = batch[part], batch["sample_keys"]
        last = round(self.config.timestep_share * self.backbone.noise_scheduler.config.num_train_timesteps)
        noised = noise_batch(
            self.backbone, samples["latents"], keys,
            seed=derive_seed(self.config.seed, part), timestep_sampler=timesteps_between(0, last),
        )  # fmt: skip
        masks = samples.get("mask")
        weights = None if masks is None else mask_weights(masks, samples["latents"].shape[-2:])
        return denoising_loss(self.backbone, noised, self.encode(list(samples["prompt"])), weights).mean()

    def encode(self, prompts: list[str]) -> Conditioning:
        """Of B prompts; from a cache where the text encoder is frozen."""
        cache = self._cached_prompts
        return self.backbone.encode_prompt(prompts) if cache is None else cache.batch(prompts)

    def set_strength(self, strength: float) -> None:
        """W + strength * Delta W from now on; 0 = the base, bit for bit; 1 = as trained."""
        if self.originals:
            raise RuntimeError("the pairs are merged into the weights: unmerge() before changing their strength")
        for network in self.networks().values():
            set_lora_strength(network, strength)

    def merge(self) -> None:
        """Write W + strength * Delta W into the weights: as fast as the base, for use without training."""
        for name, network in self.networks().items():
            self.originals[name] = merge_lora(network)

    def unmerge(self) -> None:
        """The weights of before `merge`, bit for bit."""
        for name, originals in self.originals.items():
            unmerge_lora(getattr(self.backbone, name), originals)
        self.originals = {}

    def factors(self) -> dict[str, Factors]:
        """Layer name, "unet.down_blocks.0...to_q", -> its A, B and alpha."""
        return {
            f"{name}.{key}": Factors(
                layer.lora_A["default"].weight.detach().clone(),
                layer.lora_B["default"].weight.detach().clone(),
                float(layer.lora_alpha["default"]),
            )
            for name, network in self.networks().items()
            for key, layer in lora_layers(network).items()
        }

    @torch.no_grad()
    def load_factors(self, factors: Mapping[str, Factors]) -> None:
        """Take over the pairs of another adapter. Another alpha is folded into B, so that Delta W stays what it was.

        Raises: ValueError if layers or shapes are not those of this config.
        """
        own = self.factors()
        if own.keys() != factors.keys():
            strange, lacking = sorted(factors.keys() - own.keys()), sorted(own.keys() - factors.keys())
            counts = f"{len(strange)} unknown {strange[:2]}, {len(lacking)} missing {lacking[:2]}"
            raise ValueError(f"the pairs are of other layers than the config's: {counts}")
        for name, pair in factors.items():
            if pair.down.shape != own[name].down.shape or pair.up.shape != own[name].up.shape:
                shapes = [tuple(t.shape) for t in (pair.down, pair.up, own[name].down, own[name].up)]
                raise ValueError(f"{name} has A {shapes[0]}, B {shapes[1]}; the config gives {shapes[2]}, {shapes[3]}")
            network, _, key = name.partition(".")
            layer = getattr(self.backbone, network).get_submodule(key)
            layer.lora_A["default"].weight.copy_(pair.down)
            layer.lora_B["default"].weight.copy_(pair.up * (pair.alpha / own[name].alpha))

    def generate(
        self,
        prompt: str | None = None,
        *,
        seeds: list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Pictures for a prompt such as "a photo of a sks dog on the beach", one per seed, (B,3,H,W) in [-1,1].

        Args:
            prompt: None = the one of training.
            num_inference_steps, guidance_scale: DDIM steps and s; None = those of the config.
            batch_size: pictures at a time.
        """
        config = self.config
        return sample_images(
            self.backbone,
            config.instance_prompt() if prompt is None else prompt,
            seeds=seeds,
            batch_size=batch_size,
            num_inference_steps=config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
        )

    @torch.no_grad()
    def validation_loss(self, latents: Tensor) -> float:
        """The loss of pictures (B,4,h,w) under the prompt of training, with noise and timesteps that never change."""
        return fixed_noise_validation(self.backbone, latents, self.encode([self.config.instance_prompt()]))

    def save(self, folder: Path) -> None:
        """Write pytorch_lora_weights.safetensors for `pipe.load_lora_weights`, a new token's file, artifact.json."""
        folder, config = Path(folder), self.config
        header = {
            "slug": SLUG,
            "version": "1",
            "backbone": self.backbone.name,
            "class_noun": config.class_noun,
            "identifier": config.identifier,
            "prompt": config.instance_prompt(),
            "config": json.dumps(asdict(config)),
        }
        networks = self.networks()
        export_lora(networks.pop("unet"), folder / ARTIFACT, **networks, metadata=header)
        if config.inversion_steps:
            self.backbone.placeholders.export_learned_embeds(folder / TOKEN, config.identifier, metadata=header)
        atomic_write_text(folder / "artifact.json", json.dumps({**header, "file": ARTIFACT}, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read the pairs that `save` wrote."""
        self.load_factors(read_diffusers(_artifact_file(folder)))


def load_method(
    artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu"
) -> LoRA:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: pytorch_lora_weights.safetensors, or the folder that holds it.
        backbone_name: None = the one that it was trained on.
    """
    path = _artifact_file(artifact_path)
    _, header = load_safetensors(path)
    if "config" not in header:
        raise ValueError(f"{path} was not written by this method; read it with formats.py, or pipe.load_lora_weights")
    settings = json.loads(header["config"])
    config = LoRAConfig(**{**settings, "layers": tuple(settings["layers"])})
    backbone = load_backbone(backbone_name or header["backbone"], device=device)
    if config.inversion_steps:
        PlaceholderTokens(backbone).load_learned_embeds(path.with_name(TOKEN))
    method = LoRA(backbone, config)
    method.load(path)
    return method


def _artifact_file(path: str | Path) -> Path:
    path = Path(path)
    return path / ARTIFACT if path.is_dir() else path

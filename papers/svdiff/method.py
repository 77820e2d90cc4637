"""SVDiff (Han et al., ICCV 2023, arXiv 2303.11305), in the order of its Section 3.

Paper -> here:  W = U Sigma V^T -> left, spectrum, right   delta -> shift   z* -> latents   c* -> conditioning
    lambda -> prior_loss_weight   theta' -> the network with its shifts
`common.backbones.adapters.SpectralShift` computes the layers; the formulas stand here in plain sight, and tests hold
both equal. Departures D1 to D8 are in the card. Cut-Mix-Unmix (Sec. 3.3): cutmix.py.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.backbones import Backbone, Conditioning, load_backbone
from common.backbones.adapters import DenseDelta, SpectralShift, WeightResidual, attach
from common.backbones.attention import install
from common.backbones.attention_hooks import RecordProbabilities
from common.data.prompt_cache import PromptCache
from common.io import atomic_save_safetensors, atomic_write_text, load_safetensors
from common.sampling import sample_images
from common.sampling.inversion import ddim_invert
from common.sampling.sampler import sample_latents, seeded_noise
from common.training.losses import fixed_noise_validation
from common.training.noising import NoisedBatch, noise_batch
from common.training.seeding import derive_seed

from .config import SUBSETS, SVDiffConfig
from .cutmix import batch_unmix_loss

SLUG = Path(__file__).parent.name
ARTIFACT = "spectral_shifts.safetensors"
GEOMETRY = ("unet.down_blocks.2.attentions.1.", "unet.down_blocks.3.", "unet.mid_block.")  # Sec. 4.4: see style_mix

Shifts = Mapping[str, Tensor]  # "unet.mid_block.resnets.0.conv1.weight" -> delta


def shifted_weight(weight: Tensor, shift: Tensor) -> Tensor:
    """Eq. 2: W_delta = U diag(ReLU(sigma + delta)) V^T of the flattened weight; W + delta of a 1-D weight (D1).

    Args:
        weight: (out, in), (out, in, h, w) or (n,).
        shift: (min(out, in * h * w),), or (n,).
    """
    if weight.ndim == 1:
        return weight + shift
    left, spectrum, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    return (left @ torch.diag(F.relu(spectrum + shift)) @ right).reshape(weight.shape)


def denoising_loss(backbone: Backbone, noised: NoisedBatch, conditioning: Conditioning) -> Tensor:
    """The norm in Eq. 3, ||epsilon_theta(z_t | c) - epsilon||^2, as a mean; one value per sample, (B,)."""
    model_pred = backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning)
    return F.mse_loss(model_pred.float(), noised["target"].float(), reduction="none").flatten(1).mean(1)


def prior_preservation_loss(instance_losses: Tensor, class_losses: Tensor, prior_loss_weight: float) -> Tensor:
    """Eq. 3, a scalar; without class samples, (0,), the first term alone."""
    if len(class_losses) == 0:
        return instance_losses.mean()
    return instance_losses.mean() + prior_loss_weight * class_losses.mean()


def add_shifts(first: Shifts, second: Shifts) -> dict[str, Tensor]:
    """Eq. 4: delta' = delta_1 + delta_2, inside the ReLU. Raises: KeyError if they are not of the same weights."""
    _check_same(first, second)
    return {name: shift + second[name] for name, shift in first.items()}


def interpolate_shifts(first: Shifts, second: Shifts, alpha: float) -> dict[str, Tensor]:
    """Eq. 5: delta' = alpha delta_1 + (1 - alpha) delta_2; alpha in [0, 1]."""
    _check_same(first, second)
    return {name: alpha * shift + (1 - alpha) * second[name] for name, shift in first.items()}


def scale_shifts(shifts: Shifts, scale: float) -> dict[str, Tensor]:
    """Scaling (appendix): delta' = s delta, inside the ReLU; 0 = the base."""
    return {name: scale * shift for name, shift in shifts.items()}


def style_mix(geometry: Shifts, appearance: Shifts) -> dict[str, Tensor]:
    """Sec. 4.4: layers (16, down, 1) to (8, down, 0) of one subject, all others of the second.

    In the names of P+ these are the last attention going down and that of the middle; what lies between goes along.
    """
    _check_same(geometry, appearance)
    return {name: (geometry if name.startswith(GEOMETRY) else appearance)[name] for name in geometry}


def shift_correlation(first: Shifts, second: Shifts) -> float:
    """Figure 9a: the cosine of two subjects' shifts in each layer, averaged over layers."""
    _check_same(first, second)
    cosines = [F.cosine_similarity(shift.double(), second[name].double(), dim=0) for name, shift in first.items()]
    return torch.stack(cosines).mean().item()


def slerp(alpha: float, first: Tensor, second: Tensor) -> Tensor:
    """Eq. 7, for each sample: sin((1 - alpha) phi) / sin(phi) first + sin(alpha phi) / sin(phi) second.

    Args:
        alpha: in [0, 1]; 0 = first.
        first, second: (B, ...), of which no pair is parallel.
    """
    shape = (-1, *[1] * (first.ndim - 1))
    phi = torch.acos(F.cosine_similarity(first.flatten(1), second.flatten(1))).reshape(shape)
    return (torch.sin((1 - alpha) * phi) * first + torch.sin(alpha * phi) * second) / torch.sin(phi)


@torch.no_grad()
def edit_image(
    backbone: Backbone,
    pixel_values: Tensor,
    prompt: str,
    *,
    seeds: list[int],
    num_inference_steps: int,
    guidance_scale: float,
    eta: float = 0.0,
    noise_share: float = 0.0,
) -> Tensor:
    """Sec. 3.4: DDIM inversion under the target prompt without guidance (Eq. 6), then sampling from there.

    Args:
        pixel_values: the picture, (1,3,H,W) in [-1,1].
        prompt: c, the edited description.
        seeds: one picture each; they differ only if noise is injected.
        eta: of DDIM, > 0 for structural changes.
        noise_share: alpha of Eq. 7, in [0, 1], for the same purpose.
    Returns: (len(seeds),3,H,W) in [-1,1].
    """
    conditioning = backbone.encode_prompt(prompt)
    latents = backbone.encode_images(pixel_values)
    inverted = ddim_invert(backbone, latents, conditioning, num_inference_steps=num_inference_steps)
    start = inverted.expand(len(seeds), *inverted.shape[1:])
    if noise_share:
        start = slerp(noise_share, start, seeded_noise(backbone, seeds).to(start))
    edited = sample_latents(
        backbone, conditioning, seeds=seeds, latents=start, eta=eta,
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
    )  # fmt: skip
    return backbone.decode_latents(edited).float().cpu()


def _check_same(first: Shifts, second: Shifts) -> None:
    if first.keys() != second.keys():
        raise KeyError(f"the shifts are of different weights, such as {sorted(first.keys() ^ second.keys())[:2]}")


class SVDiff:
    """Spectral shifts on every weight of a frozen U-Net and, if wanted, of the text encoder. Biases stay as they are.

    Args:
        backbone: gets the shifts. Its weights must be loaded: they are decomposed here, in float32.
    """

    def __init__(self, backbone: Backbone, config: SVDiffConfig) -> None:
        self.backbone, self.config = backbone.freeze(), config
        self.residuals: dict[str, WeightResidual] = {}
        self._attached = []
        for name, network in self.networks().items():
            chosen = SUBSETS[config.subset] if name == "unet" else SUBSETS["UNet"]
            residuals = {
                key: SpectralShift(weight) if weight.ndim > 1 else DenseDelta(torch.zeros_like(weight).float())
                for key, weight in network.named_parameters()
                if key.endswith(".weight") and chosen(key, weight.ndim)
            }
            self._attached.append(attach(residuals, network))
            self.residuals |= {f"{name}.{key}": residual for key, residual in residuals.items()}
        self._cached_prompts = None if config.train_text_encoder else PromptCache(backbone)

    def networks(self) -> dict[str, nn.Module]:
        """What is shifted, by its name in the backbone."""
        names = ["unet"]
        if self.config.train_text_encoder:
            names += ["text_encoder", "text_encoder_2"][: len(self.backbone.text_encoders)]
        return {name: getattr(self.backbone, name) for name in names}

    def parameters(self) -> list[dict[str, Any]]:
        """Shifts, and the changes of 1-D weights with a learning rate of their own and without decay (D2)."""
        spectral = [(name, r.shift) for name, r in self.residuals.items() if isinstance(r, SpectralShift)]
        norms = [(name, r.change) for name, r in self.residuals.items() if isinstance(r, DenseDelta)]
        groups = [
            {"params": spectral, "lr": self.config.learning_rate},
            {"params": norms, "lr": self.config.norm_learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """Eq. 3 for {"instance": {"latents", "prompt"}, "class": the same if lambda > 0, "sides": see cutmix.py}, plus
        the attention loss of collages."""
        config, keys = self.config, batch["sample_keys"]
        names = ["instance", "class"] if config.prior_loss_weight > 0 else ["instance"]
        parts = [noise_batch(self.backbone, batch[n]["latents"], keys, seed=derive_seed(config.seed, n)) for n in names]
        noised = NoisedBatch(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        prompts = [prompt for name in names for prompt in batch[name]["prompt"]]
        grids = {(size, size) for size in config.unmix_resolutions}
        recorder = RecordProbabilities(lambda layer: layer.kind == "cross" and layer.resolution in grids)
        unmix = config.unmix_loss_weight > 0 and bool((batch["sides"] >= 0).any())
        with install(self.backbone.unet, [recorder]) if unmix else nullcontext():
            losses = denoising_loss(self.backbone, noised, self.encode(prompts))
        loss = prior_preservation_loss(losses[: len(keys)], losses[len(keys) :], config.prior_loss_weight)
        if unmix:
            words = config.identifiers[: len(config.class_nouns)]
            maps = {layer.resolution: [] for layer in recorder.by_layer}
            for layer, probabilities in recorder.by_layer.items():
                maps[layer.resolution].append(probabilities[: len(keys)])
            loss = loss + config.unmix_loss_weight * batch_unmix_loss(
                maps, self.backbone.tokenizer, prompts[: len(keys)], words, batch["sides"]
            )
        return loss

    def encode(self, prompts: list[str]) -> Conditioning:
        """Of B prompts; from a cache where the text encoder is frozen."""
        cache = self._cached_prompts
        return self.backbone.encode_prompt(prompts) if cache is None else cache.batch(prompts)

    def shifts(self) -> dict[str, Tensor]:
        """Name of each weight -> its delta, (min(out, in * h * w),) or (n,)."""
        return {name: next(r.parameters()).detach().clone() for name, r in self.residuals.items()}

    @torch.no_grad()
    def load_shifts(self, shifts: Shifts) -> None:
        """Take over the deltas of another run, or a mixture of several.

        Raises: ValueError if they are of other weights or sizes than the config's.
        """
        own = {name: next(r.parameters()) for name, r in self.residuals.items()}
        wrong = own.keys() ^ shifts.keys() or {n for n, shift in shifts.items() if shift.shape != own[n].shape}
        if wrong:
            raise ValueError(
                f"the shifts do not fit this backbone and config: {len(wrong)} differ, {sorted(wrong)[:2]}"
            )
        for name, shift in shifts.items():
            own[name].copy_(shift)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside the block W_delta stands in the weights, as fast as the base; afterwards W does, bit for bit."""
        with ExitStack() as stack:
            for attached in self._attached:
                attached.merge()
                stack.callback(attached.unmerge)
            yield

    def generate(
        self,
        prompt: str | None = None,
        *,
        seeds: list[int],
        negative_prompt: str = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Pictures for a prompt such as "a sks dog sitting beside a ktn cat", one per seed, (B,3,H,W) in [-1,1].

        Args:
            prompt: None = the first of training.
            negative_prompt: can lessen seams after Cut-Mix-Unmix (Sec. 3.3).
            num_inference_steps, guidance_scale: DDIM steps and s; None = those of the config.
            batch_size: pictures at a time.
        """
        with self.merged():
            return sample_images(
                self.backbone,
                self.config.instance_prompts()[0] if prompt is None else prompt,
                seeds=seeds,
                negative_prompt=negative_prompt,
                batch_size=batch_size,
                **self._sampling(num_inference_steps, guidance_scale),
            )

    def edit(self, pixel_values: Tensor, prompt: str, *, seeds: list[int], **noise: float) -> Tensor:
        """`edit_image` with the shifted weights; noise: eta, noise_share."""
        with self.merged():
            return edit_image(self.backbone, pixel_values, prompt, seeds=seeds, **self._sampling(), **noise)

    def _sampling(self, num_inference_steps: int | None = None, guidance_scale: float | None = None) -> dict[str, Any]:
        config = self.config
        return {
            "num_inference_steps": config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            "guidance_scale": config.guidance_scale if guidance_scale is None else guidance_scale,
        }

    @torch.no_grad()
    def validation_loss(self, latents: Tensor) -> float:
        """Eq. 3 without prior, of pictures (B,4,h,w) under the first prompt; noise and timesteps never change."""
        with self.merged():
            conditioning = self.backbone.encode_prompt(self.config.instance_prompts()[0])
            return fixed_noise_validation(self.backbone, latents, conditioning)

    def save(self, folder: Path) -> None:
        """Write spectral_shifts.safetensors, {name of the weight: delta}, and artifact.json."""
        folder, config = Path(folder), self.config
        header = {
            "slug": SLUG,
            "version": "1",
            "backbone": self.backbone.name,
            "class_noun": " ".join(config.class_nouns),
            "identifier": " ".join(config.identifiers[: len(config.class_nouns)]),
            "prompt": config.instance_prompts()[0],
            "config": json.dumps(asdict(config)),
        }
        atomic_save_safetensors(self.shifts(), folder / ARTIFACT, header)
        atomic_write_text(folder / "artifact.json", json.dumps({**header, "file": ARTIFACT}, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read the shifts that `save` wrote."""
        self.load_shifts(load_safetensors(_artifact_file(folder))[0])


def load_method(
    artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu"
) -> SVDiff:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: spectral_shifts.safetensors, or the folder that holds it.
        backbone_name: None = the one that it was trained on. Shifts belong to the singular vectors of its weights.
    """
    path = _artifact_file(artifact_path)
    shifts, header = load_safetensors(path)
    if "config" not in header:
        raise ValueError(f"{path} was not written by this method: its header has no config")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(header["config"]).items()}
    method = SVDiff(load_backbone(backbone_name or header["backbone"], device=device), SVDiffConfig(**settings))
    method.load_shifts(shifts)
    return method


def _artifact_file(path: str | Path) -> Path:
    path = Path(path)
    return path / ARTIFACT if path.is_dir() else path

"""Latents computed once: the VAE posterior of every variant of every picture, in memory and, if wanted, on disk."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

import PIL
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.data.image_folder import ImageFolder
from common.data.images import PREPROCESSING_VERSION
from common.io import atomic_save_safetensors, load_safetensors

if TYPE_CHECKING:
    from common.backbones import Backbone


class LatentCache:
    """Posterior mean and standard deviation of each variant (crop x flip) of each picture of a folder.

    Both are kept, so that training still samples the posterior as if it encoded the picture at every step. Each variant
    is encoded alone, so its numbers do not depend on what else was missing in the cache.

    Args:
        folder: the pictures.
        backbone: its VAE encodes them, once, here, in float32 whatever its dtype; it is not kept.
        cache_dir: where to keep the latents between runs, one file per picture; None = in memory only. A file is named
            by a hash of the picture's bytes, the preprocessing and the VAE's weights, so a stale one is never read.
    Attributes:
        folder: as given.
        masks: for each picture (V,1,H,W) uint8, 0 or 1; None without masks.
    Raises: ValueError naming the picture if the VAE gives numbers that are not finite.
    """

    def __init__(self, folder: ImageFolder, backbone: "Backbone", *, cache_dir: str | Path | None = None):
        self.folder = folder
        with in_float32(backbone.vae):
            vae_hash = module_hash(backbone.vae)
            moments = [
                _moments(folder, index, backbone, vae_hash, None if cache_dir is None else Path(cache_dir))
                for index in tqdm(range(len(folder)), desc="encoding images", leave=False, disable=None)
            ]
        self._means, self._stds = [mean for mean, _ in moments], [std for _, std in moments]
        self.masks = None
        if folder.mask_paths:
            self.masks = [folder.masks(index, folder.variants(index)).to(torch.uint8) for index in range(len(folder))]

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._means)

    def num_variants(self, index: int) -> int:
        """Number of variants of one picture; number 0 is the centre crop, unflipped (see `ImageFolder.variants`)."""
        return len(self._means[index])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, (4, h, w)."""
        return tuple(self._means[0].shape[1:])

    def latents(self, index: int, variant: int = 0, noise: Tensor | None = None) -> Tensor:
        """Scaled latents of one variant, (4,h,w) float32 on the CPU.

        Args:
            index: picture.
            variant: 0 <= variant < num_variants(index).
            noise: standard normal, (4,h,w), to sample the posterior: mean + std * noise. None gives the mean.
        """
        mean = self._means[index][variant]
        return mean.clone() if noise is None else mean + self._stds[index][variant] * noise


@torch.no_grad()
def posterior_moments(backbone: "Backbone", pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents, each (B,4,h,w) float32 on the CPU.

    Args:
        pixel_values: (B,3,H,W) in [-1,1].
    """
    config = backbone.vae.config
    posterior = backbone.vae.encode(pixel_values.to(backbone.device, backbone.vae.dtype)).latent_dist
    mean = (posterior.mean.float() - (config.shift_factor or 0.0)) * config.scaling_factor
    return mean.cpu(), (posterior.std.float() * config.scaling_factor).cpu()


def module_hash(module: nn.Module) -> str:
    """Hash of a diffusers module's configuration and weights (names, types and bits), on whatever device they are."""
    config = {name: value for name, value in dict(module.config).items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def in_float32(vae: nn.Module) -> Iterator[None]:
    """The VAE in float32 inside the block: SDXL's overflows in float16. To float32 and back changes no bit."""
    dtype = vae.dtype
    try:
        nn.Module.to(vae, dtype=torch.float32)  # not diffusers' own, which warns
        yield
    finally:
        nn.Module.to(vae, dtype=dtype)


def _moments(
    folder: ImageFolder, index: int, backbone: "Backbone", vae_hash: str, cache_dir: Path | None
) -> tuple[Tensor, Tensor]:
    """Of all variants of one picture, each (V,4,h,w), from the disk if they are there."""
    if cache_dir is None:
        return _encode(folder, index, backbone)
    origin = {
        "image_sha256": hashlib.sha256(folder.paths[index].read_bytes()).hexdigest(),
        "preprocessing": f"{PREPROCESSING_VERSION}, Pillow {PIL.__version__}, {folder.resolution_px} px",
        "variants": json.dumps([astuple(variant) for variant in folder.variants(index)]),
        "vae_sha256": vae_hash,
    }
    path = cache_dir / f"{hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:40]}.safetensors"
    if path.is_file():
        try:
            tensors, _ = load_safetensors(path)
            return tensors["mean"], tensors["std"]
        except (ValueError, KeyError) as error:
            warnings.warn(f"computing latents again: {error}", stacklevel=4)
    mean, std = _encode(folder, index, backbone)
    atomic_save_safetensors({"mean": mean, "std": std}, path, origin)
    return mean, std


def _encode(folder: ImageFolder, index: int, backbone: "Backbone") -> tuple[Tensor, Tensor]:
    pixel_values = folder.pixel_values(index, folder.variants(index))
    moments = [posterior_moments(backbone, variant[None]) for variant in pixel_values]
    mean, std = (torch.cat(parts) for parts in zip(*moments, strict=True))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError(
            f"the VAE gives latents that are not finite for {str(folder.paths[index])!r}; check its weights"
        )
    return mean, std

"""Latents of clips computed once: the VAE posterior of every frame, in memory and, if wanted, on disk."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import decord
import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from common.data.clip_folder import ClipFolder
from common.data.frame_sequences import frame_files
from common.data.frame_windows import spread_windows
from common.data.latent_cache import in_float32, module_hash, posterior_moments
from common.data.videos import VIDEO_PREPROCESSING_VERSION
from common.io import atomic_save_safetensors, load_safetensors

if TYPE_CHECKING:
    from common.backbones import Backbone

_CHUNK_FRAMES = 8  # frames that the VAE encodes at once; part of what a cache file is named by


class ClipLatents:
    """Posterior mean and standard deviation of every frame of a few windows of each video of a folder.

    Both are kept, so that training still samples the posterior as if it encoded the clip at every step.

    Args:
        folder: the videos.
        backbone: its image VAE encodes them frame by frame, once, here, in float32 whatever its dtype; it is not kept.
        num_windows: of each video, evenly spread over it, the first one first; fewer where fewer fit.
        cache_dir: where to keep the latents between runs, one file per window; None = in memory only. A file is named
            by a hash of the video's bytes, the window, the preprocessing and the VAE's weights, so a stale one is
            never read.
    Attributes:
        folder: as given.
        windows: for each video (W,F) int64, the frames that are encoded.
    Raises: ValueError naming the video if the VAE gives numbers that are not finite.
    """

    def __init__(
        self,
        folder: ClipFolder,
        backbone: "Backbone",
        *,
        num_windows: int = 1,
        cache_dir: str | Path | None = None,
    ):
        self.folder = folder
        self.windows = [spread_windows(windows, num_windows) for windows in folder.windows]
        self._means: list[list[Tensor]] = []
        self._stds: list[list[Tensor]] = []
        with in_float32(backbone.vae):
            vae_hash = None if cache_dir is None else module_hash(backbone.vae)
            for index in tqdm(range(len(folder)), desc="encoding clips", leave=False, disable=None):
                if cache_dir is None:
                    moments = [_encode(folder, index, window, backbone) for window in self.windows[index]]
                else:
                    origin = _origin(folder, index) | {"vae_sha256": vae_hash}
                    moments = [
                        _from_disk(folder, index, window, backbone, origin, Path(cache_dir))
                        for window in self.windows[index]
                    ]
                self._means.append([mean for mean, _ in moments])
                self._stds.append([std for _, std in moments])

    def __len__(self) -> int:
        """Number of videos."""
        return len(self._means)

    def num_windows(self, index: int) -> int:
        """Number of windows of one video; number 0 is the first that fits."""
        return len(self._means[index])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents of one window, (4, F, h, w)."""
        return tuple(self._means[0][0].shape)

    def latents(self, index: int, window: int = 0, noise: Tensor | None = None) -> Tensor:
        """Scaled latents of one window, (4,F,h,w) float32 on the CPU.

        Args:
            index: video.
            window: 0 <= window < num_windows(index).
            noise: standard normal, (4,F,h,w), to sample the posterior: mean + std * noise. None gives the mean.
        """
        mean = self._means[index][window]
        return mean.clone() if noise is None else mean + self._stds[index][window] * noise


def _encode(folder: ClipFolder, index: int, window: np.ndarray, backbone: "Backbone") -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of one window, each (4,F,h,w)."""
    frames = folder.clip(index, window).transpose(0, 1)  # (F,3,H,W)
    moments = [posterior_moments(backbone, chunk) for chunk in frames.split(_CHUNK_FRAMES)]
    mean, std = (torch.cat(parts).transpose(0, 1).contiguous() for parts in zip(*moments, strict=True))
    if not (mean.isfinite().all() and std.isfinite().all()):
        path = str(folder.videos[index].path)
        raise ValueError(f"the VAE gives latents that are not finite for {path!r}; check its weights")
    return mean, std


def _from_disk(
    folder: ClipFolder, index: int, window: np.ndarray, backbone: "Backbone", origin: dict[str, str], cache_dir: Path
) -> tuple[Tensor, Tensor]:
    """As `_encode`, from the cache if it is there, else put there."""
    origin = origin | {"window": json.dumps(window.tolist())}
    path = cache_dir / f"{hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:40]}.safetensors"
    if path.is_file():
        try:
            tensors, _ = load_safetensors(path)
            return tensors["mean"], tensors["std"]
        except (ValueError, KeyError) as error:
            warnings.warn(f"computing latents again: {error}", stacklevel=3)
    mean, std = _encode(folder, index, window, backbone)
    atomic_save_safetensors({"mean": mean, "std": std}, path, origin)
    return mean, std


def _origin(folder: ClipFolder, index: int) -> dict[str, str]:
    """What the frames of one video depend on."""
    path = folder.videos[index].path
    digest = hashlib.sha256()
    for file_path in frame_files(path) if path.is_dir() else [path]:
        with open(file_path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "video_sha256": digest.hexdigest(),
        "preprocessing": f"{VIDEO_PREPROCESSING_VERSION}, Pillow {PIL.__version__}, decord {decord.__version__}, "
        f"{folder.height_px} x {folder.width_px} px, {_CHUNK_FRAMES} frames at once",
    }

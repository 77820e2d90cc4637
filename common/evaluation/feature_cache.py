"""Embeddings are computed once for each picture and encoder, and kept in one file for each encoder.

Beside them lies the embedding of one fixed picture: a file whose encoder was trained anew since is not used.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.evaluation.encoders import ImageEncoder, encoder_id
from common.io import atomic_save_safetensors, load_safetensors

_PROBE = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
_PROBE_KEY = "probe"


class FeatureCache:
    """Unit vectors of pictures, by content of the picture (rounded to 8 bits) and id of the encoder.

    Args: folder: where the files are kept; None = in memory only.
    """

    def __init__(self, folder: str | Path | None = None, batch_size: int = 64) -> None:
        self.folder = None if folder is None else Path(folder)
        self.batch_size = batch_size
        self._known: dict[str, dict[str, Tensor]] = {}  # encoder id -> picture hash -> (D,)

    def embed(self, encoder: ImageEncoder, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Unit vectors (N,D) of N pictures (3,H,W) in [-1,1], which may differ in size."""
        name = encoder_id(encoder)
        known = self._features(encoder, name)
        images = list(images)
        keys = [picture_hash(image) for image in images]
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in known}
        for batch in _same_shape_batches(list(missing.items()), self.batch_size):
            features = encoder.embed_images(torch.stack([image for _, image in batch]))
            known.update((key, row.float().cpu()) for (key, _), row in zip(batch, features, strict=True))
        if missing and self.folder is not None:
            atomic_save_safetensors(known, self._path(name), {"encoder": name})
        return torch.stack([known[key] for key in keys])

    def _features(self, encoder: ImageEncoder, name: str) -> dict[str, Tensor]:
        if name not in self._known:
            probe = encoder.embed_images(_PROBE)[0].float().cpu()
            stored = load_safetensors(self._path(name))[0] if self.folder and self._path(name).is_file() else {}
            old_probe = stored.get(_PROBE_KEY, probe.new_zeros(0))
            same = old_probe.shape == probe.shape and torch.allclose(old_probe, probe, rtol=0, atol=1e-4)
            self._known[name] = stored if same else {_PROBE_KEY: probe}
        return self._known[name]

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"


def picture_hash(image: Tensor) -> str:
    """SHA-256 of a picture (3,H,W) in [-1,1] as 8-bit RGB, its size included."""
    levels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().contiguous()
    return hashlib.sha256(str(tuple(levels.shape)).encode() + levels.numpy().tobytes()).hexdigest()


def _same_shape_batches(items: list[tuple[str, Tensor]], size: int) -> list[list[tuple[str, Tensor]]]:
    shapes: dict[torch.Size, list[tuple[str, Tensor]]] = {}
    for item in items:
        shapes.setdefault(item[1].shape, []).append(item)
    return [group[i : i + size] for group in shapes.values() for i in range(0, len(group), size)]

"""Scales of the subject's pictures (Sec. 3.1, "Training details"), and the pictures as training reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from common.data.image_folder import ImageFolder
from common.data.images import Variant, crop_square, load_image, to_pixel_values
from common.training.seeding import derive_seed, seeded_generator

SMALL, LARGE = ("a far away ", "very small "), ("zoomed in ", "close up ")  # put before the caption (code)
MIN_LATENT_SIZE = 9  # a third of it is 3 latents, of which 1 is no edge


@dataclass(frozen=True)
class Placement:
    """How large a picture is drawn and where, in pixels of a canvas of `size_px`.

    side_px: < size_px: shrunken, its corner at (top_px, left_px) of the canvas; > size_px: enlarged, the canvas is cut
        out of it at (top_px, left_px).
    """

    side_px: int
    top_px: int = 0
    left_px: int = 0
    prefix: str = ""


def draw_placement(size_px: int, generator: torch.Generator) -> Placement:
    """Scale, place and caption prefix of one sample (D4).

    Two times of three s ~ U[size/3, size], otherwise s ~ U[1.2 size, 1.4 size), both whole and even. Below 0.6 size the
    picture is pasted small, between 0.6 size and size it is left as it is, above it is cut.
    """

    def integer(low: int, high: int) -> int:  # low <= n < high
        return int(torch.randint(low, high, (), generator=generator))

    if integer(0, 3) < 2:
        side = integer(size_px // 3, size_px + 1)
    else:
        side = integer(int(1.2 * size_px), int(1.4 * size_px))
    side += side % 2
    if 0.6 * size_px <= side <= size_px:
        return Placement(size_px)
    room = abs(size_px - side) + 1
    return Placement(side, integer(0, room), integer(0, room), (SMALL if side < size_px else LARGE)[integer(0, 2)])


def place(square: Image.Image, placement: Placement, size_px: int, latent_size: int) -> tuple[Tensor, Tensor]:
    """A square picture drawn as a placement says, and where its latents are to be learned.

    Returns: pixel_values (3,size,size) in [-1,1], 0 (grey) around a shrunken picture; mask (1,latent,latent), 1 inside
        it but for one latent at each edge, 1 everywhere for other pictures.
    """
    side, top, left = placement.side_px, placement.top_px, placement.left_px
    pixels = to_pixel_values(square.resize((side, side), Image.Resampling.BICUBIC))
    if side >= size_px:
        return pixels[:, top : top + size_px, left : left + size_px], torch.ones(1, latent_size, latent_size)
    canvas, mask = torch.zeros(3, size_px, size_px), torch.zeros(1, latent_size, latent_size)
    canvas[:, top : top + side, left : left + side] = pixels
    f = size_px // latent_size
    mask[:, top // f + 1 : (top + side) // f - 1, left // f + 1 : (left + side) // f - 1] = 1
    return canvas, mask


class ConceptDataset(Dataset):
    """A subject's pictures with its prompt, each sample at a scale of its own.

    Items: {"pixel_values": (3,H,W), "mask": (1,h,w), "prompt": str, "image_index": int}. `dataset[index]` is the plain
    picture.

    Args:
        folder: the pictures, at the backbone's resolution.
        prompt: "photo of a <new1> cat".
        latent_size: h = w.
        scale, flip: whether samples are scaled, and half of them mirrored.
        seed: of all draws; two datasets of one run need two seeds.
    Raises: ValueError if latents are so few that nothing of a shrunken picture is left inside its edge.
    """

    def __init__(
        self, folder: ImageFolder, prompt: str, *, latent_size: int, scale: bool, flip: bool, seed: int
    ) -> None:
        if scale and latent_size < MIN_LATENT_SIZE:
            raise ValueError(
                f"scale_augmentation needs {MIN_LATENT_SIZE} latents a side, not {latent_size}: switch it off"
            )
        self.folder, self.prompt, self.latent_size = folder, prompt, latent_size
        self.scale, self.flip, self.seed = scale, flip, seed

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._item(index, Placement(self.folder.resolution_px), flip=False)

    def sample(self, index: int, sample_key: int) -> dict[str, Any]:
        """Picture `index` as sample `sample_key` of a run shows it: a pure function of (seed, index, sample_key)."""
        size = self.folder.resolution_px
        flip = self.flip and derive_seed(self.seed, "flip", sample_key) % 2 == 1
        generator = seeded_generator(self.seed, "scale", sample_key)
        return self._item(index, draw_placement(size, generator) if self.scale else Placement(size), flip=flip)

    def _item(self, index: int, placement: Placement, *, flip: bool) -> dict[str, Any]:
        image, size = load_image(self.folder.paths[index]), self.folder.resolution_px
        square = crop_square(image, max(size, placement.side_px), Variant(flip=flip))
        pixel_values, mask = place(square, placement, size, self.latent_size)
        prompt = placement.prefix + (self.prompt.removeprefix("a ") if placement.prefix else self.prompt)
        return {"pixel_values": pixel_values, "mask": mask, "prompt": prompt, "image_index": index}


class PooledDataset(Dataset):
    """Several datasets one after another, for training several concepts together (Sec. 3.2, "Joint training")."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = list(parts)
        self.places = [(part, i) for part in parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, i = self.places[index]
        return part[i]

    def sample(self, index: int, sample_key: int) -> dict[str, Any]:
        """The `sample` of the dataset that holds this index."""
        part, i = self.places[index]
        return part.sample(i, sample_key)

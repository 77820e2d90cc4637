"""A folder of pictures, in a fixed order, with optional captions and masks."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data.captions import CAPTION_TABLES, read_captions
from common.data.files import existing_folder, list_files, name_key
from common.data.images import BadImage, Variant, crop_square, load_image, to_pixel_values
from common.data.masks import crop_mask, load_mask


class ImageFolder(Dataset):
    """Pictures of a folder and its sub-folders, sorted by path; each is decoded once here, so that errors come early.

    Items: {"pixel_values": (3,H,W) float32 in [-1,1], "path": str} and, where there are any, "mask": (1,H,W) 0 or 1
    and "caption": str. `folder[i]` is the centre crop; `folder.item(i, variant)` one of `folder.variants(i)`.

    Args:
        root: the folder. Hidden files are passed over; NAME.txt beside NAME.jpg, metadata.jsonl and captions.json are
            captions; anything else must be a picture, whatever its suffix.
        resolution_px: side of the square items, in pixels.
        num_crops: squares along the longer side of a picture that is not square; 1 = centre.
        flip: whether mirrored variants are offered too.
        masks: folder of masks, each named as its picture up to the suffix (same sub-folder); one for every picture.
        captions: folder of the caption files; None = root.
        other_files: names of files that are no pictures, such as a table of the caller's own.
        skip_bad_images: leave unusable files out with a warning; they are listed in `skipped`.
    Raises: BadImage naming the first unusable file; ValueError if nothing usable is left, or if captions are
        incomplete; FileNotFoundError if a folder is not there.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        resolution_px: int,
        num_crops: int = 1,
        flip: bool = False,
        masks: str | Path | None = None,
        captions: str | Path | None = None,
        other_files: Sequence[str] = (),
        skip_bad_images: bool = False,
    ):
        if resolution_px < 1 or num_crops < 1:
            raise ValueError(f"resolution_px and num_crops must be >= 1, got {resolution_px} and {num_crops}")
        self.root, self.resolution_px, self.num_crops, self.flip = existing_folder(root), resolution_px, num_crops, flip
        mask_root = None if masks is None else existing_folder(masks)
        caption_root = self.root if captions is None else existing_folder(captions)
        self.paths: list[Path] = []
        self.mask_paths: list[Path] = []
        self.sizes_px: list[tuple[int, int]] = []  # (width, height), upright
        self.skipped: list[BadImage] = []
        masks_by_stem = {} if mask_root is None else _masks_by_stem(mask_root)
        apart = [caption_root] if mask_root is None else [caption_root, mask_root]
        for path in _picture_files(self.root, apart, {*CAPTION_TABLES, *other_files}):
            try:
                size_px = load_image(path).size
                if mask_root is not None:
                    mask_path = _mask_for(path, self.root, mask_root, masks_by_stem)
                    load_mask(mask_path, size_px)
                    self.mask_paths.append(mask_path)
            except BadImage as error:
                if not skip_bad_images:
                    raise BadImage(
                        error.path, f"{error.reason}; or pass skip_bad_images=True (--skip-bad-images)"
                    ) from error
                self.skipped.append(error)
                continue
            self.paths.append(path)
            self.sizes_px.append(size_px)
        self._report()
        self.captions = read_captions(caption_root, self.root, self.paths)

    def _report(self) -> None:
        skipped = "".join(f"\n  {error}" for error in self.skipped)
        if not self.paths:
            found = f"none of its files can be used:{skipped}" if skipped else "it holds no file that could be one"
            raise ValueError(f"no image in {str(self.root)!r}: {found}")
        if skipped:
            total = len(self.paths) + len(self.skipped)
            warnings.warn(f"skipped {len(self.skipped)} of {total} files:{skipped}", stacklevel=3)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        return self.item(index, Variant())

    def item(self, index: int, variant: Variant) -> dict:
        """One picture, cut as `variant` says."""
        item = {"pixel_values": self.pixel_values(index, [variant])[0], "path": str(self.paths[index])}
        if self.mask_paths:
            item["mask"] = self.masks(index, [variant])[0]
        if self.captions is not None:
            item["caption"] = self.captions[index]
        return item

    def pixel_values(self, index: int, variants: Sequence[Variant]) -> Tensor:
        """Several variants of one picture, decoded once: (V,3,H,W) float32 in [-1,1]."""
        image = load_image(self.paths[index])
        return torch.stack([to_pixel_values(crop_square(image, self.resolution_px, variant)) for variant in variants])

    def masks(self, index: int, variants: Sequence[Variant]) -> Tensor:
        """The masks of the same variants, (V,1,H,W) float32, 0 or 1."""
        mask = load_mask(self.mask_paths[index], self.sizes_px[index])
        return torch.stack([crop_mask(mask, self.resolution_px, variant) for variant in variants])

    def variants(self, index: int) -> list[Variant]:
        """The distinct variants of one picture; the first is the centre crop (or the one nearest to it), unflipped."""
        width, height = self.sizes_px[index]
        n = self.num_crops if width != height else 1
        positions = [0.5] if n == 1 else sorted((i / (n - 1) for i in range(n)), key=lambda p: abs(p - 0.5))
        flips = [False, True] if self.flip else [False]
        return [Variant(position, flip) for flip in flips for position in positions]


def _picture_files(root: Path, apart: list[Path], tables: set[str]) -> list[Path]:
    """All files that have to be pictures: no table, no NAME.txt of a picture NAME, nothing in `apart`."""
    apart = [folder.resolve() for folder in apart if folder.resolve() != root.resolve()]
    files = [
        path
        for path in list_files(root)
        if path.name not in tables and not any(path.parent.resolve().is_relative_to(folder) for folder in apart)
    ]
    captioned = {name_key(path.with_suffix("")) for path in files if path.suffix.lower() != ".txt"}
    return [path for path in files if path.suffix.lower() != ".txt" or name_key(path.with_suffix("")) not in captioned]


def _masks_by_stem(mask_root: Path) -> dict[str, Path]:
    by_stem: dict[str, Path] = {}
    for path in list_files(mask_root):
        stem = name_key(path.relative_to(mask_root).with_suffix(""))
        if stem in by_stem:
            raise ValueError(f"{str(by_stem[stem])!r} and {str(path)!r} are both masks of {stem!r}; remove one")
        by_stem[stem] = path
    return by_stem


def _mask_for(path: Path, root: Path, mask_root: Path, by_stem: dict[str, Path]) -> Path:
    stem = name_key(path.relative_to(root).with_suffix(""))
    if stem not in by_stem:
        raise BadImage(path, f"it has no mask; put one at {str(mask_root / stem) + '.png'!r}")
    return by_stem[stem]

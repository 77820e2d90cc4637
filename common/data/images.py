"""One picture file -> an upright 8-bit sRGB picture -> a square crop -> pixel_values."""

import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

MAX_IMAGE_PX = 128_000_000  # width * height; 384 MB as RGB, more than any camera in a single shot usually gives
PREPROCESSING_VERSION = 1  # raise it when the same file would give other pixel_values; cached latents depend on it

_UPRIGHT = {  # EXIF orientation -> what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """A file that cannot be used as a picture; the message names the file, the reason and the way out."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"cannot use {str(path)!r} as an image: {reason}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True)
class Variant:
    """One way to cut a square out of a picture.

    position: of the square along the picture's longer side, 0 = left or top, 0.5 = centre, 1 = right or bottom.
    flip: mirrored left to right, after cropping.
    """

    position: float = 0.5
    flip: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.position <= 1:
            raise ValueError(f"position must be in [0, 1], got {self.position}")


def load_image(path: str | Path) -> Image.Image:
    """Read a picture as a viewer shows it: upright, first frame, on white where transparent, 8-bit sRGB.

    EXIF orientation is applied. Alpha is composited on white. 16-bit grey is scaled by 255/65535. An embedded RGB or
    CMYK colour profile is converted to sRGB; a profile that cannot be read is ignored, as viewers do.

    Raises: BadImage if the file is missing, empty, truncated, larger than MAX_IMAGE_PX, or not a picture.
    """
    image = open_upright(path)
    try:
        profile = image.info.get("icc_profile")
        image = _on_white(_eight_bit(image, path))
        return _to_srgb(image, profile)
    except BadImage:
        raise
    except ValueError as error:
        raise BadImage(path, f"mode {image.mode} has no conversion to RGB; save it as RGB") from error


def open_upright(path: str | Path) -> Image.Image:
    """The first frame, decoded and turned upright, in the mode in which the file stores it. Raises: BadImage."""
    path = Path(path)
    if not path.is_file():
        raise BadImage(path, "there is no such file (a broken link, or a wrong path)")
    try:
        if path.stat().st_size == 0:
            raise BadImage(path, "the file is empty (0 bytes); copy or download it again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_IMAGE_PX below decides
            with Image.open(path) as image:
                _check_size(image, path)
                image.load()
                orientation = image.getexif().get(0x0112)
                upright = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image.copy()
                upright.info = dict(image.info)
                return upright
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(path, f"it is larger than the limit of {MAX_IMAGE_PX:,} px; scale it down") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage(path, _not_an_image(path)) from error
    except MemoryError as error:
        raise BadImage(path, "it does not fit into memory; scale it down") from error
    except Exception as error:  # what a decoder raises on broken data is not documented: OSError, SyntaxError, zlib...
        raise BadImage(
            path, f"it is truncated or damaged ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def crop_square(
    image: Image.Image,
    resolution_px: int,
    variant: Variant = Variant(),  # noqa: B008 (frozen)
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """The largest square of a picture, scaled to (resolution_px, resolution_px) with antialiasing.

    Cropping and scaling are one step, so a very long picture is never scaled as a whole.
    """
    width, height = image.size
    side = min(width, height)
    left, top = round((width - side) * variant.position), round((height - side) * variant.position)
    square = image.resize((resolution_px, resolution_px), resample, box=(left, top, left + side, top + side))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if variant.flip else square


def to_pixel_values(image: Image.Image) -> Tensor:
    """RGB picture -> pixel_values (3,H,W) float32 in [-1,1]; 0 -> -1, 255 -> 1."""
    array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def _check_size(image: Image.Image, path: Path) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PX:
        raise BadImage(
            path, f"{width} x {height} = {width * height:,} px is over the limit of {MAX_IMAGE_PX:,} px; scale it down"
        )


def _not_an_image(path: Path) -> str:
    if path.suffix.lower() in {".heic", ".heif"}:
        return "HEIC pictures are not read; convert it to JPEG or PNG"
    return "its content is not a picture in a known format; remove it from the folder or convert it to JPEG or PNG"


def _eight_bit(image: Image.Image, path: str | Path) -> Image.Image:
    """Grey with more than 8 bits -> mode L; other modes unchanged."""
    if image.mode == "F":
        raise BadImage(path, "floating-point pixels have no fixed range; save it with 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.array(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage(path, f"grey values {values.min()} to {values.max()} exceed 16 bits; save it with 8 or 16 bits")
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    """Composite on white where the picture has alpha or a transparent colour."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to sRGB through the embedded profile where it fits the picture's mode, else by Pillow's plain rule."""
    if image.mode != "CMYK":
        image = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            is_srgb = "sRGB" in (source.profile.profile_description or "")
            if source.profile.xcolor_space.strip() == image.mode and not is_srgb:
                return ImageCms.profileToProfile(
                    image,
                    source,
                    ImageCms.createProfile("sRGB"),
                    outputMode="RGB",
                    renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                    flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
                )
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")

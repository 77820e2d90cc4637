"""Files as cameras, drawing programs and broken downloads leave them; expected pixels are derived by hand."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from common.data.images import MAX_IMAGE_PX, BadImage, Variant, crop_square, load_image, to_pixel_values

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(image: Image.Image) -> list[tuple[int, int, int]]:
    """Top left, top right, bottom left, bottom right, 4 px inside."""
    right, bottom = image.width - 5, image.height - 5
    return [image.getpixel(xy) for xy in ((4, 4), (right, 4), (4, bottom), (right, bottom))]


def quadrants(width: int = 48, height: int = 32) -> Image.Image:
    """Red top left, green top right, blue bottom left, white bottom right."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_huge_png_header(path: Path, width: int, height: int) -> None:
    """A valid PNG header that announces width x height pixels, with a few bytes of data."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)))


# The EXIF standard says where the stored row 0 and column 0 belong. Stored: red, green / blue, white.
UPRIGHT_CORNERS = {
    1: [RED, GREEN, BLUE, WHITE],  # row 0 top, column 0 left
    2: [GREEN, RED, WHITE, BLUE],  # top, right
    3: [WHITE, BLUE, GREEN, RED],  # bottom, right
    4: [BLUE, WHITE, RED, GREEN],  # bottom, left
    5: [RED, BLUE, GREEN, WHITE],  # row 0 left, column 0 top
    6: [BLUE, RED, WHITE, GREEN],  # row 0 right, column 0 top
    7: [WHITE, GREEN, BLUE, RED],  # row 0 right, column 0 bottom
    8: [GREEN, WHITE, RED, BLUE],  # row 0 left, column 0 bottom
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT_CORNERS)
def test_exif_orientation_is_applied_once(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    quadrants().save(tmp_path / f"a.{suffix}", exif=exif, **lossless)
    image = load_image(tmp_path / f"a.{suffix}")
    assert image.size == ((48, 32) if orientation < 5 else (32, 48))
    np.testing.assert_allclose(corners(image), UPRIGHT_CORNERS[orientation], atol=3)


def test_orientation_outside_the_standard_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    quadrants().save(tmp_path / "a.png", exif=exif)
    assert corners(load_image(tmp_path / "a.png")) == UPRIGHT_CORNERS[1]


def test_alpha_is_composited_on_white(tmp_path):
    """White where alpha is 0; at alpha 51/255 = 0.2: 0.2 * 200 + 0.8 * 255 = 244, and 0.2 * 0 + 0.8 * 255 = 204."""
    image = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(10, 20, 30, 0), (200, 0, 0, 51), (200, 0, 0, 255)]):
        image.putpixel((x, 0), pixel)
    image.save(tmp_path / "rgba.png")
    assert [load_image(tmp_path / "rgba.png").getpixel((x, 0)) for x in range(3)] == [
        WHITE,
        (244, 204, 204),
        (200, 0, 0),
    ]
    grey_alpha = Image.new("LA", (2, 1), (0, 0))
    grey_alpha.putpixel((1, 0), (0, 51))
    grey_alpha.save(tmp_path / "la.png")
    loaded = load_image(tmp_path / "la.png")
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [WHITE, (204, 204, 204)]


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "one.png", transparency=1)
    image.save(tmp_path / "levels.png", transparency=bytes([255, 0, 51]))  # blue at 0.2 on white: 0.8 * 255 = 204
    image.save(tmp_path / "one.gif", transparency=1)
    expected = {
        "opaque.png": [RED, GREEN, BLUE],
        "one.png": [RED, WHITE, BLUE],
        "levels.png": [RED, WHITE, (204, 204, 255)],
        "one.gif": [RED, WHITE, BLUE],
    }
    for name, pixels in expected.items():
        loaded = load_image(tmp_path / name)
        assert (loaded.mode, [loaded.getpixel((x, 0)) for x in range(3)]) == ("RGB", pixels), name


def test_a_transparent_colour_of_an_rgb_png_becomes_white(tmp_path):
    quadrants().save(tmp_path / "a.png", transparency=GREEN)
    assert corners(load_image(tmp_path / "a.png")) == [RED, WHITE, BLUE, WHITE]


def test_grey_and_bilevel(tmp_path):
    Image.fromarray(np.array([[0, 77, 255]], dtype=np.uint8)).save(tmp_path / "l.png")
    loaded = load_image(tmp_path / "l.png")
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (77,) * 3, WHITE]
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert load_image(tmp_path / "bit.png").getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_keeps_its_range(tmp_path, suffix):
    """65535 -> 255 and 257 * 100 -> 100; plain truncation or clipping to 255 would give white from 255 upwards."""
    values = np.array([[0, 257 * 100, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    loaded = load_image(tmp_path / f"a.{suffix}")
    assert [loaded.getpixel((x, 0))[0] for x in range(4)] == [0, 100, 128, 255]  # 32768 / 257 = 127.502


def test_sixteen_bit_rgb_png(tmp_path):
    """Written by hand, as Pillow writes none: one row of two pixels, 16 bits per channel."""
    row = b"\0" + struct.pack(">6H", 65535, 0, 257 * 100, 0, 65535, 257 * 7)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    data = header + png_chunk(b"IDAT", zlib.compress(row)) + png_chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    loaded = load_image(tmp_path / "a.png")
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(255, 0, 100), (0, 255, 7)]


def test_integer_and_float_grey_beyond_sixteen_bits_say_so(tmp_path):
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "i.tif")
    Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(BadImage, match=r"i\.tif.*0 to 70000 exceed 16 bits; save"):
        load_image(tmp_path / "i.tif")
    with pytest.raises(BadImage, match=r"f\.tif.*floating-point.*save it with"):
        load_image(tmp_path / "f.tif")


def test_cmyk_jpeg(tmp_path):
    """Without a profile: R = 255 (1 - C)(1 - K) and so on; no ink is white, full cyan (0, 255, 255)."""
    image = Image.new("CMYK", (64, 32), (0, 0, 0, 0))
    image.paste((255, 0, 0, 0), (32, 0, 64, 32))
    image.save(tmp_path / "a.jpg", quality=100, subsampling=0)
    loaded = load_image(tmp_path / "a.jpg")
    np.testing.assert_allclose(loaded.getpixel((8, 16)), WHITE, atol=3)
    np.testing.assert_allclose(loaded.getpixel((56, 16)), (0, 255, 255), atol=3)


def test_colour_profile_is_converted_and_a_broken_one_ignored(tmp_path):
    """The profile swaps red and green primaries of sRGB, so a red file shows green."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    offsets = {}
    for i in range(struct.unpack(">I", srgb[128:132])[0]):  # tag table: signature, offset, size
        signature, offset, size = struct.unpack(">4sII", srgb[132 + 12 * i : 144 + 12 * i])
        offsets[signature] = slice(offset, offset + size)
    red, green = bytes(srgb[offsets[b"rXYZ"]]), bytes(srgb[offsets[b"gXYZ"]])
    srgb[offsets[b"rXYZ"]], srgb[offsets[b"gXYZ"]] = green, red
    name = bytes(srgb[offsets[b"desc"]])
    srgb[offsets[b"desc"]] = name.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    quadrants().save(tmp_path / "swapped.png", icc_profile=bytes(srgb))
    np.testing.assert_allclose(corners(load_image(tmp_path / "swapped.png")), [GREEN, RED, BLUE, WHITE], atol=2)
    quadrants().save(tmp_path / "broken.png", icc_profile=b"not a profile" * 20)
    assert corners(load_image(tmp_path / "broken.png")) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_animated_pictures_give_their_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    lossless = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50, **lossless)
    with Image.open(tmp_path / name) as stored:
        assert stored.n_frames == 3
    assert load_image(tmp_path / name).getpixel((4, 4)) == RED


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files(tmp_path, suffix, kept):
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(BadImage, match=rf"cut\.{suffix}"):
        load_image(cut)


def test_damaged_png_data(tmp_path):
    quadrants(200, 200).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    middle = data.index(b"IDAT") + 20
    data[middle : middle + 20] = b"\xff" * 20
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(BadImage, match=r"a\.png.*truncated or damaged.*again"):
        load_image(tmp_path / "a.png")


def test_files_that_are_no_pictures_name_the_file_and_the_way_out(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("I am a text file.")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for name, reason in {
        "empty.png": r"empty \(0 bytes\); copy",
        "text.png": "not a picture in a known format; remove it",
        "phone.heic": "HEIC.*convert it to JPEG",
        "link.png": "no such file",
        "missing.png": "no such file",
    }.items():
        with pytest.raises(BadImage, match=rf"{name}.*{reason}") as error:
            load_image(tmp_path / name)
        assert error.value.path == tmp_path / name


@pytest.mark.parametrize("side", [100_000, 12_000])
def test_decompression_bombs_are_refused_before_decoding(tmp_path, side):
    """12,000 squared is under Pillow's own error but over our limit; 100,000 squared would take 30 GB."""
    write_huge_png_header(tmp_path / "bomb.png", side, side)
    with pytest.raises(BadImage, match=rf"bomb\.png.*limit of {MAX_IMAGE_PX:,} px; scale it down"):
        load_image(tmp_path / "bomb.png")


def test_large_pictures_below_the_limit_raise_no_warning(tmp_path, monkeypatch, recwarn):
    """Pillow warns from 89 megapixels on, fewer than a medium-format camera gives; here it would from 1000 px on."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    quadrants().save(tmp_path / "large.png")  # 1536 px
    assert corners(load_image(tmp_path / "large.png")) == [RED, GREEN, BLUE, WHITE]
    assert not recwarn.list


@pytest.mark.parametrize("name", ["Käse 日本語 🐈.jpg", "e\u0301.png", "a'b\"c.png", "x" * 200 + ".png", "no_suffix"])
def test_any_file_name(tmp_path, name):
    quadrants().save(tmp_path / name, format="PNG")
    assert corners(load_image(tmp_path / name)) == [RED, GREEN, BLUE, WHITE]


def test_file_name_that_is_not_utf8(tmp_path):
    path = Path(f"{tmp_path}/\udcff\udcfe.png")
    path.write_bytes(b"broken")
    with pytest.raises(BadImage) as error:
        load_image(path)
    assert str(error.value).encode("utf-8").isascii()  # printable everywhere


def test_crop_square_without_scaling_is_exact():
    columns = np.arange(7, dtype=np.uint8)[None].repeat(3, 0)
    image = Image.fromarray(columns)  # 7 wide, 3 high; the square is 3 wide, at column 0, 2 or 4
    for position, first in ((0.0, 0), (0.5, 2), (1.0, 4)):
        cropped = np.array(crop_square(image, 3, Variant(position)))
        assert cropped.tolist() == [[first, first + 1, first + 2]] * 3
    assert np.array(crop_square(image, 3, Variant(0.0, flip=True))).tolist() == [[2, 1, 0]] * 3
    tall = crop_square(image.transpose(Image.Transpose.TRANSPOSE), 3, Variant(1.0))
    assert np.array(tall)[:, 0].tolist() == [4, 5, 6]


def test_scaling_is_antialiased():
    """Stripes of one pixel, shrunk 8 times, average to grey; sampling without a filter would give 0 or 255."""
    stripes = (np.arange(256) % 2 * 255).astype(np.uint8)[None].repeat(256, 0)
    small = np.array(crop_square(Image.fromarray(stripes), 32))[4:-4, 4:-4]
    assert abs(small.astype(float) - 127.5).max() < 3


def test_a_very_long_picture_is_never_scaled_as_a_whole():
    """1 x 1,000,000 px: scaling the shorter side to 512 first would make 512 million pixels a row."""
    assert crop_square(Image.new("RGB", (1_000_000, 1), RED), 512).getpixel((0, 0)) == RED


def test_pixel_values_range_and_layout():
    pixel_values = to_pixel_values(Image.new("RGB", (3, 2), (255, 0, 51)))
    assert pixel_values.shape == (3, 2, 3) and pixel_values.dtype == torch.float32 and pixel_values.is_contiguous()
    torch.testing.assert_close(pixel_values[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


def test_position_outside_the_picture():
    with pytest.raises(ValueError, match=r"position must be in \[0, 1\], got 1.5"):
        Variant(1.5)

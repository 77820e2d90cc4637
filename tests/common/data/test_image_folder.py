"""Folders of pictures with captions and masks, whole and broken."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.image_folder import ImageFolder
from common.data.images import BadImage, Variant

RED, BLUE = (255, 0, 0), (0, 0, 255)


def write(path: Path, colour: tuple = RED, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def names(folder: ImageFolder) -> list[str]:
    return [path.relative_to(folder.root).as_posix() for path in folder.paths]


def test_sub_folders_mixed_sizes_and_any_name_in_a_fixed_order(tmp_path):
    sizes = {"b.png": (8, 8), "A.jpg": (30, 9), "日本/猫 🐈.webp": (5, 40), "a/z.bmp": (1, 1), "10.gif": (9, 9)}
    for name, size in sizes.items():
        write(tmp_path / name, size=size)
    for hidden in (".DS_Store", "._b.png", "Thumbs.db", ".git/x.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"not a picture")
    folder = ImageFolder(tmp_path, resolution_px=16)
    assert names(folder) == ["10.gif", "A.jpg", "a/z.bmp", "b.png", "日本/猫 🐈.webp"]
    assert folder.sizes_px == [(9, 9), (30, 9), (1, 1), (8, 8), (5, 40)]
    assert torch.stack([item["pixel_values"] for item in (folder[i] for i in range(5))]).shape == (5, 3, 16, 16)
    assert folder[1]["path"] == str(tmp_path / "A.jpg") and "caption" not in folder[1] and "mask" not in folder[1]


def test_order_ignores_how_unicode_names_are_composed(tmp_path):
    for form in ("NFC", "NFD"):
        root = tmp_path / form
        for name in ("é.png", "ez.png", "f.png", "z.png"):
            write(root / unicodedata.normalize(form, name))
    composed, decomposed = (names(ImageFolder(tmp_path / form, resolution_px=8)) for form in ("NFC", "NFD"))
    assert composed == [unicodedata.normalize("NFC", name) for name in decomposed]
    assert composed == ["ez.png", "f.png", "z.png", "é.png"]


def test_variants_are_distinct_and_start_with_the_centre(tmp_path):
    write(tmp_path / "square.png", size=(8, 8))
    Image.fromarray(np.arange(0, 120, 10, dtype=np.uint8)[None].repeat(4, 0)).save(tmp_path / "wide.png")  # 12 x 4
    folder = ImageFolder(tmp_path, resolution_px=4, num_crops=3, flip=True)
    assert folder.variants(0) == [Variant(0.5), Variant(0.5, flip=True)]
    assert [(v.position, v.flip) for v in folder.variants(1)] == [
        (0.5, False),
        (0.0, False),
        (1.0, False),
        (0.5, True),
        (0.0, True),
        (1.0, True),
    ]
    rows = [folder.item(1, variant)["pixel_values"][0, 0] for variant in folder.variants(1)]
    grey = [((row + 1) * 127.5).round().int().tolist() for row in rows]
    assert grey == [
        [40, 50, 60, 70],
        [0, 10, 20, 30],
        [80, 90, 100, 110],
        [70, 60, 50, 40],
        [30, 20, 10, 0],
        [110, 100, 90, 80],
    ]
    torch.testing.assert_close(folder[1]["pixel_values"], folder.item(1, Variant())["pixel_values"], rtol=0, atol=0)


def test_a_bad_file_stops_with_its_name_and_the_way_out(tmp_path):
    write(tmp_path / "a.png")
    bad = tmp_path / "sub" / "bäd.jpg"
    bad.parent.mkdir()
    bad.write_bytes(b"")
    with pytest.raises(BadImage, match=r"bäd\.jpg.*empty.*copy or download it again; or pass skip_bad_images=True"):
        ImageFolder(tmp_path, resolution_px=8)


@pytest.mark.parametrize("name", ["notes.txt", "paper.pdf", "movie.mp4", "a.json"])
def test_other_files_are_an_error_too(tmp_path, name):
    write(tmp_path / "a.png")
    (tmp_path / name).write_text("hello")
    with pytest.raises(BadImage, match=rf"{name}.*not a picture"):
        ImageFolder(tmp_path, resolution_px=8)


def test_a_table_of_the_callers_own_is_passed_over(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(BadImage, match="text.json"):
        ImageFolder(tmp_path, resolution_px=8)
    assert len(ImageFolder(tmp_path, resolution_px=8, other_files=("text.json",))) == 1


def test_bad_files_are_skipped_and_listed_on_request(tmp_path):
    write(tmp_path / "good.png", BLUE)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("hello")
    data = write(tmp_path / "cut.bmp", size=(40, 40)).read_bytes()
    (tmp_path / "cut.bmp").write_bytes(data[:-100])
    with pytest.warns(UserWarning, match=r"(?s)skipped 3 of 4 files:.*cut\.bmp.*empty\.jpg.*text\.png"):
        folder = ImageFolder(tmp_path, resolution_px=8, skip_bad_images=True)
    assert names(folder) == ["good.png"]
    assert [error.path.name for error in folder.skipped] == ["cut.bmp", "empty.jpg", "text.png"]


def test_empty_missing_and_wholly_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="no image in .*it holds no file"):
        ImageFolder(tmp_path, resolution_px=8)
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        ImageFolder(tmp_path / "nowhere", resolution_px=8)
    with pytest.raises(NotADirectoryError, match="a.png' is a file; pass the folder"):
        ImageFolder(write(tmp_path / "x" / "a.png"), resolution_px=8)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    with pytest.raises(ValueError, match=r"(?s)none of its files can be used:.*a\.png.*empty"):
        ImageFolder(tmp_path / "bad", resolution_px=8, skip_bad_images=True)
    with pytest.raises(ValueError, match="got 0 and 1"):
        ImageFolder(tmp_path / "x", resolution_px=0)


def test_captions_beside_the_pictures(tmp_path):
    write(tmp_path / "a.png"), write(tmp_path / "sub" / "b.v2.jpg")
    (tmp_path / "a.txt").write_text("\ufeff a red square \r\n", encoding="utf-8")
    (tmp_path / "sub" / "b.v2.txt").write_text("ein rötliches Quadrat", encoding="utf-8")
    folder = ImageFolder(tmp_path, resolution_px=8)
    assert [folder[i]["caption"] for i in range(2)] == ["a red square", "ein rötliches Quadrat"]


def test_caption_tables_and_which_goes_first(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        write(tmp_path / name)
    rows = [{"file_name": "a.png", "text": "table a"}, {"file_name": "sub/c.png", "caption": "one\u2028line"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    (tmp_path / "captions.json").write_text(json.dumps({"b.png": "table b", "removed.png": "gone"}))
    (tmp_path / "a.txt").write_text("beside a")
    assert ImageFolder(tmp_path, resolution_px=8).captions == ["beside a", "table b", "one\u2028line"]


def test_captions_in_a_folder_of_their_own(tmp_path):
    write(tmp_path / "sub" / "a.png")
    (tmp_path / "captions" / "sub").mkdir(parents=True)
    (tmp_path / "captions" / "sub" / "a.txt").write_text("apart")
    assert ImageFolder(tmp_path, resolution_px=8, captions=tmp_path / "captions").captions == ["apart"]


def test_incomplete_foreign_and_broken_captions(tmp_path):
    write(tmp_path / "a.png"), write(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("only a")
    with pytest.raises(ValueError, match=r"1 of 2 pictures .*'b.png'; write NAME.txt"):
        ImageFolder(tmp_path, resolution_px=8)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "captions.json").write_text('{"c.png": "x"}')
    with pytest.raises(ValueError, match=r"are of 'c.png', but the pictures are 'a.png', 'b.png'"):
        ImageFolder(tmp_path, resolution_px=8)
    (tmp_path / "captions.json").write_text('["x"]')
    with pytest.raises(ValueError, match="captions.json' is not a caption table"):
        ImageFolder(tmp_path, resolution_px=8)
    (tmp_path / "captions.json").write_text('{"a.png": 3}')
    with pytest.raises(ValueError, match="must be a string"):
        ImageFolder(tmp_path, resolution_px=8)
    (tmp_path / "captions.json").write_bytes(b'{"a.png": "\xff"}')
    with pytest.raises(ValueError, match="captions.json' is not UTF-8"):
        ImageFolder(tmp_path, resolution_px=8)


def half_mask(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    """White in the left half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    mask.save(path)


def test_masks_follow_crop_flip_and_size(tmp_path):
    """Picture 16 x 8, mask 8 x 4: the square of 8 px at position p starts at column 8 p; the subject is columns 0-7."""
    write(tmp_path / "images" / "sub" / "a.jpg", size=(16, 8))
    half_mask(tmp_path / "masks" / "sub" / "a.png", size=(8, 4))
    folder = ImageFolder(tmp_path / "images", resolution_px=8, masks=tmp_path / "masks")
    left, right = [[1.0] * 4 + [0.0] * 4] * 8, [[0.0] * 4 + [1.0] * 4] * 8
    assert folder[0]["mask"].tolist() == [left]
    assert folder.item(0, Variant(0.5, flip=True))["mask"].tolist() == [right]
    assert folder.item(0, Variant(0.0))["mask"].mean() == 1 and folder.item(0, Variant(1.0))["mask"].mean() == 0


def test_masks_inside_the_image_folder_and_cut_outs(tmp_path):
    write(tmp_path / "a.png")
    cut_out = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    cut_out.paste((0, 0, 0, 255), (0, 0, 8, 4))  # a black subject: alpha decides, not the grey level
    (tmp_path / "masks").mkdir()
    cut_out.save(tmp_path / "masks" / "a.png")
    folder = ImageFolder(tmp_path, resolution_px=8, masks=tmp_path / "masks")
    assert names(folder) == ["a.png"]
    assert folder[0]["mask"][0].mean(1).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_mask_errors(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    write(images / "a.png", size=(16, 8))
    masks.mkdir()
    with pytest.raises(BadImage, match=r"a\.png.*has no mask; put one at .*masks/a.png"):
        ImageFolder(images, resolution_px=8, masks=masks)
    half_mask(masks / "a.png", size=(8, 16))
    with pytest.raises(BadImage, match=r"mask has 8 x 16 px but its picture 16 x 8; save both alike"):
        ImageFolder(images, resolution_px=8, masks=masks)
    Image.new("L", (16, 8), 0).save(masks / "a.png")
    with pytest.raises(BadImage, match="no pixel of the mask is subject"):
        ImageFolder(images, resolution_px=8, masks=masks)
    half_mask(masks / "a.png", size=(16, 8)), half_mask(masks / "a.bmp", size=(16, 8))
    with pytest.raises(ValueError, match=r"a\.bmp' and .*a\.png' are both masks of 'a'; remove one"):
        ImageFolder(images, resolution_px=8, masks=masks)

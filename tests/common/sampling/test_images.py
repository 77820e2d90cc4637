"""Pictures: values, layout, labels, files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.sampling.images import image_grid, save_png, to_pil


def test_to_pil_maps_the_range_onto_bytes():
    pixel_values = torch.tensor([-1.0, -0.5, 0.0, 1.0, 7.0]).reshape(1, 1, 1, 5).expand(1, 3, 2, 5)
    (image,) = to_pil(pixel_values)
    assert image.size == (5, 2) and image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == [0, 64, 128, 255, 255]


def test_every_byte_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixel_values = torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert np.array_equal(np.asarray(to_pil(pixel_values)[0]), levels[0])


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4, 4)])
def test_to_pil_checks_the_shape(shape):
    with pytest.raises(ValueError, match=r"must be \(B,3,H,W\)"):
        to_pil(torch.zeros(shape))


def test_to_pil_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        to_pil(torch.full((1, 3, 2, 2), float("nan")))


def test_grid_places_images_row_by_row():
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    grid = np.asarray(image_grid(colours[:, :, None, None].expand(3, 3, 8, 8), columns=2, padding_px=2))
    assert grid.shape == (2 + 10 + 10, 2 + 10 + 10, 3)
    assert grid[5, 5].tolist() == [255, 0, 0] and grid[5, 15].tolist() == [0, 255, 0]
    assert grid[15, 5].tolist() == [0, 0, 255] and grid[15, 15].tolist() == [255, 255, 255]


def test_upscale_repeats_pixels():
    image = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small, large = (np.asarray(image_grid(image, 1, upscale=k, padding_px=0)) for k in (1, 4))
    assert np.array_equal(large, small.repeat(4, 0).repeat(4, 1))


def test_labels_are_drawn_above_and_inside_their_column():
    images = torch.ones(2, 3, 64, 64)
    labels = ["a very long prompt that needs several lines and_one_word_that_is_far_too_long_for_a_cell", ""]
    grid = np.asarray(image_grid(images, 2, labels, padding_px=4))
    dark = np.argwhere(grid.sum(2) < 384)
    assert len(dark) > 100 and dark[:, 1].max() < 4 + 64 and dark[:, 1].min() >= 4
    assert dark[:, 0].max() < grid.shape[0] - 64 - 4


def test_grid_takes_images_of_several_sizes_and_few_of_many_columns():
    assert image_grid([Image.new("RGB", (8, 4)), Image.new("RGB", (4, 8))], 9, padding_px=1).size == (19, 10)


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (0, {"columns": 1}, "no images"),
        (2, {"columns": 0}, "at least 1, got 0"),
        (2, {"columns": 2, "labels": ["one"]}, "1 labels for 2 images"),
    ],
)
def test_grid_checks_its_arguments(count, settings, message):
    with pytest.raises(ValueError, match=message):
        image_grid([Image.new("RGB", (4, 4))] * count, **settings)


def test_png_keeps_pixels_and_metadata(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    path = tmp_path / "new folder" / "image.png"
    path.parent.mkdir()
    settings = {"guidance_scale": 7.5, "scheduler": "ddim"}
    save_png(image, path, {"prompt": "a photo of <cup> é 猫", "seed": 3, "settings": settings})
    with Image.open(path) as read:
        assert np.array_equal(np.asarray(read), np.asarray(image))
        assert read.text["prompt"] == "a photo of <cup> é 猫" and read.text["seed"] == "3"
        assert json.loads(read.text["settings"]) == settings
    assert [entry.name for entry in path.parent.iterdir()] == ["image.png"]

"""Scales of pictures, pooled concepts, and regularisation images."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.image_folder import ImageFolder


def picture():
    """64 px, from whole numbers, so that anybody can make the same."""
    i, j = np.mgrid[:64, :64]
    channels = [(3 * i + 5 * j + i * j) % 256, (7 * i + j) % 256, (i + 2 * j) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.mark.parametrize(
    "side, top, left, mask_rows, mask_columns, pixel, total",
    [
        (22, 3, 39, (1, 1), (5, 5), ((5, 60), (0.12941177, -0.14509805, 0.02745098)), 458.2431640625),
        (34, 7, 25, (1, 3), (4, 5), ((40, 33), (0.54509807, 0.55294120, -0.26274511)), 1273.8275146484375),
        (64, 0, 0, (0, 7), (0, 7), ((20, 20), (-0.62352943, 0.25490198, -0.52941179)), 5285.84326171875),
        (84, 3, 8, (0, 7), (0, 7), ((40, 33), (0.89803922, -0.38039216, -0.25490198)), 5078.470703125),
        (82, 16, 9, (0, 7), (0, 7), ((5, 60), (0.36470589, 0.31764707, -0.03529412)), 4720.1806640625),
    ],
)
def test_placed_pictures_equal_the_official_code(paper, side, top, left, mask_rows, mask_columns, pixel, total):
    """MaskBase of src/finetune_data.py, 7c19c9a, at 64 px with numpy seeds 0, 14, 1, 3, 5; it has a latent for 8 px."""
    pixel_values, mask = paper.augmentation.place(picture(), paper.augmentation.Placement(side, top, left), 64, 8)
    rows, columns = mask[0].nonzero().T
    assert ((rows.min().item(), rows.max().item()), (columns.min().item(), columns.max().item())) == (
        mask_rows,
        mask_columns,
    )
    (i, j), values = pixel
    torch.testing.assert_close(pixel_values[:, i, j], torch.tensor(values))
    assert pixel_values.abs().sum().item() == pytest.approx(total, rel=1e-5)


def test_drawn_scales_are_those_of_the_code(paper):
    """512 px: 2/3 x (307 - 170) / 343 are small, 1/3 large; sides even; everything fits."""
    drawn = [paper.augmentation.draw_placement(512, torch.Generator().manual_seed(k)) for k in range(3000)]
    small = [p for p in drawn if p.side_px < 512]
    large = [p for p in drawn if p.side_px > 512]
    assert len(small) / 3000 == pytest.approx(2 / 3 * 138 / 343, abs=0.03)
    assert len(large) / 3000 == pytest.approx(1 / 3, abs=0.03)
    assert min(p.side_px for p in small) >= 170 and max(p.side_px for p in small) < 0.6 * 512
    assert min(p.side_px for p in large) >= 614 and max(p.side_px for p in large) <= 716
    assert all(p.side_px % 2 == 0 and 0 <= min(p.top_px, p.left_px) for p in drawn)
    assert all(max(p.top_px, p.left_px) <= abs(512 - p.side_px) for p in drawn)
    assert {p.prefix for p in small} == {"a far away ", "very small "}
    assert {p.prefix for p in large} == {"zoomed in ", "close up "}
    assert {p.prefix for p in drawn if p.side_px == 512} == {""}


def test_samples_depend_on_their_key_alone_and_prompts_read_well(paper, photos):
    folder = ImageFolder(photos, resolution_px=64)
    options = {"latent_size": 16, "scale": True, "flip": True, "seed": 0}
    dataset = paper.augmentation.ConceptDataset(folder, "a photo of a <new1> dog", **options)
    items = [dataset.sample(0, key) for key in range(40)]
    again = [dataset.sample(0, key) for key in reversed(range(40))][::-1]
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(items, again, strict=True))
    assert {item["prompt"] for item in items} == {
        "a photo of a <new1> dog", "a far away photo of a <new1> dog", "very small photo of a <new1> dog",
        "zoomed in photo of a <new1> dog", "close up photo of a <new1> dog",
    }  # fmt: skip
    assert all(item["mask"].sum() >= 1 and item["pixel_values"].shape == (3, 64, 64) for item in items)
    plain, whole = dataset[0], ImageFolder(photos, resolution_px=64)[0]["pixel_values"]
    assert torch.equal(plain["pixel_values"], whole) and plain["mask"].min() == 1
    unscaled = paper.augmentation.ConceptDataset(folder, "x", **{**options, "scale": False})
    mirrored = [torch.equal(unscaled.sample(0, k)["pixel_values"], whole.flip(2)) for k in range(40)]
    straight = [torch.equal(unscaled.sample(0, k)["pixel_values"], whole) for k in range(40)]
    assert all(a != b for a, b in zip(mirrored, straight, strict=True)) and 8 < sum(mirrored) < 32
    with pytest.raises(ValueError, match="9 latents"):
        paper.augmentation.ConceptDataset(folder, "x", **{**options, "latent_size": 8})


def test_concepts_are_pooled(paper, photos):
    folder = ImageFolder(photos, resolution_px=32)
    parts = [
        paper.augmentation.ConceptDataset(folder, prompt, latent_size=8, scale=False, flip=False, seed=0)
        for prompt in ("a <new1> dog", "a <new2> cat")
    ]
    pooled = paper.augmentation.PooledDataset(parts)
    assert [pooled[i]["prompt"] for i in range(len(pooled))] == ["a <new1> dog"] * 3 + ["a <new2> cat"] * 3
    assert [pooled.sample(i, 7)["image_index"] for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_retrieval_by_hand(paper):
    """Cosines with (1, 0): 1, 0.8, 0.9899, 0, 0.8944."""
    captions = torch.tensor([[2.0, 0.0], [4.0, 3.0], [7.0, 1.0], [0.0, 1.0], [2.0, 1.0]])
    target = torch.tensor([[3.0, 0.0]])
    retrieve = paper.regularisation.retrieve
    assert retrieve(target, captions, 200) == [0, 2, 4]
    assert retrieve(target, captions, 2) == [0, 2]
    assert retrieve(target, captions, 200, 0.7) == [0, 2, 4, 1]
    with pytest.raises(ValueError, match=r"0\.85.*the best has 0\.80"):
        retrieve(target, captions[[1, 3]], 200)


def test_images_of_the_world_are_found_by_caption(paper, tmp_path):
    folder = paper.world.retrieved_set("a photo of a duck", tmp_path / "duck", count=3, corpus=40)
    pictures = ImageFolder(folder, resolution_px=64)
    assert 1 <= len(pictures) <= 3 and any("duck" in caption for caption in pictures.captions)
    assert set(pictures.captions) <= set(paper.world.captions(40))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    paper.world.retrieved_set("a photo of a duck", folder, count=3, corpus=40)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_generated_images_are_made_once_and_those_of_other_weights_are_refused(paper, backbone, tmp_path):
    config = paper.config.CustomDiffusionConfig.tiny("dog")
    config = dataclasses.replace(config, num_regularisation_images=2, num_inference_steps=2)
    folder = paper.regularisation.generated_set(backbone, config, 0, tmp_path)
    assert ImageFolder(folder, resolution_px=32).captions == ["a photo of a dog"] * 2
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    paper.regularisation.generated_set(backbone, config, 0, tmp_path)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert json.loads((tmp_path / "origin.json").read_text())["prompt"] == "a photo of a dog"
    with torch.no_grad():
        backbone.unet.conv_out.bias.add_(1e-3)
    with pytest.raises(ValueError, match="unet"):
        paper.regularisation.generated_set(backbone, config, 0, tmp_path)

"""Collages, their prompts and draws, and the attention loss."""

import dataclasses

import numpy as np
import pytest
import torch

from common.backbones import load_backbone


@pytest.fixture(scope="module")
def tokenizer():
    return load_backbone("tiny-sd", weights="random").tokenizer


def test_half_picture_is_the_whole_at_half_size(paper):
    """Reference: numpy; means of 2x2 blocks, the edge rows repeated."""
    pixels = np.random.default_rng(0).normal(size=(1, 3, 8, 8))
    blocks = pixels.reshape(1, 3, 4, 2, 4, 2).mean(axis=(3, 5))
    expected = np.pad(blocks, ((0, 0), (0, 0), (2, 2), (0, 0)), mode="edge")
    np.testing.assert_allclose(paper.cutmix.half_picture(torch.tensor(pixels)).numpy(), expected, rtol=1e-12)
    joined = paper.cutmix.collage(torch.zeros(3, 8, 4), torch.ones(3, 8, 4))
    assert joined.shape == (3, 8, 8) and joined[..., :4].max() == 0 and joined[..., 4:].min() == 1


def test_prompts_are_the_papers(paper):
    prompts = [
        paper.cutmix.collage_prompt("photo of a {}", "[V1] dog", "[V2] sculpture", pair) for pair in paper.cutmix.PAIRS
    ]
    assert prompts == [
        "photo of a [V1] dog on the left and a [V2] sculpture on the right",
        "photo of a [V1] dog and a [V2] sculpture",
    ]


def make_dataset(paper, nouns=("dog", "cat"), *, with_class=True, **changes):
    """Latents that say what they are: subject k, picture i -> k + i / 10; halves negative; class images + 100."""
    config = paper.config.SVDiffConfig.tiny(*nouns, **changes)

    def pictures(k, offset=0.0):
        values = offset + k + torch.arange(3)[:, None, None, None] / 10
        return paper.cutmix.Pictures(values.expand(3, 4, 8, 8), -values.expand(3, 4, 8, 4))

    classes = [pictures(k, 100.0) for k in range(len(nouns))] if with_class else None
    return paper.cutmix.CutMixDataset([pictures(k) for k in range(len(nouns))], classes, config)


def test_draws_match_their_prompts_and_sides(paper):
    """Over 1000 draws: collages 0.6 of them, sides and pairs of prompts even, pictures all used, class alike."""
    dataset, counts = make_dataset(paper), {"collage": 0, "first left": 0, "on the left": 0}
    seen = set()
    for key in range(1000):
        item = dataset.sample(0, key)
        latents, prompt = item["instance"]["latents"], item["instance"]["prompt"]
        of_class, class_prompt = item["class"]["latents"], item["class"]["prompt"]
        assert prompt.replace("sks ", "").replace("zwx ", "") == class_prompt
        left, right = latents[0, 0, 0].item(), latents[0, 0, -1].item()
        if item["sides"].max() < 0:
            subject = round(left)
            assert left == right >= 0 and ("sks dog", "zwx cat")[subject] in prompt and "and" not in prompt
            assert 100 <= of_class[0, 0, 0] and round(of_class[0, 0, 0].item() - 100) == subject
            seen.add(left)
            continue
        order = [item["sides"].tolist().index(side) for side in (0, 1)]  # subject on the left, on the right
        assert [round(-left), round(-right)] == order and of_class.max() <= -100
        assert [round(-half - 100) for half in (of_class[0, 0, 0].item(), of_class[0, 0, -1].item())] == order
        assert prompt.index(("sks", "zwx")[order[0]]) < prompt.index(("sks", "zwx")[order[1]])
        counts["collage"] += 1
        counts["first left"] += order[0] == 0
        counts["on the left"] += "on the left" in prompt
    assert len(seen) == 6
    assert counts["collage"] == pytest.approx(600, abs=50)
    for name in ("first left", "on the left"):
        assert counts[name] == pytest.approx(counts["collage"] / 2, abs=50)


def test_draws_depend_on_the_key_alone_and_never_mix_one_subject(paper):
    dataset = make_dataset(paper)
    for key in range(20):
        first, again = dataset.sample(0, key), dataset.sample(3, key)
        assert torch.equal(first["instance"]["latents"], again["instance"]["latents"])
        assert first["instance"]["prompt"] == again["instance"]["prompt"]
    single = make_dataset(paper, ("dog",), with_class=False)
    items = [single.sample(0, key) for key in range(20)]
    assert all("class" not in item and item["sides"].tolist() == [-1] for item in items)
    plain = make_dataset(paper, cut_mix_probability=0.0)
    assert all(plain.sample(0, key)["sides"].max() < 0 for key in range(50))
    three = make_dataset(paper, ("dog", "cat", "bear"), cut_mix_probability=1.0)
    assert {int((three.sample(0, key)["sides"] < 0).sum()) for key in range(50)} == {1}  # two of three
    with pytest.raises(ValueError, match="1 sets of pictures"):
        paper.cutmix.CutMixDataset(single.subjects, None, dataclasses.replace(three.config))


def test_encoded_halves_fit_together(paper, backbone):
    pictures = paper.cutmix.encode_pictures(backbone, torch.rand(2, 3, 32, 32) * 2 - 1)
    assert pictures.whole.shape == (2, 4, 8, 8) and pictures.half.shape == (2, 4, 8, 4)
    assert paper.cutmix.collage(*pictures.half).shape == (4, 8, 8)


def test_token_positions(paper, tokenizer):
    """[start] a photo of a sks dog: "sks" is number 5; "ktn" is no word of this vocabulary and becomes three tokens."""
    find = paper.cutmix.token_positions
    assert find(tokenizer, "a photo of a sks dog", "sks") == [5]
    assert find(tokenizer, "a photo of a zwx cat and a sks dog", "sks") == [9]
    assert find(tokenizer, "a ktn dog", "ktn") == [2, 3, 4]
    for prompt in ("a photo of a dog", "a sks dog and a sks dog"):
        with pytest.raises(ValueError, match="must be in the prompt once"):
            find(tokenizer, prompt, "sks")


def test_masks_and_loss_by_hand(paper):
    """A 2x2 map: for the subject on the left only the right column counts: (0.2^2 + 0.4^2) / 4 = 0.05."""
    left, right = (paper.cutmix.foreign_mask(side, 2, 2) for side in (0, 1))
    assert left.tolist() == [[0, 1], [0, 1]] and right.tolist() == [[1, 0], [1, 0]]
    attention = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]] * 2, dtype=torch.float64)
    loss = paper.cutmix.unmix_loss(attention, torch.stack([left, right]).double())
    assert loss.tolist() == pytest.approx([0.05, 0.025])  # (0.1^2 + 0.3^2) / 4


def test_batch_loss_by_loops(paper, tokenizer):
    """Reference: plain loops over samples, subjects, layers and positions; sample 1 is no collage, sides differ."""
    prompts = ["a photo of a sks dog and a zwx cat", "a photo of a sks dog", "a photo of a zwx cat and a sks dog"]
    sides = torch.tensor([[0, 1], [-1, -1], [1, 0]])
    generator = torch.Generator().manual_seed(0)
    maps = {
        (2, 4): [torch.rand(3, 8, 20, generator=generator, dtype=torch.float64) for _ in range(2)],
        (1, 2): [torch.rand(3, 2, 20, generator=generator, dtype=torch.float64)],
    }
    at = {(0, 0): 5, (0, 1): 9, (2, 0): 9, (2, 1): 5}  # (sample, subject) -> token
    total = 0.0
    for (height, width), layers in maps.items():
        for layer in layers:
            for (row, subject), token in at.items():
                on_left = sides[row, subject] == 0
                for y in range(height):
                    for x in range(width):
                        if (x >= width // 2) == on_left:
                            total += layer[row, y * width + x, token].item() ** 2 / (height * width)
    ours = paper.cutmix.batch_unmix_loss(maps, tokenizer, prompts, ["sks", "zwx"], sides)
    assert ours.item() == pytest.approx(total / 3 / 3)  # three samples, three layers

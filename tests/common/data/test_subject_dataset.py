"""What a run sees is a pure function of (seed, index, sample key); drawn fairly; DreamBooth's two lists stay apart."""

from collections import Counter

import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from common.backbones import Conditioning, PlaceholderTokens, load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.prompt_cache import PromptCache
from common.data.subject_dataset import SubjectDataset, ZipDataset

PROMPTS = ["a photo of a <s>", "a rendering of a <s>", "the photo of a <s>"]


@pytest.fixture
def cache(photos, backbone) -> LatentCache:
    return LatentCache(ImageFolder(photos, resolution_px=16, num_crops=2, flip=True), backbone)


def test_sample_is_a_pure_function_of_seed_index_and_key(cache):
    def draw(seed: int, index: int, key: int) -> dict:
        return SubjectDataset(cache, PROMPTS, seed=seed).sample(index, key)

    one, again = draw(0, 1, 7), draw(0, 1, 7)
    assert torch.equal(one["latents"], again["latents"]) and one["prompt"] == again["prompt"]
    assert set(one) == {"latents", "prompt", "image_index"}
    assert one["latents"].shape == (4, 8, 8) and one["image_index"] == 1
    assert not torch.equal(one["latents"], draw(0, 1, 8)["latents"])
    assert not torch.equal(one["latents"], draw(1, 1, 7)["latents"])
    assert draw(0, 0, 2**40)["image_index"] == 0  # keys have no upper end


def test_plain_items_draw_nothing(cache):
    item = SubjectDataset(cache, PROMPTS, seed=3)[2]
    assert torch.equal(item["latents"], cache.latents(2)) and item["prompt"] == PROMPTS[0]
    with pytest.raises(IndexError):
        SubjectDataset(cache, PROMPTS, seed=3)[3]


def test_variants_and_prompts_are_drawn_evenly_and_independently(cache):
    """1200 draws over 4 variants x 3 prompts: 100 each, standard deviation 9.6; all within 5 of them."""
    dataset = SubjectDataset(cache, PROMPTS, seed=0)
    means = torch.stack([cache.latents(1, variant) for variant in range(4)])
    counts = Counter()
    for key in range(1200):
        item = dataset.sample(1, key)
        nearest = (means - item["latents"]).flatten(1).norm(dim=1).argmin().item()
        counts[nearest, item["prompt"]] += 1
    assert len(counts) == 12 and max(abs(count - 100) for count in counts.values()) < 48


def test_posterior_is_sampled(cache):
    """Over many keys the mean and deviation of the latents are those of the posterior (one variant: no crop, flip)."""
    dataset = SubjectDataset(cache, PROMPTS, seed=0)
    cache.num_variants = lambda index: 1
    draws = torch.stack([dataset.sample(0, key)["latents"] for key in range(2000)])
    std = cache.latents(0, 0, torch.ones(4, 8, 8)) - cache.latents(0, 0)
    assert ((draws.mean(0) - cache.latents(0)) / std).abs().max() < 5 / 2000**0.5
    assert (draws.std(0) / std - 1).abs().max() < 5 / 4000**0.5


def test_captions_as_prompts(photos, backbone):
    for path in list(photos.iterdir()):
        path.with_suffix(".txt").write_text(f"caption of {path.stem}")
    dataset = SubjectDataset(LatentCache(ImageFolder(photos, resolution_px=16), backbone), seed=0)
    assert [dataset.sample(i, 9)["prompt"] for i in range(3)] == ["caption of a", "caption of b", "caption of c"]


def test_masks_come_with_their_variant(photos, backbone):
    masks = photos.parent / "masks"
    masks.mkdir()
    for path in photos.iterdir():
        (masks / path.name).write_bytes(path.read_bytes())  # noise: every variant has a mask of its own
    cache = LatentCache(ImageFolder(photos, resolution_px=16, flip=True, masks=masks), backbone)
    dataset = SubjectDataset(cache, PROMPTS, seed=0)
    means = torch.stack([cache.latents(1, variant) for variant in range(2)])
    seen = set()
    for key in range(20):
        item = dataset.sample(1, key)
        variant = (means - item["latents"]).flatten(1).norm(dim=1).argmin().item()
        assert item["mask"].dtype == torch.float32 and torch.equal(item["mask"], cache.masks[1][variant].float())
        seen.add(variant)
    assert seen == {0, 1}


def test_zip_repeats_the_shorter_list_and_keeps_the_parts_apart(cache, backbone, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("class")
    instance = SubjectDataset(cache, ["a sks cat"], seed=0)
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
    class_ = SubjectDataset(LatentCache(ImageFolder(tmp_path, resolution_px=16), backbone), ["a cat"], seed=1)
    zipped = ZipDataset(instance=instance, class_=class_)
    assert len(zipped) == 8
    items = [zipped.sample(index, 100 + index) for index in range(8)]
    assert [item["instance"]["image_index"] for item in items] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [item["class"]["image_index"] for item in items] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(items[4]["class"]["latents"], class_.sample(4, 104)["latents"])
    assert torch.equal(items[4]["instance"]["latents"], instance.sample(1, 104)["latents"])
    batch = default_collate(items)
    assert batch["instance"]["latents"].shape == (8, 4, 8, 8) and batch["class"]["prompt"] == ["a cat"] * 8
    assert zipped[7]["class"]["image_index"] == 7
    with pytest.raises(IndexError, match="index 8 is outside a dataset of 8 items"):
        zipped[8]


def test_dataset_errors(cache):
    with pytest.raises(TypeError, match="must be a list of prompts, got the string 'a cat'"):
        SubjectDataset(cache, "a cat", seed=0)
    with pytest.raises(ValueError, match="have no captions; pass prompts"):
        SubjectDataset(cache, seed=0)
    with pytest.raises(ValueError, match="prompts is empty"):
        SubjectDataset(cache, [], seed=0)
    with pytest.raises(ValueError, match="at least one dataset"):
        ZipDataset()


class WordLengths(torch.nn.Module):
    """A text encoder of one parameter: every row of a prompt's embedding is its length times the parameter."""

    def __init__(self):
        super().__init__()
        self.scale, self.calls = torch.nn.Parameter(torch.tensor(2.0)), []

    def encode_prompt(self, prompt: str) -> Conditioning:
        self.calls.append(prompt)
        return Conditioning(torch.full((1, 3, 2), float(len(prompt))) * self.scale)


def test_prompt_cache_encodes_each_prompt_once():
    encoder = WordLengths().requires_grad_(False)
    prompts = PromptCache(encoder, ["a", "bb", "a"])
    assert encoder.calls == ["a", "bb"] and len(prompts) == 2 and "a" in prompts and "ccc" not in prompts
    batch = prompts.batch(["ccc", "a", "ccc", "bb"])
    assert batch.prompt_embeds[:, 0, 0].tolist() == [6, 2, 6, 4] and encoder.calls == ["a", "bb", "ccc"]
    assert prompts["bb"].batch_size == 1


def test_prompt_cache_refuses_an_encoder_that_is_trained():
    with torch.no_grad(), pytest.raises(ValueError, match="'a' depends on trained parameters .* freeze"):
        PromptCache(WordLengths(), ["a"])


def test_prompt_cache_on_a_real_text_encoder_with_a_placeholder():
    """The placeholder's vector is trained: its prompts are refused, until it is frozen too."""
    backbone = load_backbone("tiny-sd", weights="random").freeze()
    prompts = PromptCache(backbone, ["a photo of a dog"])
    expected = backbone.encode_prompt(["a photo of a dog", "a dog"])
    torch.testing.assert_close(prompts.batch(["a photo of a dog", "a dog"]).prompt_embeds, expected.prompt_embeds)
    (vector,) = PlaceholderTokens(backbone).add("<s>", initializer_token="dog")
    with pytest.raises(ValueError, match="'a photo of a <s>' depends on trained parameters"):
        prompts["a photo of a <s>"]
    vector.requires_grad_(False)
    assert prompts["a photo of a <s>"].batch_size == 1

"""The judge and the dual encoder, with random weights, and the losses that train them."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPTextConfig

from common.toyworld.examples import LABELS, make_examples
from common.toyworld.judge import DualEncoder, EntityPooling, Judge, ToyClip, ToyDino
from common.toyworld.pretrain.clip import attribute_loss, contrastive_loss, mean_of_words, save_clip, trim
from common.toyworld.pretrain.judge import (
    IDENTITY_MARGIN,
    IDENTITY_SCALE,
    JudgeTrainer,
    attribute_accuracy,
    augment,
    entity_shares,
    identity_loss,
    same_instance_auc,
    save_judge,
)
from common.toyworld.shards import render
from common.toyworld.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge({name: list(values) for name, values in LABELS.items()}).eval().requires_grad_(False)


@pytest.fixture
def pixel_values():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def small_text_config() -> CLIPTextConfig:
    tokenizer = load_tokenizer()
    return CLIPTextConfig(
        hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def test_readings_are_probabilities_over_the_labels(judge, pixel_values):
    readings = judge.read(pixel_values)
    assert readings.keys() == judge.labels.keys()
    for name, probabilities in readings.items():
        assert probabilities.shape == (3, len(judge.labels[name]))
        torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    torch.testing.assert_close(judge.embed_identity(pixel_values).norm(dim=1), torch.ones(3))
    assert ToyDino(judge).embed_images(pixel_values).shape == judge.features(pixel_values).shape == (3, 256)


def test_a_saved_judge_loads_with_labels_and_accuracy_and_is_small(judge, pixel_values, tmp_path):
    save_judge(judge, render([0, 1, 2, 3]), tmp_path / "judge.safetensors")
    assert (tmp_path / "judge.safetensors").stat().st_size <= 4 * 2**20
    loaded = Judge.load(tmp_path / "judge.safetensors")
    assert loaded.labels == judge.labels
    assert set(loaded.accuracy) <= set(LABELS) and loaded.accuracy["class"] in (0, 0.25, 0.5, 0.75, 1)
    for name, probabilities in loaded.read(pixel_values).items():
        torch.testing.assert_close(probabilities, judge.read(pixel_values)[name], atol=2e-3, rtol=0)


def test_larger_pictures_are_resized_and_other_shapes_refused(judge):
    flat = torch.full((1, 3, 128, 96), 0.25)
    torch.testing.assert_close(judge.features(flat), judge.features(flat[..., :64, :64]), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        judge.read(torch.zeros(3, 64, 64))


def test_missing_weights_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="pretrain judge"):
        Judge.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="pretrain clip"):
        ToyClip.load(tmp_path / "none.safetensors")


def test_a_saved_dual_encoder_loads_as_toy_clip(pixel_values, tmp_path):
    torch.manual_seed(0)
    encoder = DualEncoder(small_text_config()).eval()
    save_clip(encoder, 0.5, tmp_path / "clip.safetensors")
    clip = ToyClip.load(tmp_path / "clip.safetensors")
    texts = ["a photo of a red mug", "a sketch of a robot waving on the moon"]
    torch.testing.assert_close(clip.embed_texts(texts).norm(dim=1), torch.ones(2))
    expected = encoder.encode_image(pixel_values)[0].detach()
    torch.testing.assert_close(clip.embed_images(pixel_values), expected, atol=3e-3, rtol=0)
    torch.testing.assert_close(clip.embed_texts(texts[1:])[0], clip.embed_texts(texts)[1], atol=1e-5, rtol=1e-5)


def test_trimming_the_padding_changes_no_embedding():
    torch.manual_seed(0)
    encoder, tokenizer = DualEncoder(small_text_config()).eval(), load_tokenizer()
    texts, end = ["a red mug", "a photo of a blue car in the city"], tokenizer.eos_token_id
    ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    short = trim(ids, end)
    assert short.shape[1] == len(tokenizer(texts[1]).input_ids)
    with torch.no_grad():
        whole, cut = encoder.encode_text(ids), encoder.encode_text(short)
    torch.testing.assert_close(cut[0], whole[0], atol=1e-5, rtol=1e-5)
    of_cut, of_whole = mean_of_words(cut[2], short, end), mean_of_words(whole[2], ids, end)
    torch.testing.assert_close(of_cut, of_whole, atol=1e-5, rtol=1e-5)


def test_mean_of_words_leaves_out_start_end_and_padding():
    states = torch.arange(5.0)[None, :, None].expand(2, 5, 1)
    ids = torch.tensor([[8, 1, 2, 9, 9], [8, 1, 2, 3, 9]])  # 8 start, 9 end
    assert mean_of_words(states, ids, 9).flatten().tolist() == [1.5, 2.0]


def test_contrastive_loss_of_orthogonal_pairs():
    embeds, scale = torch.eye(3, 8), 5.0
    loss, accuracy = contrastive_loss(embeds, embeds, torch.tensor(math.log(scale)))
    assert loss.item() == pytest.approx(math.log(math.exp(scale) + 2) - scale, rel=1e-5)
    assert accuracy == 1


def test_attribute_loss_skips_what_does_not_apply():
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(2, len(values)) for name, values in LABELS.items()})
    features = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    labels = {name: torch.full((4,), -1) for name in LABELS}
    labels["class"] = torch.tensor([3, -1, 0, -1])
    labels["view"] = torch.tensor([-1, -1, -1, 2])
    by_hand = [-heads["class"](features[i]).log_softmax(-1)[k] for i, k in ((0, 3), (2, 0))]
    expected = ((by_hand[0] + by_hand[1]) / 2 - heads["view"](features[3]).log_softmax(-1)[2]) / 2
    torch.testing.assert_close(attribute_loss(heads, features, labels), expected)


def test_identity_loss_is_a_margin_softmax_and_zero_without_instances():
    directions = torch.eye(2, 64) * 3
    loss = identity_loss(directions[:1] / 3, directions, torch.tensor([0]))
    gap = IDENTITY_SCALE * (1 - IDENTITY_MARGIN)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-3, abs=1e-7)
    assert identity_loss(torch.zeros(0, 64), directions, torch.zeros(0, dtype=torch.long)) == 0


def test_entity_shares_of_cells():
    """By hand: one 8x8 cell of which a quarter is entity 1, an eighth entity 2 and an eighth entity 3."""
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, 8:12, :4], masks[0, 12:14, :4], masks[0, 14:16, :4] = 1, 2, 3  # 3 counts as 2
    shares = entity_shares(masks)
    assert shares.shape == (1, 3, 8, 8)
    torch.testing.assert_close(shares[0, :, 1, 0], torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(shares[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]))


def test_entity_pooling_averages_where_the_map_says():
    """A map that cannot tell pools the mean of all cells, for both entities, at both sizes."""
    pooling = EntityPooling(8, 8).eval()
    coarse, fine = torch.randn(1, 8, 8, 8), torch.randn(1, 8, 16, 16)
    torch.nn.init.zeros_(pooling.entity_logits.weight)
    with torch.no_grad():
        _, logits = pooling(fine, coarse)
        assert logits.shape == (1, 3, 8, 8) and torch.equal(logits, logits[:, :, :1, :1].expand_as(logits))
        pooling.norm_16, pooling.norm_8 = torch.nn.Identity(), torch.nn.Identity()
        pooled = [torch.nn.functional.silu(x).mean((2, 3)) for x in (fine, fine, coarse, coarse)]
        expected = pooling.project(torch.cat([pooled[0], pooled[2], pooled[1], pooled[3]], 1))
        torch.testing.assert_close(pooling(fine, coarse)[0], expected, atol=1e-5, rtol=1e-4)


def test_training_the_judge_lowers_its_loss():
    torch.manual_seed(0)
    batch = make_examples(range(16))
    labels = {name: torch.from_numpy(values) for name, values in batch.labels.items()}
    pixel_values = torch.from_numpy(batch.images).permute(0, 3, 1, 2) / 127.5 - 1
    instances = torch.from_numpy(batch.instances)
    trainer = JudgeTrainer(900)
    optimizer = torch.optim.AdamW(trainer.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        loss = sum(trainer(pixel_values, torch.from_numpy(batch.masks), labels, instances).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_augmentation_keeps_range_and_repeats_with_its_generator(pixel_values):
    first = augment(pixel_values, torch.Generator().manual_seed(4))
    assert first.shape == pixel_values.shape and first.abs().max() <= 1
    assert torch.equal(first, augment(pixel_values, torch.Generator().manual_seed(4)))
    assert not torch.equal(first, augment(pixel_values, torch.Generator().manual_seed(5)))


class _MeanColor(torch.nn.Module):
    """Stands for a judge: red pictures are class 0, others class 1; identity is the mean colour."""

    labels = {"class": ["red", "other"], "view": ["front"]}

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def read(self, pixel_values):
        red = (pixel_values[:, 0].mean((1, 2)) > 0).float()
        return {"class": torch.stack([red, 1 - red], 1), "view": torch.ones(len(red), 1)}

    def embed_identity(self, pixel_values):
        return F.normalize(pixel_values.mean((2, 3)) + 1, dim=-1)


def test_accuracy_counts_only_what_applies_and_is_mentioned():
    images = torch.zeros(4, 64, 64, 3, dtype=torch.uint8)
    images[:2, ..., 0] = 255  # predictions: 0, 0, 1, 1
    labels = {"class": torch.tensor([0, 1, 1, -1]), "view": torch.full((4,), -1)}
    assert attribute_accuracy(_MeanColor(), images, labels) == {"class": (pytest.approx(2 / 3), 3)}
    mask = {"class": torch.tensor([True, False, True, True]), "view": torch.ones(4).bool()}
    assert attribute_accuracy(_MeanColor(), images, labels, mask) == {"class": (1.0, 2)}


def test_same_instance_auc_is_one_when_instances_differ_clearly():
    images = torch.zeros(5, 64, 64, 3, dtype=torch.uint8)
    images[:2, ..., 0] = torch.tensor([200, 250], dtype=torch.uint8)[:, None, None]
    images[2:4, ..., 1] = torch.tensor([200, 250], dtype=torch.uint8)[:, None, None]
    assert same_instance_auc(_MeanColor(), images, torch.tensor([0, 0, 7, 7, -1])) == 1.0

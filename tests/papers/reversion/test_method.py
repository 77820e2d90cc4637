"""Sampling of timesteps, the steering loss and its words, what is trained, the artifact."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline

from common.backbones import load_backbone
from common.io import atomic_save_safetensors, load_safetensors
from common.training.losses import denoising_loss as common_denoising_loss
from common.training.noising import noise_batch
from common.training.seeding import keys_of_step, seeded_uniform

LOSSES_OF_FIVE_STEPS = [1.1369421, 1.1928554, 1.2164404, 1.1883705, 1.0677321]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(paper, backbone, **changes):
    changes = {"num_inference_steps": 2} | changes
    return paper.method.ReVersion(backbone, replace(paper.config.ReVersionConfig.tiny(), **changes))


def batch(step: int, prompts=("a photo of a duck <R> a chair", "a photo of a red car <R> a mug")) -> dict:
    latents, keys = randn(2, 4, 8, 8, seed=100 + step), keys_of_step(step, 2)
    return {"latents": latents, "prompt": list(prompts), "sample_keys": keys, "step": step}


# Relation-focal sampling


def test_density_has_the_official_values(paper):
    """ziqihuangg/ReVersion df6855e, train.py, importance_sampling_fn, alpha 0.5, divided by the sum of all 1000."""
    density = paper.method.relation_focal_density(1000, 0.5)
    expected = torch.tensor(
        [0.0005002501250625313, 0.0006467699944039283, 0.0010005002501250627, 0.0015007479065542062]
    )
    torch.testing.assert_close(density[[0, 250, 500, 999]], expected.double(), rtol=1e-6, atol=0)
    # closed forms of the sums of 1 - cos(pi t / 1000) / 2
    assert density[:250].sum().item() == pytest.approx(0.13746, abs=1e-5)
    assert density[750:].sum().item() == pytest.approx(0.36265, abs=1e-5)
    assert (density * torch.arange(1000)).sum().item() == pytest.approx(600.87, abs=0.01)
    assert paper.method.relation_focal_density(10, 0.0).tolist() == pytest.approx([0.1] * 10)


def test_timesteps_follow_the_density(paper):
    """A grid of uniform numbers lands in each timestep as often as the density says."""
    density = paper.method.relation_focal_density(20, 0.8)
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    counts = torch.bincount(paper.method.relation_focal_timesteps(uniform, density), minlength=20) / 100_000
    torch.testing.assert_close(counts, density.float(), rtol=0, atol=2e-5)
    ends = paper.method.relation_focal_timesteps(torch.tensor([0.0, 1 - 1e-8]), density)
    assert ends.tolist() == [0, 19]


def test_training_draws_focal_timesteps(paper, backbone):
    method = make(paper, backbone, focal_skew=1.0)
    seen = []
    handle = backbone.unet.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    try:
        with torch.no_grad():
            for step in range(40):
                method.training_loss(batch(step))
    finally:
        handle.remove()
    drawn = torch.cat(seen).double()
    assert len(drawn) == 80 and drawn.mean() > 620 and drawn.min() > 20  # alpha = 1: the mean is 702, small t are rare


# Steering


def table():
    rows, columns = torch.arange(40.0)[:, None], torch.arange(8.0)[None]
    return torch.sin(1 + 0.37 * rows * (columns + 1) + 1.3 * columns)


@pytest.mark.parametrize(
    ("temperature", "loss", "gradient"),
    [
        (0.07, 0.4607839584350586,
         [0.0342776, 0.2620932, -0.4089808, 0.3831875, -0.1829571, -0.17185, 0.6420768, -1.1741599]),
        (0.5, 0.43581175804138184,
         [-0.1033188, 0.1132408, -0.1747497, -0.0166323, 0.0949794, -0.1471021, 0.2291509, -0.1479573]),
    ],
)  # fmt: skip
def test_steering_loss_and_gradient_are_the_official_ones(paper, temperature, loss, gradient):
    """ziqihuangg/ReVersion df6855e, train.py, calculate_steer_loss: <R> is row 39 of this table, captions
    [[0,5,39,7,1,1],[0,8,39,12,2,1]], stop ids [2,20,21,22,23], special ids [0,1], positives
    [[0,20,21,22,1,1],[0,23,20,1,1,1]]."""
    words = table().requires_grad_()
    found = paper.method.relation_steering_loss(
        words[39], words[[20, 21, 22, 23, 20]], words[[5, 7, 8, 12]], temperature
    )
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(words.grad[39], torch.tensor(gradient), rtol=1e-4, atol=1e-6)
    assert not words.grad[:39].any()


def test_captions_without_content_words_have_no_negatives(paper):
    words = table()
    assert paper.method.relation_steering_loss(words[39], words[:3], words[:0], 0.07).item() == pytest.approx(
        0, abs=1e-6
    )


def test_words_of_the_sets(paper, backbone):
    method, tokenizer = make(paper, backbone), backbone.tokenizer
    known = paper.words.single_tokens(tokenizer, paper.words.PREPOSITIONS)
    assert len(known) >= 20 and {"on", "under", "behind", "inside", "above"} <= known.keys()
    assert not set(paper.words.PREPOSITIONS) & set(paper.words.STOP_WORDS)
    assert len(set(paper.words.PREPOSITIONS)) == len(paper.words.PREPOSITIONS)
    negatives = method.negatives_of(["a photo of the duck <R> a red chair", "a duck on a mug"])
    words = [tokenizer.convert_ids_to_tokens(token).removesuffix("</w>") for token in negatives]
    assert words == ["photo", "duck", "red", "chair", "duck", "mug"]
    drawn = [tuple(method.positives_of(key)) for key in range(50)]
    assert all(len(set(ids)) == 4 and set(ids) <= set(known.values()) for ids in drawn)
    assert len(set(drawn)) > 45 and drawn[3] == tuple(method.positives_of(3))


def test_steering_loss_of_a_batch_by_hand(paper, backbone):
    method, keys = make(paper, backbone), torch.tensor([5, 6])
    prompts = ["a duck <R> a chair", "a car <R> a mug"]
    ids = [backbone.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("duck", "chair", "car", "mug")]
    rows = torch.nn.functional.normalize(method.word_table, dim=1).detach().double()
    start = torch.nn.functional.normalize(method.relation.detach(), dim=1)[0].double()
    positives = [*method.positives_of(5), *method.positives_of(6)]
    near, far = ((rows[group] @ start / 0.07).exp().sum() for group in (positives, ids))
    expected = -torch.log(near / (near + far)).item()
    assert method.steering_loss(prompts, keys).item() == pytest.approx(expected, rel=1e-4)


# What is trained


def test_loss_is_denoising_plus_weighted_steering(paper, backbone):
    """The first part is the loss of common/training on the same draws."""
    method = make(paper, backbone, steering_weight=0.3)
    told = batch(3)
    with torch.no_grad():
        whole = method.training_loss(told)
        steering = method.steering_loss(told["prompt"], told["sample_keys"])

        def focal(sample_keys, seed, num_train_timesteps):
            return paper.method.relation_focal_timesteps(
                seeded_uniform(sample_keys, seed=seed, stream="timesteps"), method.density
            )

        noised = noise_batch(backbone, told["latents"], told["sample_keys"], seed=0, timestep_sampler=focal)
        plain = common_denoising_loss(backbone, noised, backbone.encode_prompt(told["prompt"])).mean()
    assert whole.item() == pytest.approx((plain + 0.3 * steering).item(), rel=1e-5)


def test_only_the_word_learns(paper, backbone):
    method = make(paper, backbone)
    before = {name: p.clone() for name, p in backbone.unet.named_parameters()}
    table_before = method.word_table.clone()
    ((name, word),) = method.parameters()
    start = word.detach().clone()
    and_id = backbone.tokenizer("and", add_special_tokens=False).input_ids[0]
    assert name == "relation" and torch.equal(start[0], method.word_table[and_id])
    optimizer, losses = torch.optim.AdamW([word], lr=5e-3, weight_decay=0.01), []
    for step in range(5):
        loss = method.training_loss(batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert not torch.equal(word, start) and torch.equal(method.word_table, table_before)
    assert all(torch.equal(p, before[name]) for name, p in backbone.unet.named_parameters())
    assert all(p.grad is None for module in backbone.modules for p in module.parameters())
    assert losses == pytest.approx(LOSSES_OF_FIVE_STEPS, rel=1e-4)


def test_steering_alone_draws_the_word_to_prepositions(paper, backbone):
    method = make(paper, backbone)
    nouns = ["duck", "chair", "car", "mug"]
    before, optimizer = method.cosines(nouns), torch.optim.AdamW([method.relation], lr=5e-3)
    for step in range(60):
        method.steering_loss(batch(step)["prompt"], batch(step)["sample_keys"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = method.cosines(nouns)
    assert after["prepositions"] - after["nouns"] > before["prepositions"] - before["nouns"] + 0.1


def test_numbers_on_stable_diffusion(paper):
    method = paper.method.ReVersion(load_backbone("sd15", weights="meta"), paper.config.ReVersionConfig())
    assert [tuple(p.shape) for _, p in method.parameters()] == [(1, 768)]
    assert sum(4 * p.numel() for _, p in method.parameters()) == 3072


# The artifact


def test_artifact_round_trip_and_stock_diffusers(paper, backbone, tmp_path):
    method = make(paper, backbone)
    with torch.no_grad():
        method.relation.add_(0.3 * randn(1, 32))
    method.save(tmp_path)
    tensors, header = load_safetensors(tmp_path / "learned_embeds.safetensors")
    assert list(tensors) == ["<R>"] and header["slug"] == paper.slug
    assert json.loads((tmp_path / "artifact.json").read_text())["slug"] == paper.slug
    pictures = method.generate("a duck <R> a chair", seeds=[1], num_inference_steps=1)
    again = paper.method.load_method(tmp_path)
    assert torch.equal(again.generate("a duck <R> a chair", seeds=[1], num_inference_steps=1), pictures)

    pipe: StableDiffusionPipeline = load_backbone(backbone.name).to_pipeline()
    pipe.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    embeds = pipe.encode_prompt("a duck <R> a chair", "cpu", 1, False)[0]
    with torch.no_grad():
        assert torch.equal(embeds, backbone.encode_prompt("a duck <R> a chair").prompt_embeds)


def test_foreign_artifacts_are_refused(paper, backbone, tmp_path):
    atomic_save_safetensors({"<R>": torch.zeros(1, 32)}, tmp_path / "other.safetensors", {"slug": "another"})
    with pytest.raises(ValueError, match="was not written by this method, but by another"):
        paper.method.load_method(tmp_path / "other.safetensors")
    atomic_save_safetensors({"<R>": torch.zeros(1, 8)}, tmp_path / "narrow.safetensors", {"slug": paper.slug})
    with pytest.raises(ValueError, match="narrow.safetensors holds"):
        make(paper, backbone).load(tmp_path / "narrow.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_steps": 0}, "train_steps must be >= 1"),
        ({"num_positives": 0}, "num_positives must be >= 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"steering_weight": -1.0}, "steering_weight must be >= 0"),
        ({"focal_skew": 1.5}, r"focal_skew must be in \[0, 1\]"),
    ],
)
def test_bad_settings(paper, changes, message):
    with pytest.raises(ValueError, match=message):
        paper.config.ReVersionConfig(**changes)


def test_too_few_prepositions_and_two_text_encoders_are_refused(paper, backbone):
    with pytest.raises(ValueError, match="prepositions, 99 are drawn"):
        paper.words.preposition_ids(backbone.tokenizer, 99)
    with pytest.raises(ValueError, match="two text encoders"):
        paper.method.ReVersion(load_backbone("sdxl", weights="meta"), paper.config.ReVersionConfig())

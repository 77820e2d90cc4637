"""The equations against hand-worked and official numbers, what is trained and what is not, the artifact."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common.backbones import load_backbone
from common.io import atomic_save_safetensors, load_safetensors
from common.training.losses import denoising_loss as common_denoising_loss
from common.training.noising import noise_batch
from common.training.seeding import derive_seed, keys_of_step

LOSSES_OF_FIVE_STEPS = [1.0661154, 1.1625412, 1.1176248, 1.2354569, 1.1203637]
# calculate_steer_loss of ziqihuangg/ReVersion, train.py at 4b24980, for a table of torch.randn(12, 6) with seed 0: rows
# 1-3 positive, 4-8 negative, 0 and 10 special. (row of the placeholder, temperature) -> value, gradient by that row.
REVERSION = {
    (11, 0.07): (1.6436214447, [2.6955099, 3.2721200, -0.7373363, 3.3285623, 2.3066142, 2.5802450]),
    (9, 0.07): (9.6953420639, [0.3017279, -0.5105467, -0.4987572, 1.7733595, -0.1258979, -1.2981911]),
    (11, 0.5): (1.0191547871, [0.0791455, 0.1629471, -0.0035104, 0.4395067, 0.0610616, 0.0023468]),
}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def concept_of(paper, *words):
    entry = paper.words.ConceptWord
    known = {
        "upside": entry(word="upside", positives=("over", "tilted"), negatives=("upright", "normal")),
        "down": entry(word="down", positives=("below",), negatives=("up",)),
    }
    return tuple(known[word] for word in words)


def make(paper, backbone, words=("upside", "down"), **changes):
    config = replace(paper.config.LegoConfig.tiny(), class_noun="bear", num_inference_steps=2, **changes)
    return paper.method.Lego(backbone, replace(config, concept=concept_of(paper, *words)))


def moved(method):
    """Vectors away from the words that they started at."""
    with torch.no_grad():
        for i, (_, vectors) in enumerate(method.parameters()):
            vectors.add_(0.3 * randn(*vectors.shape, seed=i))
    return method


def batch(step: int, count: int = 2) -> dict:
    prompts = {"subject": "a photo of a <subject>", "concept": "a photo of a <subject> <concept>"}
    sets = {
        name: {"latents": randn(count, 4, 8, 8, seed=10 * step + k), "prompt": [prompt] * count}
        for k, (name, prompt) in enumerate(prompts.items())
    }
    return {**sets, "sample_keys": keys_of_step(step, count), "step": step}


def adam_steps(method, steps):
    """Losses of some steps of AdamW."""
    optimizer = torch.optim.AdamW([p for _, p in method.parameters()], lr=5e-3, weight_decay=0.0)
    losses = []
    for step in range(steps):
        loss = method.training_loss(batch(step))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


# The equations


@pytest.mark.parametrize(("row", "temperature"), REVERSION)
def test_context_loss_is_reversions_for_one_vector(paper, row, temperature):
    table = randn(12, 6)
    concept = table[row : row + 1].clone().requires_grad_(True)
    positives, negatives = (table[rows].clone().requires_grad_(True) for rows in (slice(1, 4), slice(4, 9)))
    found = paper.method.context_losses(concept, [positives], [negatives], temperature)
    found.sum().backward()
    value, gradient = REVERSION[row, temperature]
    torch.testing.assert_close(found.detach(), torch.tensor([value]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(concept.grad, torch.tensor([gradient]), rtol=1e-4, atol=1e-5)
    assert positives.grad is None and negatives.grad is None


def test_context_loss_by_hand(paper):
    """Cosines 1 and 0 to the positives, 0 to the negative of the first; -1 and 1 of the second; tau = 1 and 0.5."""
    e, loss = math.e, paper.method.context_losses
    concept = torch.tensor([[2.0, 0.0], [0.0, -3.0]])  # lengths do not matter
    positives = [torch.tensor([[5.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]])]
    negatives = [torch.tensor([[0.0, -4.0]]), torch.tensor([[0.0, -1.0]])]
    expected = [-math.log((e + 1) / (e + 2)), -math.log(e**-1 / (e**-1 + e))]
    torch.testing.assert_close(loss(concept, positives, negatives, 1.0), torch.tensor(expected))
    sharper = [-math.log((e**2 + 1) / (e**2 + 2)), -math.log(e**-2 / (e**-2 + e**2))]
    torch.testing.assert_close(loss(concept, positives, negatives, 0.5), torch.tensor(sharper))


def test_each_vector_has_lists_of_its_own(paper):
    concept = randn(2, 6).requires_grad_(True)
    lists = [[randn(n, 6, seed=n) for n in sizes] for sizes in ((3, 1), (2, 5))]
    together = paper.method.context_losses(concept, *lists, 0.07)
    for i in range(2):
        (alone,) = paper.method.context_losses(concept[i : i + 1], *([rows[i]] for rows in lists), 0.07)
        assert together[i].item() == pytest.approx(alone.item())
    together[0].backward()
    assert concept.grad[0].abs().sum() > 0 and (concept.grad[1] == 0).all()


def test_lego_loss_by_hand(paper):
    """(mean(1, 3) + mean(5, 9)) / 2 + 0.1 x mean(2, 4)."""
    found = paper.method.lego_loss(
        torch.tensor([1.0, 3.0]), torch.tensor([5.0, 9.0]), torch.tensor([2.0, 4.0]), context_weight=0.1
    )
    assert found.item() == pytest.approx(4.5 + 0.3)


def test_cosine_gaps_by_hand(paper):
    """The first: cosine to (1, 1) / 2 is 1 / sqrt 2, to (-1, 0) is -1. The second is equally far from both."""
    concept = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    positives = [torch.tensor([[9.0, 0.0], [0.0, 0.1]]), torch.tensor([[1.0, 0.0]])]
    negatives = [torch.tensor([[-7.0, 0.0]]), torch.tensor([[-1.0, 0.0]])]
    expected = torch.tensor([1 / math.sqrt(2) + 1, 0.0])
    torch.testing.assert_close(paper.method.cosine_gaps(concept, positives, negatives), expected)


def test_training_loss_is_that_of_both_sets_apart(paper, backbone):
    """Reference: one picture at a time with the shared layer's loss, and the context loss from cosine similarities."""
    method, shown = moved(make(paper, backbone, context_weight=0.3)), batch(1)
    with torch.no_grad():
        losses = []
        for name, seed in (("subject", derive_seed(0, "subject set")), ("concept", 0)):
            for i in range(2):
                part = slice(i, i + 1)
                noised = noise_batch(backbone, shown[name]["latents"][part], shown["sample_keys"][part], seed=seed)
                losses.append(common_denoising_loss(backbone, noised, backbone.encode_prompt(shown[name]["prompt"][i])))
        context = []
        for vector, p, n in zip(method.concept, method.positives, method.negatives, strict=True):
            weights = [torch.exp(F.cosine_similarity(vector[None], rows) / 0.07).sum() for rows in (p, n)]
            context.append(-torch.log(weights[0] / sum(weights)))
        expected = torch.cat(losses).mean() + 0.3 * torch.stack(context).mean()
        torch.testing.assert_close(method.training_loss(shown), expected, rtol=1e-4, atol=1e-5)


# Prompts and vectors


def test_vectors_stand_in_phrase_order_where_the_placeholders_are(paper, backbone):
    """What leaves the token table: s, c_1, c_2 in a row, and the vocabulary's rows around them."""
    method, seen = moved(make(paper, backbone)), []
    table = backbone.text_encoder.get_input_embeddings()
    handle = table.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        with torch.no_grad():
            backbone.encode_prompt("a photo of a <subject> <concept> in the snow")
    finally:
        handle.remove()
    ids = backbone.tokenizer("a photo of a bear upside down in the snow").input_ids
    expected = table.weight[ids].detach().clone()
    expected[5:8] = torch.cat([method.subject, method.concept]).detach()
    torch.testing.assert_close(seen[0][0, : len(ids)], expected, rtol=0, atol=0)


def test_they_start_at_the_class_noun_and_the_words_of_the_phrase(paper, backbone):
    with torch.no_grad():
        plain = backbone.encode_prompt("a photo of a bear upside down").prompt_embeds
        method = make(paper, backbone)
        found = backbone.encode_prompt("a photo of a <subject> <concept>").prompt_embeds
        assert torch.equal(found, plain)
        other = backbone.encode_prompt("a dog in the snow").prompt_embeds
        moved(method)
        assert not torch.allclose(backbone.encode_prompt("a photo of a <subject> <concept>").prompt_embeds, plain)
        assert torch.equal(backbone.encode_prompt("a dog in the snow").prompt_embeds, other)
        method.tokens.remove()
        assert torch.equal(backbone.encode_prompt("a photo of a bear upside down").prompt_embeds, plain)


def test_concept_prompts_have_no_class_noun(paper):
    config = paper.config.LegoConfig(class_noun="bear")
    assert config.subject_prompts()[0] == "a photo of a <subject>"
    assert config.concept_prompts()[0] == "a photo of a <subject> <concept>"
    pairs = zip(config.subject_prompts(), config.concept_prompts(), strict=True)
    assert all(c == f"{s} <concept>" and "bear" not in c for s, c in pairs)
    assert len(config.concept_prompts()) == 27 and len(replace(config, kind="plain").concept_prompts()) == 1


# What changes and what does not


def test_only_the_vectors_are_trained(paper, backbone):
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in backbone.modules]
    method = make(paper, backbone)
    start = [p.detach().clone() for _, p in method.parameters()]
    adam_steps(method, 2)
    assert all(p.grad is None for module in backbone.modules for p in module.parameters())
    for module, old in zip(backbone.modules, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in module.state_dict().items())
    assert all((p.detach() != old).all() for (_, p), old in zip(method.parameters(), start, strict=True))


def test_set_s_teaches_the_subject_alone(paper, backbone):
    """Without the concept in any prompt its gradient is that of the context loss, lambda / k times its own."""
    shown = batch(0)
    shown["concept"]["prompt"] = ["a photo of a bear"] * 2
    for weight in (0.0, 0.5):
        if backbone.placeholders is not None:
            backbone.placeholders.remove()
        method = moved(make(paper, backbone, context_weight=weight))
        method.training_loss(shown).backward()
        vectors = method.concept.detach().clone().requires_grad_(True)
        paper.method.context_losses(vectors, method.positives, method.negatives, 0.07).sum().backward()
        torch.testing.assert_close(method.concept.grad, weight / 2 * vectors.grad, rtol=1e-5, atol=1e-7)
        assert method.subject.grad.abs().sum() > 0


def test_the_context_loss_reaches_the_concept_alone(paper, backbone):
    gradients = []
    for weight in (0.0, 10.0):
        if backbone.placeholders is not None:
            backbone.placeholders.remove()
        method = moved(make(paper, backbone, context_weight=weight))
        method.training_loss(batch(0)).backward()
        gradients.append((method.subject.grad.clone(), method.concept.grad.clone()))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(gradients[0][1], gradients[1][1], rtol=0.1)


def test_the_context_loss_turns_vectors_to_their_positives(paper, backbone):
    method = moved(make(paper, backbone, context_weight=10.0))
    before = method.cosines()["cosine_gap"]
    adam_steps(method, 5)
    assert method.cosines()["cosine_gap"] > before


def test_losses_of_five_steps(paper, backbone):
    """Stored with torch 2.13.0 on a CPU: the small random Stable Diffusion of conftest.py, AdamW."""
    assert adam_steps(make(paper, backbone), 5) == pytest.approx(LOSSES_OF_FIVE_STEPS, rel=1e-4)


# Counts and artifacts


@pytest.mark.parametrize("words", [("down",), ("upside", "down")])
def test_bytes_on_stable_diffusion(paper, words):
    """The sheet: k x 3,072 bytes for the concept, and as much for one more vector, the subject."""
    for name, width in (("sd15", 768), ("tiny-sd", 256)):
        method = make(paper, load_backbone(name, weights="meta"), words)
        sizes = {key: p.numel() * p.element_size() for key, p in method.parameters()}
        assert sizes == {"subject": 4 * width, "concept": len(words) * 4 * width}
    assert 3 * 4 * 768 == 9_216  # a phrase of three words


def test_save_and_load_give_the_same_picture(paper, backbone, backbone_folder, tmp_path):
    method = moved(make(paper, backbone))
    method.save(tmp_path)
    concept, header = load_safetensors(tmp_path / "learned_embeds.safetensors")
    assert {name: tuple(t.shape) for name, t in concept.items()} == {"<concept>": (2, 32)}
    subject, _ = load_safetensors(tmp_path / "subject_embeds.safetensors")
    assert torch.equal(subject["<subject>"], method.subject.detach())
    page = json.loads((tmp_path / "artifact.json").read_text())
    assert header["slug"] == page["slug"] == paper.slug and page["phrase"] == "upside down"
    assert page["concept"][1] == {"word": "down", "positives": ["below"], "negatives": ["up"]}
    prompts = ("a photo of a dog <concept>", "a photo of a <subject> <concept>")
    drawn = [method.generate(prompt, seeds=[3]) for prompt in prompts]
    assert drawn[0].shape == (1, 3, 32, 32)
    loaded = paper.method.load_method(tmp_path / "learned_embeds.safetensors", backbone_folder)
    assert loaded.config == method.config
    assert all(torch.equal(loaded.generate(p, seeds=[3]), picture) for p, picture in zip(prompts, drawn, strict=True))


def test_stock_diffusers_loads_the_concept(paper, backbone, backbone_folder, tmp_path):
    """A pipeline that has never seen our code uses both vectors, in order."""
    method = moved(make(paper, backbone))
    method.save(tmp_path)
    with torch.no_grad():
        ours = backbone.encode_prompt("a photo of a dog <concept> in the snow").prompt_embeds
        pipe = load_backbone(backbone_folder).to_pipeline()
        pipe.load_textual_inversion(tmp_path)
        stock, _ = pipe.encode_prompt("a photo of a dog <concept> in the snow", "cpu", 1, False)
    torch.testing.assert_close(stock, ours, rtol=1e-5, atol=1e-6)


def test_foreign_and_ill_fitting_artifacts_are_named(paper, backbone, backbone_folder, tmp_path):
    make(paper, backbone, ("down",)).save(tmp_path)
    backbone.placeholders.remove()
    with pytest.raises(ValueError, match=r"learned_embeds.safetensors has vectors \(1, 32\), this method \(2, 32\)"):
        make(paper, backbone).load(tmp_path)
    (tmp_path / "subject_embeds.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="subject_embeds.safetensors"):
        paper.method.load_method(tmp_path, backbone_folder)
    atomic_save_safetensors({"<x>": torch.zeros(1, 32)}, tmp_path / "learned_embeds.safetensors", {"slug": "another"})
    with pytest.raises(ValueError, match="was not written by this method, but by another"):
        paper.method.load_method(tmp_path, backbone_folder)


def test_bad_settings_and_backbones_are_named(paper, backbone):
    config = paper.config.LegoConfig
    bad = {
        "train_steps": 0, "batch_size": 3, "learning_rate": float("nan"), "temperature": 0.0, "context_weight": -1.0,
        "kind": "x", "placeholder": "<Frozen>", "subject_placeholder": "<concept>",
    }  # fmt: skip
    for field, value in bad.items():
        with pytest.raises(ValueError, match="two placeholders" if field == "subject_placeholder" else field):
            config(**{field: value})
    with pytest.raises(ValueError, match="the config has no concept"):
        paper.method.Lego(backbone, config())
    with pytest.raises(ValueError, match="initializer_token must be one token"):
        paper.method.Lego(backbone, config(concept=concept_of(paper, "down"), class_noun="hippopotamus"))
    with pytest.raises(ValueError, match="two text encoders"):
        paper.method.Lego(load_backbone("sdxl", weights="meta"), config(concept=concept_of(paper, "down")))

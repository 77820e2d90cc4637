"""The equations, what is trained and what is not, and the artifact."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from common.backbones import load_backbone
from common.training.losses import denoising_loss as common_denoising_loss
from common.training.noising import noise_batch
from common.training.seeding import keys_of_step

LOSSES_OF_FIVE_STEPS = [1.1281317, 1.0846523, 1.0931389, 1.1382079, 1.0786512]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(step: int, prompts: list[str]) -> dict:
    latents = randn(2, 4, 16, 16, seed=100 + step)
    keys = keys_of_step(step, 2)
    return {
        "latents": latents,
        "prompt": prompts,
        "image_index": torch.tensor([0, 1]),
        "sample_keys": keys,
        "step": step,
    }


def make(paper, backbone, **changes):
    config = replace(paper.config.TextualInversionConfig.tiny(), initializer_token="duck", **changes)
    return paper.method.TextualInversion(backbone, config)


# The equations


def test_insertion_of_several_vectors_shifts_the_tail_and_cuts_it(paper):
    """By hand: rows 10, 11, ...; placeholder 9 at positions 1 and 3 of 6; vectors -1, -2."""
    embeds = torch.tensor([[10.0], [11.0], [12.0], [13.0], [14.0], [15.0]])[None]
    ids = torch.tensor([[1, 9, 2, 9, 3, 4]])
    one = paper.method.insert_pseudo_word(embeds, ids, 9, torch.tensor([[-1.0]]))
    assert one.flatten().tolist() == [10, -1, 12, -1, 14, 15]
    two = paper.method.insert_pseudo_word(embeds, ids, 9, torch.tensor([[-1.0], [-2.0]]))
    assert two.flatten().tolist() == [10, -1, -2, 12, -1, -2]
    absent = paper.method.insert_pseudo_word(embeds, ids, 7, torch.tensor([[-1.0], [-2.0]]))
    assert torch.equal(absent, embeds)


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_the_backbone_reads_a_pseudo_word_as_the_equation_says(paper, backbone, num_vectors):
    """PlaceholderTokens against the paper's step, with a manual causal pass of the text encoder behind it."""
    ids = backbone.tokenizer("a photo of a duck in the snow", padding="max_length", return_tensors="pt").input_ids
    (duck,) = backbone.tokenizer("duck", add_special_tokens=False).input_ids
    method, vectors = make(paper, backbone, num_vectors=num_vectors), randn(num_vectors, 256)
    with torch.no_grad():
        method.vectors[0].copy_(vectors)
        encoder = backbone.text_encoder
        embeds = paper.method.insert_pseudo_word(encoder.embeddings.token_embedding.weight[ids], ids, duck, vectors)
        mask = torch.full((1, 1, 77, 77), torch.finfo(torch.float32).min).triu(1)
        hidden = encoder.encoder(inputs_embeds=encoder.embeddings(inputs_embeds=embeds), attention_mask=mask)
        expected = encoder.final_layer_norm(hidden.last_hidden_state)
        got = backbone.encode_prompt("a photo of a <duck> in the snow").prompt_embeds
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_distance_to_start_is_the_mean_squared_distance(paper):
    """By hand: (3^2 + 4^2 + 0 + 2^2) / 2. The official Gram matrix would add the cross terms of the rows."""
    vectors, start = torch.tensor([[3.0, 4.0], [1.0, 3.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert paper.method.distance_to_start(vectors, start).item() == pytest.approx(29 / 2)
    difference = vectors - start
    assert paper.method.distance_to_start(vectors, start) == (difference @ difference.T).diagonal().mean()


def test_denoising_loss_is_the_mean_squared_error_of_the_noise(paper, backbone):
    """Reference: the sum over all numbers, from a call of the UNet itself; and the loss of common/training."""
    noised = noise_batch(backbone, randn(2, 4, 16, 16), torch.tensor([0, 1]), seed=0)
    conditioning = backbone.encode_prompt(["a duck", "a red house"])
    with torch.no_grad():
        losses = paper.method.denoising_loss(backbone, noised, conditioning)
        answer = backbone.unet(noised["noisy_latents"], noised["timesteps"], conditioning.prompt_embeds).sample
        expected = [((answer[i] - noised["noise"][i]) ** 2).sum() / (4 * 16 * 16) for i in range(2)]
        torch.testing.assert_close(losses, torch.stack(expected))
        torch.testing.assert_close(losses, common_denoising_loss(backbone, noised, conditioning))


def test_stages_of_the_progressive_extension(paper):
    """1 + floor(step / 2000) vectors: the paper's 5000 steps with three vectors."""
    lengths = paper.variants.stage_lengths
    assert lengths(5000, 2000, 3) == [2000, 2000, 1000]
    assert lengths(5000, 2000, 2) == [2000, 3000]
    assert lengths(1500, 2000, 3) == [1500]
    assert lengths(4000, 2000, 9) == [2000, 2000]
    with pytest.raises(ValueError, match="unlock_every"):
        lengths(100, 0, 2)


# What changes and what does not


def test_a_new_pseudo_word_changes_nothing_and_removal_restores_the_backbone(paper, backbone):
    latents, timesteps = randn(1, 4, 16, 16), torch.tensor([500])

    def output(prompt):
        with torch.no_grad():
            return backbone.predict_noise(latents, timesteps, backbone.encode_prompt(prompt))

    base = output("a photo of a duck")
    method = make(paper, backbone)
    assert torch.equal(output("a photo of a duck"), base)
    assert torch.equal(output("a photo of a <duck>"), base)  # it starts as its initializer
    with torch.no_grad():
        method.vectors[0].add_(randn(1, 256))
    assert torch.equal(output("a photo of a duck"), base)
    assert not torch.allclose(output("a photo of a <duck>"), base)
    method.tokens.remove()
    assert torch.equal(output("a photo of a duck"), base)


def test_only_the_vectors_are_trained(paper, backbone):
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in backbone.modules]
    method = make(paper, backbone, num_vectors=2)
    parameters = dict(method.parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {"vectors.0": (2, 256)}
    optimizer = torch.optim.AdamW(parameters.values(), lr=5e-3, weight_decay=0.0)
    for step in range(2):
        method.training_loss(batch(step, ["a photo of a <duck>", "a rendition of a <duck>"])).backward()
        assert method.vectors[0].grad.abs().amin(1).min() > 0
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for module in backbone.modules for p in module.parameters())
    for module, old in zip(backbone.modules, before, strict=True):  # every row of the embedding table is in there
        assert all(torch.equal(value, old[name]) for name, value in module.state_dict().items())
    assert not torch.equal(method.vectors[0], method.initial_vectors[0])


def test_losses_of_five_steps(paper, backbone):
    """Stored with torch 2.13.0 on a CPU: random tiny-sd with seed 0, AdamW without decay."""
    method = make(paper, backbone, regularisation_weight=0.1)
    optimizer = torch.optim.AdamW([p for _, p in method.parameters()], lr=0.05, weight_decay=0.0)
    losses = []
    for step in range(5):
        loss = method.training_loss(batch(step, ["a photo of a <duck>", "a photo of my <duck>"]))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(LOSSES_OF_FIVE_STEPS, rel=1e-4)


def test_the_regulariser_adds_its_weight_times_the_distance(paper, backbone):
    method = make(paper, backbone, regularisation_weight=0.5)
    with torch.no_grad():
        method.vectors[0].add_(0.1)  # squared distance 256 x 0.01
        prompts = ["a photo of a <duck>", "a photo of my <duck>"]
        with_it = method.training_loss(batch(0, prompts))
        method.config = replace(method.config, regularisation_weight=0.0)
        without = method.training_loss(batch(0, prompts))
    assert (with_it - without).item() == pytest.approx(0.5 * 2.56, rel=1e-4)


def test_per_image_tokens_stand_in_a_quarter_of_the_prompts_and_learn(paper, backbone):
    config = replace(paper.config.TextualInversionConfig.tiny(), initializer_token="duck")
    method = paper.variants.PerImageTextualInversion(backbone, config, num_images=2)
    assert len(method.parameters()) == 1 + 2
    keys = torch.arange(4000)
    rows = {"prompt": ["a photo of a <duck>"] * 4000, "image_index": keys % 2, "sample_keys": keys}
    prompts = method.prompts(rows)
    counts = {prompt: prompts.count(prompt) for prompt in set(prompts)}
    first, second = (f"a photo of a <duck> with {token}" for token in method.image_tokens)
    assert set(counts) == {"a photo of a <duck>", first, second}
    assert counts[first] + counts[second] == pytest.approx(1000, abs=90)  # three standard deviations
    assert all(prompts[k] != second for k in range(0, 4000, 2))
    together = batch(0, ["a photo of a <duck>"] * 2)
    together["sample_keys"] = torch.tensor([prompts.index(first), prompts.index(second)])
    method.training_loss(together).backward()
    assert all(parameter.grad.abs().sum() > 0 for _, parameter in method.parameters())


# The artifact


def test_artifact_round_trip_and_size(paper, backbone, tmp_path):
    method = make(paper, backbone, num_vectors=2)
    with torch.no_grad():
        method.vectors[0].copy_(randn(2, 256))
    method.save(tmp_path)
    expected, path = method.vectors[0].detach().clone(), tmp_path / "learned_embeds.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["slug"] == paper.slug
        assert list(file.keys()) == ["<duck>"] and torch.equal(file.get_tensor("<duck>"), expected)
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header_bytes + 2 * 256 * 4
    assert json.loads((tmp_path / "artifact.json").read_text())["slug"] == paper.slug
    method.tokens.remove()
    again = make(paper, backbone, num_vectors=2)
    again.load(tmp_path)
    assert torch.equal(again.vectors[0], expected)
    method.tokens.remove()
    with pytest.raises(ValueError, match="learned_embeds.safetensors has vectors of shapes"):
        make(paper, backbone, num_vectors=3).load(tmp_path)


def test_size_on_stable_diffusion_1_is_3072_bytes(paper):
    """768 float32 numbers (the paper's LDM: 1280, 5120 bytes)."""
    method = make(paper, load_backbone("sd15", weights="meta"))
    assert sum(p.numel() * p.element_size() for _, p in method.parameters()) == 3072


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_stock_diffusers_reads_the_artifact(paper, backbone_folder, tmp_path, num_vectors):
    """Text features and a picture, of a pipeline that has never seen our code."""
    ours = make(paper, load_backbone(backbone_folder), num_vectors=num_vectors)
    with torch.no_grad():
        ours.vectors[0].copy_(randn(num_vectors, 32))
    ours.save(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(backbone_folder, safety_checker=None, requires_safety_checker=False)
    pipe.load_textual_inversion(tmp_path)
    with torch.no_grad():
        theirs, _ = pipe.encode_prompt("a photo of a <duck> in the snow", "cpu", 1, False)
        torch.testing.assert_close(theirs, ours.backbone.encode_prompt("a photo of a <duck> in the snow").prompt_embeds)


def test_load_method_generates_what_was_saved(paper, backbone_folder, tmp_path):
    method = make(paper, load_backbone(backbone_folder))
    with torch.no_grad():
        method.vectors[0].copy_(randn(1, 32))
    method.save(tmp_path)
    expected = method.generate("a photo of a <duck>", seeds=[3], num_inference_steps=2)
    loaded = paper.method.load_method(tmp_path / "learned_embeds.safetensors")
    assert loaded.config == method.config
    assert torch.equal(loaded.generate("a photo of a <duck>", seeds=[3], num_inference_steps=2), expected)
    assert expected.shape == (1, 3, 32, 32) and expected.abs().max() <= 1


def test_a_foreign_artifact_says_what_to_do(paper, tmp_path):
    from safetensors.torch import save_file

    save_file({"<x>": torch.zeros(1, 32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="load_learned_embeds"):
        paper.method.load_method(tmp_path / "x.safetensors")


# The settings


def test_presets_build_and_state_the_effective_learning_rate(paper):
    config = paper.config.TextualInversionConfig
    assert config().learning_rate == pytest.approx(0.005 * 2 * 4)  # base lr x GPUs x batch
    assert config.sd().learning_rate == pytest.approx(5e-4 * 4)
    assert (config().train_steps, config.tiny().train_steps, config.tiny().batch_size) == (5000, 200, 4)
    for preset in (config(), config.sd(), config.tiny()):
        assert preset.weight_decay == 0 and preset.num_vectors == 1
        assert preset.plain_prompt() == "a photo of a <object>" and len(preset.training_prompts()) == 27
    style = config(kind="style", initializer_token="painting", placeholder_token="*s*")
    assert style.plain_prompt() == "a painting in the style of *s*" and len(style.training_prompts()) == 19


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_vectors", 0), ("train_steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", float("nan")),
     ("weight_decay", -0.1), ("regularisation_weight", -1.0), ("kind", "person"), ("num_inference_steps", 0)],
)  # fmt: skip
def test_bad_settings_are_named(paper, field, value):
    with pytest.raises(ValueError, match=field):
        paper.config.TextualInversionConfig(**{field: value})


def test_an_initializer_of_several_tokens_is_refused(paper, backbone):
    config = replace(paper.config.TextualInversionConfig.tiny(), initializer_token="rhinoceros")
    with pytest.raises(ValueError, match="initializer_token must be one token"):
        paper.method.TextualInversion(backbone, config)

"""The contexts of the layers, what is trained and what is not, mixing, and the artifact."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from common.backbones import PlaceholderTokens, load_backbone
from common.backbones.attention import enable_gradient_checkpointing
from common.io import atomic_save_safetensors, load_safetensors
from common.training.losses import denoising_loss as common_denoising_loss
from common.training.noising import noise_batch
from common.training.seeding import keys_of_step

PROMPTS = ["a photo of a <duck> in the snow", "a <duck>"]
LOSSES_OF_FIVE_STEPS = [1.1146951, 1.1792638, 1.2114730, 1.1831229, 1.1296409]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(paper, backbone, **changes):
    changes = {"initializer_token": "duck", "num_inference_steps": 2} | changes
    return paper.method.PPlus(backbone, replace(paper.config.PPlusConfig.tiny(), **changes))


def batch(step: int, prompts=("a photo of a <duck>", "a rendition of a <duck>")) -> dict:
    latents, keys = randn(2, 4, 8, 8, seed=100 + step), keys_of_step(step, 2)
    return {"latents": latents, "prompt": list(prompts), "sample_keys": keys, "step": step}


def distinct_words(method):
    with torch.no_grad():
        for i, word in enumerate(method.words):
            word.add_(0.3 * randn(1, 32, seed=i))
    return method


# The prompts and the contexts


def test_each_layer_is_told_its_own_token(paper):
    told = paper.method.layer_prompts("a <duck> and a <ducks> on a <duck>", ["<duck>", "<ducks>"], 2)
    assert told == [f"a <duck>[{i}] and a <ducks>[{i}] on a <duck>[{i}]" for i in range(2)]
    assert paper.method.layer_prompts("sks sks1", ["sks", "sks1"], 1) == ["sks[0] sks1[0]"]  # one never inside another


def test_each_layer_reads_the_context_of_its_own_word(paper, backbone):
    """Reference: a manual causal pass of the text encoder for each layer, and a processor written here."""
    method, latents, timesteps = distinct_words(make(paper, backbone)), randn(2, 4, 8, 8), torch.tensor([10, 900])
    encoder, tokenizer = backbone.text_encoder, backbone.tokenizer

    def context(layer):
        texts = [prompt.replace("<duck>", "duck") for prompt in PROMPTS]
        ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        (duck,) = tokenizer("duck", add_special_tokens=False).input_ids
        embeds = encoder.embeddings.token_embedding.weight[ids].clone()
        embeds[ids == duck] = method.words[layer][0]
        mask = torch.full((1, 1, 77, 77), torch.finfo(torch.float32).min).triu(1)
        hidden = encoder.encoder(inputs_embeds=encoder.embeddings(inputs_embeds=embeds), attention_mask=mask)[0]
        return encoder.final_layer_norm(hidden)

    class Reference(AttnProcessor):
        def __init__(self, told):
            self.told = told

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            query, key, value = (
                attn.head_to_batch_dim(part)
                for part in (attn.to_q(hidden_states), attn.to_k(self.told), attn.to_v(self.told))
            )
            mixed = torch.bmm(attn.get_attention_scores(query, key), value)
            return attn.to_out[0](attn.batch_to_head_dim(mixed))

    blocks = [*backbone.unet.down_blocks[:1], backbone.unet.mid_block, backbone.unet.up_blocks[1]]
    attentions = [t.transformer_blocks[0].attn2 for block in blocks for t in block.attentions]
    assert len(attentions) == method.num_layers == 4
    with torch.no_grad():
        conditioning = method.conditioning(PROMPTS)
        got = backbone.predict_noise(latents, timesteps, conditioning)
        before = [attention.processor for attention in attentions]
        for layer, attention in enumerate(attentions):
            told = conditioning.for_layer(layer, timesteps)[0]
            torch.testing.assert_close(told, context(layer), rtol=1e-4, atol=1e-5)
            attention.processor = Reference(context(layer))
        expected = backbone.unet(latents, timesteps, torch.zeros(2, 77, 32)).sample
        for attention, processor in zip(attentions, before, strict=True):
            attention.processor = processor
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_all_layers_prompts_are_one_batch_of_the_text_encoder(paper, backbone):
    """Two prompts in four layers are eight rows of one call; what is said twice is encoded once."""
    method, rows = make(paper, backbone), []
    handle = backbone.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(args), with_kwargs=True
    )
    try:
        with torch.no_grad():
            sizes = [len(method.conditioning(prompts).prompt_embeds) for prompts in (PROMPTS, PROMPTS * 2, ["a duck"])]
    finally:
        handle.remove()
    assert [len(args[0]) for args in rows] == [8, 8, 1] and sizes == [2, 4, 1]


def test_the_unconditional_half_is_told_the_empty_prompt_in_all_layers(paper, backbone):
    """What reaches the key projection of each layer while a picture is made: the empty prompt, then the own context."""
    method, told = distinct_words(make(paper, backbone)), {}
    modules = dict(backbone.unet.named_modules())
    handles = [
        modules[name].to_k.register_forward_pre_hook(lambda _, args, name=name: told.setdefault(name, args[0]))
        for name in method.layer_names
    ]
    try:
        method.generate("a <duck>", seeds=[0], num_inference_steps=1)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        empty, own = backbone.encode_prompt("").prompt_embeds[0], method.conditioning(["a <duck>"])
    for layer, name in enumerate(method.layer_names):
        assert torch.equal(told[name][0], empty)
        assert torch.equal(told[name][1], own.for_layer(layer, torch.tensor([0]))[0][0])


def test_one_word_for_all_layers_is_textual_inversion(paper, backbone):
    """Reference: the same word as one placeholder of the plain text encoder, and the stock UNet."""
    word, latents, timesteps = randn(1, 32, seed=7), randn(2, 4, 8, 8), torch.tensor([10, 900])
    method = make(paper, backbone)
    method.set_layer_words(word)
    with torch.no_grad():
        tied = backbone.predict_noise(latents, timesteps, method.conditioning(PROMPTS))
        PlaceholderTokens.add(method.tokens, "<one>", initial_vectors=word)
        context = backbone.encode_prompt([prompt.replace("<duck>", "<one>") for prompt in PROMPTS]).prompt_embeds
        plain = backbone.unet(latents, timesteps, context).sample
    torch.testing.assert_close(tied, plain, rtol=1e-6, atol=1e-6)


def test_the_class_word_in_all_layers_is_the_base(paper, backbone):
    latents, timesteps = randn(1, 4, 8, 8), torch.tensor([500])

    def output(conditioning):
        with torch.no_grad():
            return backbone.predict_noise(latents, timesteps, conditioning)

    base = output(backbone.encode_prompt("a photo of a duck"))
    method = make(paper, backbone)
    torch.testing.assert_close(output(method.conditioning(["a photo of a <duck>"])), base, rtol=1e-6, atol=1e-6)
    distinct_words(method)
    assert not torch.allclose(output(method.conditioning(["a photo of a <duck>"])), base)
    assert torch.equal(output(method.conditioning(["a photo of a duck"])), base)  # no S*: all layers share one context
    method.tokens.remove()
    assert torch.equal(output(backbone.encode_prompt("a photo of a duck")), base)


def test_denoising_loss_is_the_mean_squared_error(paper, backbone):
    noised = noise_batch(backbone, randn(2, 4, 8, 8), torch.tensor([0, 1]), seed=0)
    conditioning = make(paper, backbone).conditioning(PROMPTS)
    with torch.no_grad():
        losses = paper.method.denoising_loss(backbone, noised, conditioning)
        answer = backbone.predict_noise(noised["noisy_latents"], noised["timesteps"], conditioning)
        expected = [((answer[i] - noised["noise"][i]) ** 2).sum() / (4 * 8 * 8) for i in range(2)]
        torch.testing.assert_close(losses, torch.stack(expected))
        torch.testing.assert_close(losses, common_denoising_loss(backbone, noised, conditioning))


# What changes and what does not


def test_only_the_words_are_trained(paper, backbone):
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in backbone.modules]
    method = make(paper, backbone)
    start = method.layer_words()
    optimizer = torch.optim.AdamW([p for _, p in method.parameters()], lr=5e-3, weight_decay=0.0)
    for step in range(2):
        method.training_loss(batch(step)).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in method.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for module in backbone.modules for p in module.parameters())
    for module, old in zip(backbone.modules, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in module.state_dict().items())
    assert ((method.layer_words() != start).all(1)).all()


@pytest.mark.parametrize("layer", range(4))
def test_a_word_learns_through_its_own_layer_alone(paper, backbone, layer):
    """Cut the value projection of one layer: its word gets no gradient through keys that nothing depends on."""
    method = distinct_words(make(paper, backbone))
    value = dict(backbone.unet.named_modules())[method.layer_names[layer]].to_v
    kept = value.weight.detach().clone()
    try:
        with torch.no_grad():
            value.weight.zero_()
        method.training_loss(batch(0)).backward()
    finally:
        with torch.no_grad():
            value.weight.copy_(kept)
    sizes = [word.grad.abs().sum().item() for word in method.words]
    assert [size == 0 for size in sizes] == [i == layer for i in range(4)]


def test_losses_of_five_steps(paper, backbone):
    """Stored with torch 2.13.0 on a CPU: the small random Stable Diffusion of conftest.py, AdamW."""
    method = make(paper, backbone)
    optimizer = torch.optim.AdamW([p for _, p in method.parameters()], lr=5e-3, weight_decay=0.0)
    losses = []
    for step in range(5):
        loss = method.training_loss(batch(step))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(LOSSES_OF_FIVE_STEPS, rel=1e-4)


def test_gradients_are_those_of_plain_backpropagation_with_checkpointing(paper, backbone):
    """Checkpointing runs blocks again in reverse order; a layer must still find its own context."""
    method = distinct_words(make(paper, backbone))
    method.training_loss(batch(0)).backward()
    plain = [word.grad.clone() for word in method.words]
    for word in method.words:
        word.grad = None
    enable_gradient_checkpointing(backbone.unet)
    backbone.unet.train()
    try:
        method.training_loss(batch(0)).backward()
    finally:
        backbone.unet.disable_gradient_checkpointing()
        backbone.unet.eval()
    for word, expected in zip(method.words, plain, strict=True):
        torch.testing.assert_close(word.grad, expected, rtol=1e-4, atol=1e-7)


# Mixing


def test_fills_say_what_each_layer_is_told(paper, backbone):
    method, timesteps = distinct_words(make(paper, backbone)), torch.tensor([5])
    fills = ["<duck>", "red car", "red car", "<duck>"]
    with torch.no_grad():
        found = method.conditioning(["a photo of a <duck>"], fills)
        own = method.conditioning(["a photo of a <duck>"])
        car = backbone.encode_prompt("a photo of a red car").prompt_embeds
    for layer, fill in enumerate(fills):
        expected = car if fill == "red car" else own.for_layer(layer, timesteps)[0]
        torch.testing.assert_close(found.for_layer(layer, timesteps)[0], expected, rtol=1e-5, atol=1e-6)
    pictures = [method.generate("a <duck>", seeds=[0], fills=f) for f in (None, ["<duck>"] * 4, fills)]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


def test_another_concept_can_be_added_and_mixed(paper, backbone, tmp_path):
    other = distinct_words(make(paper, backbone, initializer_token="dog"))
    other.save(tmp_path)
    alone = other.generate("a <dog>", seeds=[0])
    backbone.placeholders.remove()
    method = make(paper, backbone)
    assert method.add_concept(tmp_path) == "<dog>"
    torch.testing.assert_close(method.generate("a <duck>", seeds=[0], fills=["<dog>"] * 4), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(method.generate("a <dog>", seeds=[0]), alone, rtol=1e-5, atol=1e-5)


def test_bands_of_stable_diffusion(paper):
    """By hand from the sheet: 0,1 at 64; 2,3 at 32; 4,5 at 16; 6 at 8; 7-9 at 16; 10-12 at 32; 13-15 at 64."""
    b = paper.bands
    grids = b.layer_grids(load_backbone("sd15", weights="meta").unet)
    assert grids == [64, 64, 32, 32, 16, 16, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    assert b.inner_band(grids) == (4, 10)
    assert [4 * g for g in b.layer_grids(load_backbone("tiny-sd", weights="meta").unet)] == grids
    assert b.outermost(16, 6) == [0, 1, 2, 13, 14, 15] and b.outermost(5, 3) == [0, 3, 4]
    assert b.widened((4, 10), -2, 16) == [6, 7] and b.widened((4, 10), 5, 16) == list(range(15))
    drawn = [b.random_layers(16, 6, seed) for seed in range(4)]
    assert all(len(set(layers)) == 6 and max(layers) < 16 for layers in drawn) and len(set(map(tuple, drawn))) > 1
    assert b.fill_layers("x", [1, 2], "y", 4) == ["y", "x", "x", "y"]
    with pytest.raises(ValueError, match=r"0\.\.3, got \[4\]"):
        b.fill_layers("x", [4], "y", 4)
    for grids in ([8, 8], [8, 2, 8, 2]):
        with pytest.raises(ValueError, match="no single band"):
            b.inner_band(grids)


# Counts and artifacts


def test_counts_on_stable_diffusion(paper):
    method = paper.method.PPlus(load_backbone("sd15", weights="meta"), paper.config.PPlusConfig())
    words = [word for _, word in method.parameters()]
    assert method.num_layers == 16 and sum(word.numel() for word in words) == 16 * 768 == 12_288
    assert sum(word.numel() * word.element_size() for word in words) == 49_152  # the sheet's tensor data
    assert method.layer_names[6] == "mid_block.attentions.0.transformer_blocks.0.attn2"
    tiny = paper.method.PPlus(load_backbone("tiny-sd", weights="meta"), paper.config.PPlusConfig())
    assert tiny.num_layers == 16


def test_save_and_load_give_the_same_picture(paper, backbone, backbone_folder, tmp_path):
    method = distinct_words(make(paper, backbone))
    method.save(tmp_path)
    tensors, header = load_safetensors(tmp_path / "layer_words.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"words": (4, 32)}
    assert json.loads(header["layers"]) == method.layer_names and header["slug"] == paper.slug
    assert json.loads((tmp_path / "artifact.json").read_text())["placeholder"] == "<duck>"
    picture = method.generate("a photo of a <duck>", seeds=[3])
    assert picture.shape == (1, 3, 32, 32)
    loaded = paper.method.load_method(tmp_path, backbone_folder)
    assert torch.equal(loaded.generate("a photo of a <duck>", seeds=[3]), picture)


def test_foreign_and_ill_fitting_artifacts_are_named(paper, backbone, tmp_path):
    method = make(paper, backbone)
    path = tmp_path / "layer_words.safetensors"
    atomic_save_safetensors({"words": torch.zeros(4, 32)}, path, {"slug": "another"})
    with pytest.raises(ValueError, match="layer_words.safetensors was not written by this method, but by another"):
        method.load(tmp_path)
    header = {"slug": paper.slug, "layers": "[]", "backbone": "sd15"}
    atomic_save_safetensors({"words": torch.zeros(16, 768)}, path, header)
    with pytest.raises(ValueError, match=r"holds words \(16, 768\) for the layers of sd15"):
        method.load(tmp_path)


def test_presets_and_bad_settings(paper):
    config = paper.config.PPlusConfig
    assert (config().train_steps, config().learning_rate, config().batch_size) == (500, 5e-3, 8)
    assert len(config().training_prompts()) == 27 and len(config(kind="style").training_prompts()) == 19
    assert config.tiny().training_prompts() == ["a photo of a <object>"] == [config().plain_prompt()]
    for field, value in (("train_steps", 0), ("learning_rate", float("nan")), ("weight_decay", -1.0), ("kind", "x")):
        with pytest.raises(ValueError, match=field):
            config(**{field: value})


def test_bad_prompts_and_backbones_are_named(paper, backbone):
    method = make(paper, backbone)
    with pytest.raises(ValueError, match="one text for each of the 4 layers, got 3"):
        method.generate("a <duck>", seeds=[0], fills=["x"] * 3)
    with pytest.raises(ValueError, match="no <duck> to put words in the place of: 'a duck'"):
        method.generate("a duck", seeds=[0], fills=["x"] * 4)
    with pytest.raises(ValueError, match="two text encoders"):
        paper.method.PPlus(load_backbone("sdxl", weights="meta"), paper.config.PPlusConfig())


def test_log_density_by_hand(paper):
    """Two rows at -1 and 1 on one axis: variance 2, Scott's factor 2^(-1/5), so kernels of variance 2 x 2^(-2/5)."""
    table = torch.zeros(2, 3)
    table[:, 1] = torch.tensor([-1.0, 1.0])
    variance = 2 * 2 ** (-2 / 5)
    kernel = np.exp(-1 / (2 * variance)) / np.sqrt(2 * np.pi * variance)  # of both rows, at 0
    found = paper.experiments.log_density(torch.zeros(1, 3), table, components=1)
    assert found == pytest.approx(np.log(kernel))
    assert paper.experiments.log_density(torch.full((1, 3), 9.0), table, components=1) < found - 5

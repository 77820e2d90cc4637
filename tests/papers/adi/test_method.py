"""Contexts and gradients of the layers, what is trained and what is not, equalities with inversion, the artifact."""

import json
from dataclasses import replace

import pytest
import torch

from common.backbones import Conditioning, PlaceholderTokens, load_backbone
from common.backbones.attention import enable_gradient_checkpointing
from common.io import atomic_save_safetensors, load_safetensors
from common.training.losses import denoising_loss as common_denoising_loss
from common.training.noising import noise_batch
from common.training.seeding import keys_of_step

PROMPTS = ["a photo of a bear <A> in the snow", "a woman <A>"]
LOSSES_OF_FIVE_STEPS = [1.2128091, 1.0671146, 1.1935898, 1.2588779, 1.1200699]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(paper, backbone, kind=None, **changes):
    config = replace(paper.config.ADIConfig.tiny(), num_inference_steps=2, **changes)
    return (kind or paper.method.ADI)(backbone, config)


def distinct(method):
    """Identifiers that differ from layer to layer."""
    method.set_identifiers(method.identifiers.detach() + 0.3 * randn(*method.identifiers.shape, seed=9))
    return method


def batch(step: int, count: int = 1) -> dict:
    """Made-up triples."""
    names = ("anchor", "other_context", "other_action")
    latents = {name: randn(count, 4, 8, 8, seed=100 * step + k) for k, name in enumerate(names)}
    prompts = {"prompt": PROMPTS[:count], "other_context_prompt": ["a photo of a robot <A>", "a bear <A>"][:count]}
    return {**latents, **prompts, "sample_keys": keys_of_step(step, count), "step": step}


def adam_steps(method, steps):
    """Losses of some steps of AdamW."""
    optimizer, losses = torch.optim.AdamW([method.identifiers], lr=5e-3, weight_decay=0.0), []
    for step in range(steps):
        loss = method.training_loss(batch(step))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def layer_tokens_conditioning(backbone, prompts, identifiers):
    """The same contexts by another way: a placeholder for each layer, and the plain text encoder."""
    tokens = backbone.placeholders
    words = []
    for i, identifier in enumerate(identifiers):
        words += tokens.add(f"<layer{i}>", initial_vectors=identifier[None])
    contexts = [
        backbone.encode_prompt([prompt.replace("<A>", f"<layer{i}>") for prompt in prompts]).prompt_embeds
        for i in range(len(identifiers))
    ]
    return Conditioning(contexts[0], layer_prompt_embeds=tuple(contexts)), words


# Contexts and gradients


def test_each_layer_reads_the_context_of_its_own_identifier(paper, backbone):
    method, latents, timesteps = distinct(make(paper, backbone)), randn(2, 4, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        got = backbone.predict_noise(latents, timesteps, method.conditioning(PROMPTS))
        other, _ = layer_tokens_conditioning(backbone, PROMPTS, method.identifiers.detach())
        torch.testing.assert_close(got, backbone.predict_noise(latents, timesteps, other), rtol=1e-4, atol=1e-5)
        modules, told = dict(backbone.unet.named_modules()), {}
        handles = [
            modules[name].to_k.register_forward_pre_hook(lambda _, args, name=name: told.update({name: args[0]}))
            for name in method.layer_names
        ]
        backbone.predict_noise(latents, timesteps, method.conditioning(PROMPTS))
    for handle in handles:
        handle.remove()
    for layer, name in enumerate(method.layer_names):
        torch.testing.assert_close(told[name], other.for_layer(layer, timesteps)[0], rtol=1e-4, atol=1e-5)


def test_gradients_of_a_triple_are_those_of_three_separate_samples(paper, backbone):
    """Reference: one sample at a time, through a placeholder token for each layer and plain backpropagation."""
    method, triple = distinct(make(paper, backbone)), batch(3)
    losses, gradients = method.sample_gradients(triple)
    assert gradients.shape == (3, 1, 4, 32) and losses.shape == (3, 1)
    prompts = (triple["prompt"], triple["other_context_prompt"], triple["prompt"])
    for k, name in enumerate(paper.method.TRIPLE):
        backbone.placeholders.remove()
        PlaceholderTokens(backbone)
        told, words = layer_tokens_conditioning(backbone, prompts[k], method.identifiers.detach())
        noised = noise_batch(backbone, triple[name], triple["sample_keys"], seed=0)  # the same keys for all three
        loss = common_denoising_loss(backbone, noised, told).sum()
        loss.backward()
        torch.testing.assert_close(losses[k, 0], loss.detach(), rtol=1e-4, atol=1e-6)
        expected = torch.cat([word.grad for word in words])
        torch.testing.assert_close(gradients[k, 0], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_a_triple_shares_timestep_and_noise(paper, backbone):
    method, triple = make(paper, backbone), batch(0)
    triple |= {"other_context": triple["anchor"], "other_context_prompt": triple["prompt"]}
    losses, gradients = method.sample_gradients(triple)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6 * float(gradients.abs().max()))
    assert losses[0] == pytest.approx(losses[1].item(), rel=1e-5)
    assert not torch.allclose(gradients[0], gradients[2], rtol=1e-2)


def test_what_is_followed_is_the_masked_anchor_gradient(paper, backbone):
    method, triple = distinct(make(paper, backbone, kept_share=0.3)), batch(1)
    losses, gradients = method.sample_gradients(triple)
    loss = method.training_loss(triple)
    loss.backward()
    masks = paper.method.identifier_masks(*gradients, 0.3, "union")
    assert 0.3 <= masks.double().mean() < 0.6
    assert loss.item() == pytest.approx(losses[0].item())
    torch.testing.assert_close(method.identifiers.grad, (masks * gradients[0])[0])
    assert ((method.identifiers.grad == 0) == ~masks[0]).all()


def test_triples_of_a_batch_are_masked_apart(paper, backbone):
    """The gradient of two triples is the mean of theirs, so that accumulated micro-batches change nothing."""
    method, both = distinct(make(paper, backbone, kept_share=0.3)), batch(2, count=2)
    found = []
    for part in (slice(0, 2), slice(0, 1), slice(1, 2)):
        method.training_loss(
            {name: value if name == "step" else value[part] for name, value in both.items()}
        ).backward()
        found.append(method.identifiers.grad.clone())
        method.identifiers.grad = None
    whole, first, second = found
    torch.testing.assert_close(whole, (first + second) / 2, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_with_all_channels_it_is_layerwise_inversion(paper, backbone):
    """beta = 1 and union, the same seed: five steps of AdamW against the plain loss of the anchors."""
    method = make(paper, backbone, kept_share=1.0)
    losses, masked = adam_steps(method, 5), method.identifiers.detach().clone()
    backbone.placeholders.remove()
    plain = make(paper, backbone, paper.variants.LayerwiseInversion)
    start = plain.identifiers.detach().clone()
    assert losses == pytest.approx(adam_steps(plain, 5), rel=1e-5)
    moved = (plain.identifiers.detach() - start).abs().mean()
    assert moved > 1e-3 and (masked - plain.identifiers.detach()).abs().mean() < 1e-3 * moved


def test_tied_identifiers_are_textual_inversion_with_the_summed_gradient(paper, backbone):
    """Reference: one placeholder, one context, the stock U-Net."""
    word, triple = randn(1, 32, seed=7), batch(4)
    method = make(paper, backbone, kept_share=1.0)
    method.set_identifiers(word)
    method.training_loss(triple).backward()
    (one,) = method.tokens.add("<one>", initial_vectors=word)
    noised = noise_batch(backbone, triple["anchor"], triple["sample_keys"], seed=0)
    context = backbone.encode_prompt([prompt.replace("<A>", "<one>") for prompt in triple["prompt"]]).prompt_embeds
    answer = backbone.unet(noised["noisy_latents"], noised["timesteps"], context).sample
    ((answer - noised["noise"]) ** 2).mean().backward()
    scale = float(one.grad.abs().max())
    torch.testing.assert_close(method.identifiers.grad.sum(0), one.grad[0], rtol=1e-3, atol=1e-5 * scale)


def test_the_initial_word_in_all_layers_is_the_base(paper, backbone):
    latents, timesteps = randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        base = backbone.predict_noise(latents, timesteps, backbone.encode_prompt("a bear pose"))
        plain = backbone.encode_prompt("a bear").prompt_embeds
        method = make(paper, backbone)
        same = backbone.predict_noise(latents, timesteps, method.conditioning(["a bear <A>"]))
        torch.testing.assert_close(same, base, rtol=1e-5, atol=1e-6)
        other = backbone.predict_noise(latents, timesteps, distinct(method).conditioning(["a bear <A>"]))
        assert not torch.allclose(other, base, rtol=1e-3)
        assert torch.equal(backbone.encode_prompt("a bear").prompt_embeds, plain)
        method.tokens.remove()
        assert torch.equal(backbone.predict_noise(latents, timesteps, backbone.encode_prompt("a bear pose")), base)


# What changes and what does not


def test_only_unmasked_channels_of_the_identifiers_are_trained(paper, backbone):
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in backbone.modules]
    method = make(paper, backbone, kept_share=0.3)
    start = method.identifiers.detach().clone()
    masks = method.masks(method.sample_gradients(batch(0))[1], None)[0]
    adam_steps(method, 1)
    assert torch.equal(method.identifiers.detach() != start, masks)  # masked channels: not by a bit
    assert all(p.grad is None for module in backbone.modules for p in module.parameters())
    assert all(not p.requires_grad for p in method.tokens.parameters())
    for module, old in zip(backbone.modules, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in module.state_dict().items())


def test_a_channel_masked_later_moves_by_its_momentum_alone(paper, backbone):
    """D4, by Adam's formula: gradient g in step 1, none in step 2. A channel masked in both steps stays."""
    method = make(paper, backbone)
    shown = torch.zeros(2, 1, 4, 32, dtype=torch.bool)
    shown[0, ..., :8] = True  # in step 1; nothing in step 2
    method.masks = lambda gradients, keys: shown[int(keys[0])]
    start, g = method.identifiers.detach().clone(), method.sample_gradients(batch(0))[1][0, 0, :, :8]
    adam_steps(method, 1)
    after_one = method.identifiers.detach().clone()
    method.set_identifiers(start)
    adam_steps(method, 2)
    m, v = 0.9 * 0.1 * g / (1 - 0.9**2), 0.999 * 0.001 * g**2 / (1 - 0.999**2)
    expected = after_one[:, :8] - 5e-3 * m / (v.sqrt() + 1e-8)
    torch.testing.assert_close(method.identifiers.detach()[:, :8], expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(method.identifiers.detach()[:, 8:], start[:, 8:])


def test_losses_of_five_steps(paper, backbone):
    """Stored with torch 2.13.0 on a CPU: the small random Stable Diffusion of conftest.py, AdamW."""
    assert adam_steps(make(paper, backbone), 5) == pytest.approx(LOSSES_OF_FIVE_STEPS, rel=1e-4)


def test_gradients_are_the_same_with_checkpointing(paper, backbone):
    method = distinct(make(paper, backbone))
    plain = method.sample_gradients(batch(0))[1]
    enable_gradient_checkpointing(backbone.unet)
    backbone.unet.train()
    try:
        checkpointed = method.sample_gradients(batch(0))[1]
    finally:
        backbone.unet.disable_gradient_checkpointing()
        backbone.unet.eval()
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6 * float(plain.abs().max()))


def test_random_masks_have_the_density_of_the_real_ones(paper, backbone):
    method = make(paper, backbone, paper.variants.RandomMasks, kept_share=0.3)
    gradients = method.sample_gradients(batch(0))[1]
    found = method.masks(gradients, torch.tensor([0]))
    real = paper.method.identifier_masks(*gradients, 0.3, "union")
    assert torch.equal(found.sum(-1), real.sum(-1)) and not torch.equal(found, real)


# Counts and artifacts


@pytest.mark.parametrize(("name", "width", "size"), [("sd15", 768, 49_152), ("sd21", 1024, 65_536)])
def test_counts_on_stable_diffusion(paper, name, width, size):
    method = paper.method.ADI(load_backbone(name, weights="meta"), paper.config.ADIConfig())
    ((_, identifiers),) = method.parameters()
    assert identifiers.shape == (16, width) and identifiers.dtype == torch.float32
    assert identifiers.numel() * identifiers.element_size() == size  # the sheet's tensor data
    assert method.layer_names[6] == "mid_block.attentions.0.transformer_blocks.0.attn2"


def test_save_and_load_give_the_same_picture(paper, backbone, backbone_folder, tmp_path):
    method = distinct(make(paper, backbone))
    method.save(tmp_path)
    tensors, header = load_safetensors(tmp_path / "identifiers.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"identifiers": (4, 32)}
    assert json.loads(header["layers"]) == method.layer_names and header["slug"] == paper.slug
    assert json.loads((tmp_path / "artifact.json").read_text())["placeholder"] == "<A>"
    picture = method.generate("a photo of a bear <A>", seeds=[3])
    assert picture.shape == (1, 3, 32, 32)
    assert not torch.equal(picture, method.generate("a photo of a bear", seeds=[3]))
    loaded = paper.method.load_method(tmp_path, backbone_folder)
    assert torch.equal(loaded.generate("a photo of a bear <A>", seeds=[3]), picture)


def test_foreign_and_ill_fitting_artifacts_are_named(paper, backbone, tmp_path):
    method = make(paper, backbone)
    path = tmp_path / "identifiers.safetensors"
    atomic_save_safetensors({"identifiers": torch.zeros(4, 32)}, path, {"slug": "another"})
    with pytest.raises(ValueError, match="identifiers.safetensors was not written by this method, but by another"):
        method.load(tmp_path)
    header = {"slug": paper.slug, "layers": "[]", "backbone": "sd15"}
    atomic_save_safetensors({"identifiers": torch.zeros(16, 768)}, path, header)
    with pytest.raises(ValueError, match=r"holds identifiers \(16, 768\) for the layers of sd15"):
        method.load(tmp_path)


def test_presets_and_bad_settings(paper):
    config = paper.config.ADIConfig
    assert (config().kept_share, config().merge, config().placeholder) == (0.6, "union", "<A>")
    assert config.tiny().batch_size == 1
    wrong = {"train_steps": 0, "batch_size": 0, "learning_rate": float("nan"), "kept_share": 0.0, "merge": "both"}
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=field):
            config(**{field: value})
    with pytest.raises(ValueError, match=r"kept_share must be in \(0, 1\], got 1.5"):
        config(kept_share=1.5)


def test_bad_prompts_and_backbones_are_named(paper, backbone):
    method = make(paper, backbone)
    with pytest.raises(ValueError, match="the prompt has no <A>: 'a bear'"):
        method.conditioning(["a bear"])
    with pytest.raises(ValueError, match=r"\d+ tokens, but .* reads 77"):
        method.conditioning(["<A> " + 80 * "bear "])
    with pytest.raises(ValueError, match="two text encoders"):
        paper.method.ADI(load_backbone("sdxl", weights="meta"), paper.config.ADIConfig())

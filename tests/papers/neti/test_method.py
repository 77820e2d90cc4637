"""The text side's equations, what is trained and what is not, sampling, and the artifact."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open

from common.backbones import load_backbone
from common.training.losses import denoising_loss as common_denoising_loss
from common.training.losses import fixed_noise_validation
from common.training.noising import noise_batch
from common.training.seeding import keys_of_step

PROMPTS = ["a photo of a <duck> in the snow", "a <duck>"]
LOSSES_OF_FIVE_STEPS = [1.1135135, 1.1787255, 1.2090311, 1.1809463, 1.1287810]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(paper, backbone, **changes):
    changes = {"super_category_token": "duck", "num_inference_steps": 2} | changes
    return paper.method.NeTI(backbone, replace(paper.config.NeTIConfig.tiny(), **changes))


def batch(step: int, prompts=("a photo of a <duck>", "a rendition of a <duck>")) -> dict:
    latents, keys = randn(2, 4, 8, 8, seed=100 + step), keys_of_step(step, 2)
    return {"latents": latents, "prompt": list(prompts), "sample_keys": keys, "step": step}


def read(backbone, prompts, word):
    """Token ids with an ordinary word in the placeholder's position, and that position in each prompt."""
    texts = [prompt.replace("<duck>", word) for prompt in prompts]
    ids = backbone.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    (word_id,) = backbone.tokenizer(word, add_special_tokens=False).input_ids
    return ids, ids == word_id


def features_by_hand(encoder, ids, places, words):
    """The text transformer with explicit causal mask, up to the last LayerNorm."""
    embeds = encoder.embeddings.token_embedding.weight[ids].clone()
    embeds[places] = words
    mask = torch.full((1, 1, 77, 77), torch.finfo(torch.float32).min).triu(1)
    return encoder.encoder(inputs_embeds=encoder.embeddings(inputs_embeds=embeds), attention_mask=mask)[0]


# The equations


def test_bypass_by_hand(paper):
    """E = (3, 4) has length 5; v_pass = (0, -7) has the direction (0, -1): E' = (3, 4 - 0.2 x 5). Elsewhere E' = E."""
    features = torch.tensor([[[3.0, 4.0], [6.0, 8.0]]])
    changed = paper.method.add_bypass(features, torch.tensor([[True, False]]), torch.tensor([[0.0, -7.0]]))
    torch.testing.assert_close(changed, torch.tensor([[[3.0, 3.0], [6.0, 8.0]]]))
    off = paper.method.add_bypass(features, torch.tensor([[True, True]]), torch.tensor([[1.0, 2.0]]), scale=0.0)
    assert torch.equal(off, features)


def test_text_contexts_are_those_of_the_equations(paper, backbone):
    """Reference: a manual pass of the text encoder, and the bypass with numpy, in front of the last LayerNorm."""
    encoder, words, bypass = backbone.text_encoder, randn(2, 32, seed=1), randn(2, 32, seed=2)
    ids, places = read(backbone, PROMPTS, "duck")
    with torch.no_grad():
        keys, values = paper.method.text_contexts(encoder, ids, places, words, bypass)
        features = features_by_hand(encoder, ids, places, words).numpy()
        expected = features.copy()
        for row, column in np.argwhere(places.numpy()):
            own, unit = features[row, column], bypass[row].numpy() / np.linalg.norm(bypass[row].numpy())
            expected[row, column] = own + 0.2 * np.linalg.norm(own) * unit
        torch.testing.assert_close(keys, encoder.final_layer_norm(torch.tensor(features)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, encoder.final_layer_norm(torch.tensor(expected)), rtol=1e-4, atol=1e-5)
    different = (keys != values).any(-1)
    assert torch.equal(different, places)


def test_each_layer_reads_its_own_keys_and_values(paper, backbone):
    """Reference: one processor per layer, written here, with the contexts of the equations."""
    method, timesteps = make(paper, backbone), torch.tensor([10, 900])
    latents = randn(2, 4, 8, 8)
    ids, places = read(backbone, PROMPTS, "cat")

    class Reference(AttnProcessor):
        def __init__(self, keys, values):
            self.keys, self.values = keys, values

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            split = [attn.head_to_batch_dim(p) for p in (
                attn.to_q(hidden_states), attn.to_k(self.keys), attn.to_v(self.values))]  # fmt: skip
            mixed = torch.bmm(attn.get_attention_scores(split[0], split[1]), split[2])
            return attn.to_out[0](attn.batch_to_head_dim(mixed))

    blocks = [*backbone.unet.down_blocks[:1], backbone.unet.mid_block, backbone.unet.up_blocks[1]]
    attentions = [t.transformer_blocks[0].attn2 for block in blocks for t in block.attentions]
    assert len(attentions) == method.num_layers == 4
    with torch.no_grad():
        got = backbone.predict_noise(latents, timesteps, method.conditioning(PROMPTS, timesteps))
        before = [attention.processor for attention in attentions]
        for layer, attention in enumerate(attentions):
            words, bypass = method.mapper(timesteps, torch.full((2,), layer))
            features = features_by_hand(backbone.text_encoder, ids, places, words)
            passed = paper.method.add_bypass(features, places, bypass)
            keys, values = (backbone.text_encoder.final_layer_norm(part) for part in (features, passed))
            attention.processor = Reference(keys, values)
        expected = backbone.unet(latents, timesteps, torch.zeros(2, 77, 32)).sample
        for attention, processor in zip(attentions, before, strict=True):
            attention.processor = processor
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_denoising_loss_is_the_mean_squared_error(paper, backbone):
    noised = noise_batch(backbone, randn(2, 4, 8, 8), torch.tensor([0, 1]), seed=0)
    conditioning = make(paper, backbone).conditioning(PROMPTS, noised["timesteps"])
    with torch.no_grad():
        losses = paper.method.denoising_loss(backbone, noised, conditioning)
        answer = backbone.predict_noise(noised["noisy_latents"], noised["timesteps"], conditioning)
        expected = [((answer[i] - noised["noise"][i]) ** 2).sum() / (4 * 8 * 8) for i in range(2)]
        torch.testing.assert_close(losses, torch.stack(expected))
        torch.testing.assert_close(losses, common_denoising_loss(backbone, noised, conditioning))


# What changes and what does not


def test_the_super_categorys_word_without_bypass_is_the_base_bit_for_bit(paper, backbone):
    """Prompts without S*, and S* with the super-category's own word in each layer, through all the hooks."""
    latents, timesteps = randn(1, 4, 8, 8), torch.tensor([500])

    def output(conditioning):
        with torch.no_grad():
            return backbone.predict_noise(latents, timesteps, conditioning)

    base = output(backbone.encode_prompt("a photo of a duck"))
    method = paper.variants.ExtendedTextualInversion(backbone, make_config(paper))
    assert torch.equal(output(backbone.encode_prompt("a photo of a duck")), base)
    assert torch.equal(output(method.conditioning(["a photo of a <duck>"], timesteps)), base)
    with torch.no_grad():
        method.mapper.words[2] += 1.0
    assert not torch.allclose(output(method.conditioning(["a photo of a <duck>"], timesteps)), base)
    method.tokens.remove()
    assert torch.equal(output(backbone.encode_prompt("a photo of a duck")), base)
    plain = make(paper, backbone).generate("a photo of a duck", seeds=[0])
    backbone.placeholders.remove()
    assert torch.equal(make(paper, backbone, seed=9).generate("a photo of a duck", seeds=[0]), plain)


def make_config(paper):
    return replace(paper.config.NeTIConfig.tiny(), super_category_token="duck")


def test_only_the_mapper_is_trained(paper, backbone):
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in backbone.modules]
    method = make(paper, backbone)
    start = {name: value.clone() for name, value in method.mapper.state_dict().items()}
    word = method.word.clone()
    optimizer = torch.optim.AdamW([p for _, p in method.parameters()], lr=2e-3)
    for step in range(2):
        method.training_loss(batch(step)).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in method.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for module in backbone.modules for p in module.parameters())
    for module, old in zip(backbone.modules, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in module.state_dict().items())
    assert torch.equal(method.word, word)
    changed = {name for name, value in method.mapper.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {name for name, _ in method.parameters()} == set(start) - {"frequencies", "length"}


def test_without_bypass_keys_and_values_are_one(paper, backbone):
    method = make(paper, backbone, bypass=False)
    conditioning = method.conditioning(PROMPTS, torch.tensor([1, 2]))
    assert conditioning.layer_value_embeds is None and conditioning.num_layers == 4
    assert method.mapper.output_layer.out_features == 32
    method.training_loss(batch(0)).backward()
    assert method.mapper.output_layer.weight.grad.abs().sum() > 0


def test_losses_of_five_steps(paper, backbone):
    """Stored with torch 2.13.0 on a CPU: the small random Stable Diffusion of conftest.py, AdamW."""
    method = make(paper, backbone)
    optimizer = torch.optim.AdamW([p for _, p in method.parameters()], lr=0.01, weight_decay=0.01)
    losses = []
    for step in range(5):
        loss = method.training_loss(batch(step))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(LOSSES_OF_FIVE_STEPS, rel=1e-4)


def test_nested_dropout_truncates_the_calls_that_were_drawn(paper, backbone, monkeypatch):
    method, seen = make(paper, backbone, nested_dropout=1.0), []

    def forward(timesteps, layers, keep):
        seen.append((timesteps, layers, keep))
        return type(method.mapper).forward(method.mapper, timesteps, layers, keep)

    monkeypatch.setattr(method.mapper, "forward", forward)
    with torch.no_grad():
        method.training_loss(batch(3))
    ((timesteps, layers, keep),) = seen
    drawn = paper.mapper.draw_truncation(keys_of_step(3, 2), 4, 1.0, seed=0)
    assert torch.equal(keep.view(2, 4), drawn) and layers.tolist() == [0, 1, 2, 3] * 2
    assert (timesteps.view(2, 4) == timesteps.view(2, 4)[:, :1]).all()


def test_ablations_see_one_input_alone(paper, backbone):
    late, early = torch.tensor([900, 900]), torch.tensor([1, 1])
    with torch.no_grad():
        time = paper.variants.TimeAlone(backbone, make_config(paper))
        keys, values = time.conditioning(PROMPTS, late).for_layer(0, late)
        other_layer, other_time = time.conditioning(PROMPTS, late), time.conditioning(PROMPTS, early)
        assert torch.equal(other_layer.for_layer(3, late)[0], keys) and not torch.equal(keys, values)
        assert not torch.allclose(other_time.for_layer(0, early)[0], keys)
        backbone.placeholders.remove()
        layer = paper.variants.LayerAlone(backbone, make_config(paper))
        keep = torch.tensor([[128, 3, 128, 9]] * 2)
        found = layer.conditioning(PROMPTS, late, keep)
        assert torch.equal(found.for_layer(1, late)[0], layer.conditioning(PROMPTS, early, keep).for_layer(1, early)[0])
        assert not torch.allclose(found.for_layer(1, late)[0], found.for_layer(0, late)[0])
        whole = layer.contexts(PROMPTS, late * 0, torch.arange(4), keep)[1]  # each prompt for itself gives the same
        torch.testing.assert_close(torch.stack(found.layer_value_embeds, 1), whole, rtol=1e-4, atol=1e-5)


def test_validation_loss_is_that_of_fixed_noise_at_each_timestep(paper, backbone):
    """Reference: a conditioning per timestep, validated one timestep at a time."""
    method, latents = make(paper, backbone), randn(1, 4, 8, 8)
    losses = []
    with torch.no_grad():
        for t in range(50, 1000, 100):
            conditioning = method.conditioning(["a photo of a <duck>"], torch.tensor([t]))
            losses.append(fixed_noise_validation(backbone, latents, conditioning, timesteps=(t,)))
    assert method.validation_loss(latents) == pytest.approx(np.mean(losses), rel=1e-5)


# Sampling


def test_pictures_are_made_with_the_conditioning_of_each_step(paper, backbone):
    """Reference: diffusers' DDIM in a plain loop, the empty prompt as the unconditional context."""
    method, prompt = make(paper, backbone, num_inference_steps=3), "a photo of a <duck> on the beach"
    got = method.generate(prompt, seeds=[7], keep=40)
    scheduler = DDIMScheduler.from_config(
        backbone.noise_scheduler.config, steps_offset=1, clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(3)
    latents, empty = randn(1, 4, 8, 8, seed=7), backbone.encode_prompt("")
    with torch.no_grad():
        for t in scheduler.timesteps:
            told = method.conditioning([prompt], t[None], torch.full((1, 4), 40))
            uncond, cond = (backbone.predict_noise(latents, t, part) for part in (empty, told))
            latents = scheduler.step(uncond + 5.0 * (cond - uncond), t, latents).prev_sample
        expected = backbone.decode_latents(latents)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.shape == (1, 3, 32, 32)
    assert not torch.allclose(method.generate(prompt, seeds=[7]), got)
    two = method.generate(prompt, seeds=[8, 7], keep=40, batch_size=1)
    torch.testing.assert_close(two[1:], got, rtol=1e-4, atol=1e-4)


def test_truncation_of_nothing_is_the_whole_mapper(paper, backbone):
    method = make(paper, backbone)
    pictures = [method.generate("a <duck>", seeds=[1], keep=keep) for keep in (None, 128, 0)]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


# The artifact


def test_artifact_round_trip_and_size(paper, backbone_folder, tmp_path):
    method = make(paper, load_backbone(backbone_folder))
    with torch.no_grad():
        for _, parameter in method.parameters():
            parameter.add_(randn(*parameter.shape) * 0.05)
    method.save(tmp_path)
    expected, path = method.generate("a photo of a <duck>", seeds=[3]), tmp_path / "mapper.safetensors"
    loaded = paper.method.load_method(path)
    assert loaded.config == method.config
    assert torch.equal(loaded.generate("a photo of a <duck>", seeds=[3]), expected)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["slug"] == paper.slug
    count = sum(p.numel() for _, p in method.parameters())
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header_bytes + 4 * (count + 2048 + 1)
    assert json.loads((tmp_path / "artifact.json").read_text())["placeholder"] == "<duck>"
    method.tokens.remove()
    with pytest.raises(ValueError, match="output_layer.bias"):
        make(paper, method.backbone, bypass=False).load(tmp_path)


def test_a_foreign_artifact_is_refused(paper, tmp_path):
    from safetensors.torch import save_file

    save_file({"<x>": torch.zeros(1, 32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors was not written by this method"):
        paper.method.load_method(tmp_path / "x.safetensors")


# Settings and errors


def test_presets_are_the_papers(paper):
    config = paper.config.NeTIConfig
    assert config().learning_rate == pytest.approx(1e-3 * 4 * 2)  # base rate x accumulation x batch
    assert (config().train_steps, config().batch_size, config().nested_dropout) == (1000, 8, 0.5)
    assert (config().scheduler, config().num_inference_steps, config().guidance_scale) == ("dpmpp", 50, 7.5)
    assert len(config().training_prompts()) == 27 and len(config(kind="style").training_prompts()) == 19
    assert config.tiny().training_prompts() == ["a photo of a <object>"] == [config().plain_prompt()]
    assert (config.tiny().scheduler, config.tiny().num_inference_steps, config.tiny().guidance_scale) == ("ddim", 30, 5)
    assert config(placeholder_token="*s*", kind="style").plain_prompt() == "a painting in the style of *s*"


@pytest.mark.parametrize(
    ("field", "value"),
    [("train_steps", 0), ("batch_size", 0), ("num_inference_steps", 0), ("learning_rate", 0.0), ("weight_decay", -1.0),
     ("learning_rate", float("nan")), ("nested_dropout", 1.5), ("nested_dropout", -0.1), ("kind", "person")],
)  # fmt: skip
def test_bad_settings_are_named(paper, field, value):
    with pytest.raises(ValueError, match=field):
        paper.config.NeTIConfig(**{field: value})


def test_bad_prompts_and_truncations_are_named(paper, backbone):
    method = make(paper, backbone)
    with pytest.raises(ValueError, match="keep must be in 0..128, got 129"):
        method.generate("a <duck>", seeds=[0], keep=129)
    with pytest.raises(ValueError, match="no <duck>: 'a duck'"):
        method.conditioning(["a duck"], torch.tensor([0]))
    with pytest.raises(ValueError, match="82 tokens, but .* reads 77"):
        method.conditioning(["a <duck>" + " a" * 78], torch.tensor([0]))


def test_two_text_encoders_are_refused(paper):
    with pytest.raises(ValueError, match="two text encoders"):
        paper.method.NeTI(load_backbone("sdxl", weights="meta"), paper.config.NeTIConfig())

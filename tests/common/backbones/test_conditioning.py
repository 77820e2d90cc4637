"""`Conditioning`, and the Backbone verbs that use it."""

import copy

import pytest
import torch

from common.backbones import Conditioning

LAYERS = 4  # cross-attention layers of the fixture `tiny_sd`


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rich(batch: int, seed: int = 0) -> Conditioning:
    """A conditioning in which every field is used."""
    tensors = [randn(batch, 5, 32, seed=seed + i) for i in range(12)]
    high = Conditioning(tensors[0], layer_prompt_embeds=tuple(tensors[1:5]))
    return Conditioning(
        tensors[5],
        stages=((0, Conditioning(tensors[6], value_embeds=tensors[7])), (500, high)),
        pooled_prompt_embeds=randn(batch, 7, seed=seed),
        time_ids=torch.arange(6).repeat(batch, 1),
        image_tokens=(tensors[8],),
        down_block_residuals=(randn(batch, 3, 2, 2),),
        mid_block_residual=randn(batch, 3, 2, 2),
    )


def test_for_layer_of_each_kind():
    keys, values = randn(2, 5, 8), randn(2, 5, 8, seed=1)
    layers = tuple(randn(2, 5, 8, seed=10 + i) for i in range(3))
    t = torch.tensor([3, 700])
    assert Conditioning(keys).for_layer(9, t) == (keys, keys)
    assert Conditioning(keys, value_embeds=values).for_layer(0, t) == (keys, values)
    assert Conditioning(keys, layer_prompt_embeds=layers).for_layer(2, t) == (layers[2], layers[2])
    assert Conditioning(keys, layer_prompt_embeds=layers, value_embeds=values).for_layer(1, t) == (layers[1], values)
    assert Conditioning(keys, layer_value_embeds=layers).for_layer(1, t) == (keys, layers[1])
    with pytest.raises(ValueError, match="layer_index 3 .* 3 layers"):
        Conditioning(keys, layer_prompt_embeds=layers).for_layer(3, t)


def test_samples_of_a_batch_can_be_in_different_stages():
    low, middle, high = (Conditioning(torch.full((5, 2, 3), float(value))) for value in (1, 2, 3))
    staged = Conditioning.staged({600: high, 0: low, 300: middle})
    keys, values = staged.for_layer(0, torch.tensor([0, 299, 300, 599, 999]))
    assert keys[:, 0, 0].tolist() == [1, 1, 2, 2, 3]
    assert torch.equal(keys, values)


def test_to_repeat_and_index_reach_every_tensor():
    whole = rich(3)
    repeated = whole.repeat(2)
    assert repeated.batch_size == 6
    t = torch.tensor([100, 900, 100])
    for layer in range(LAYERS):
        expected = [context.repeat_interleave(2, 0) for context in whole.for_layer(layer, t)]
        torch.testing.assert_close(list(repeated.for_layer(layer, t.repeat_interleave(2))), expected)
    half = whole.to(dtype=torch.float16)
    assert half.stages[1][1].layer_prompt_embeds[0].dtype == half.image_tokens[0].dtype == torch.float16
    assert half.time_ids.dtype == torch.int64
    assert torch.equal(whole[-1].prompt_embeds, whole.prompt_embeds[2:])
    assert whole[1:].stages[1][1].layer_prompt_embeds[3].shape == (2, 5, 32)
    assert [part.batch_size for part in whole] == [1, 1, 1]
    with pytest.raises(IndexError, match="index 3"):
        whole[3]


def test_cat_is_the_inverse_of_indexing():
    whole = rich(3)
    joined = Conditioning.cat([whole[0], whole[1:]])
    t = torch.tensor([10, 499, 500])
    for layer in range(LAYERS):
        assert all(map(torch.equal, joined.for_layer(layer, t), whole.for_layer(layer, t)))
    assert torch.equal(joined.pooled_prompt_embeds, whole.pooled_prompt_embeds)
    assert torch.equal(joined.image_tokens[0], whole.image_tokens[0])
    assert torch.equal(joined.mid_block_residual, whole.mid_block_residual)


def test_cat_of_different_forms_keeps_what_each_reads():
    plain = Conditioning(randn(1, 5, 8))
    split = Conditioning(randn(1, 5, 8, seed=1), value_embeds=randn(1, 5, 8, seed=2))
    layered = Conditioning(randn(1, 5, 8, seed=3), layer_prompt_embeds=tuple(randn(1, 5, 8, seed=i) for i in (4, 5)))
    staged = Conditioning.staged({0: layered, 400: split})
    other_stages = Conditioning.staged({0: split, 700: plain})
    parts = [plain, split, layered, staged, other_stages]
    for chosen in (parts[:2], parts[:3], parts[::2], parts[3:], parts):
        joined = Conditioning.cat(chosen)
        for timestep in (0, 399, 400, 699, 700, 999):
            for layer in range(2):
                got = joined.for_layer(layer, torch.full((len(chosen),), timestep))
                for row, part in enumerate(chosen):
                    expected = part.for_layer(layer, torch.tensor([timestep]))
                    assert all(torch.equal(a[row : row + 1], b) for a, b in zip(got, expected, strict=True))


def test_bad_conditionings_raise():
    embeds = randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"\(B,L,D\)"):
        Conditioning(embeds[0])
    with pytest.raises(ValueError, match="pooled_prompt_embeds has shape"):
        Conditioning(embeds, pooled_prompt_embeds=randn(3, 8))
    with pytest.raises(ValueError, match="one value for each key"):
        Conditioning(embeds, value_embeds=embeds[:, :4])
    with pytest.raises(ValueError, match="ascend from 0"):
        Conditioning(embeds, stages=((5, Conditioning(embeds)),))
    with pytest.raises(ValueError, match="ascend from 0"):
        Conditioning.staged({10: Conditioning(embeds)})
    with pytest.raises(ValueError, match="some have pooled"):
        Conditioning.cat([Conditioning(embeds), Conditioning(embeds, pooled_prompt_embeds=randn(2, 4))])
    with pytest.raises(ValueError, match="prompt_embeds has shapes"):
        Conditioning.cat([Conditioning(embeds), Conditioning(embeds[:, :3])])


def test_predict_with_the_same_context_everywhere_equals_the_plain_unet(tiny_sd):
    latents, t, embeds = randn(2, 4, 8, 8), torch.tensor([10, 800]), randn(2, 6, 32)
    expected = tiny_sd.unet(latents, t, encoder_hidden_states=embeds).sample
    plain = Conditioning(embeds)
    assert torch.equal(tiny_sd.predict(latents, t, plain), expected)
    layered = Conditioning(torch.zeros_like(embeds), layer_prompt_embeds=(embeds,) * LAYERS)
    staged = Conditioning.staged({0: plain, 500: plain})
    for conditioning in (layered, staged):
        torch.testing.assert_close(tiny_sd.predict(latents, t, conditioning), expected, rtol=0, atol=1e-6)
    assert torch.equal(tiny_sd.predict(latents, t, plain), expected)


def test_predict_reads_the_stage_and_the_layer_of_each_sample(tiny_sd):
    latents = randn(2, 4, 8, 8)
    a, b = Conditioning(randn(2, 6, 32)), Conditioning(randn(2, 6, 32, seed=1))
    output = tiny_sd.predict(latents, torch.tensor([10, 800]), Conditioning.staged({0: a, 500: b}))
    torch.testing.assert_close(output[:1], tiny_sd.predict(latents[:1], 10, a[0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(output[1:], tiny_sd.predict(latents[1:], 800, b[1]), rtol=0, atol=1e-6)
    changed = [a.prompt_embeds] * LAYERS
    for layer in range(LAYERS):
        layers = changed.copy()
        layers[layer] = b.prompt_embeds
        moved = tiny_sd.predict(latents, 10, Conditioning(a.prompt_embeds, layer_prompt_embeds=tuple(layers)))
        assert (moved - tiny_sd.predict(latents, 10, a)).abs().max() > 1e-5


def test_predict_checks_the_batch(tiny_sd):
    with pytest.raises(ValueError, match="2 latents .* batch 1"):
        tiny_sd.predict(randn(2, 4, 8, 8), 10, Conditioning(randn(1, 6, 32)))


def test_image_tokens_do_nothing_without_a_branch_and_controlnet_residuals_arrive(tiny_sd):
    latents, plain = randn(1, 4, 8, 8), Conditioning(randn(1, 6, 32))
    base = tiny_sd.predict(latents, 10, plain)
    with_tokens = Conditioning(plain.prompt_embeds, image_tokens=(randn(1, 3, 9),))
    torch.testing.assert_close(tiny_sd.predict(latents, 10, with_tokens), base, rtol=0, atol=1e-6)
    down = tuple(torch.zeros(shape) for shape in ((1, 16, 8, 8), (1, 16, 8, 8), (1, 16, 4, 4), (1, 32, 4, 4)))
    for size in (0, 1):
        residuals = Conditioning(
            plain.prompt_embeds, down_block_residuals=down, mid_block_residual=torch.full((1, 32, 4, 4), float(size))
        )
        assert torch.equal(tiny_sd.predict(latents, 10, residuals), base) == (size == 0)


def test_v_prediction_gives_back_the_noise(tiny_sd, monkeypatch):
    """If the network answered the exact velocity, predict_noise must be the exact noise."""
    tiny_sd.noise_scheduler = copy.deepcopy(tiny_sd.noise_scheduler)
    latents, noise, t = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1), torch.tensor([0, 500, 999])
    assert tiny_sd.training_target(latents, noise, t) is noise
    tiny_sd.noise_scheduler.register_to_config(prediction_type="v_prediction")
    velocity = tiny_sd.training_target(latents, noise, t)
    alpha = tiny_sd.noise_scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(velocity, alpha.sqrt() * noise - (1 - alpha).sqrt() * latents)
    monkeypatch.setattr(tiny_sd, "predict", lambda *args: velocity)
    noisy = tiny_sd.add_noise(latents, noise, t)
    torch.testing.assert_close(tiny_sd.predict_noise(noisy, t, None), noise, rtol=1e-5, atol=1e-5)


def test_a_negative_timestep_does_not_wrap_around(tiny_sd):
    with pytest.raises(ValueError, match=r"\[0, 999\]"):
        tiny_sd.add_noise(randn(1, 4, 8, 8), randn(1, 4, 8, 8), torch.tensor([-1]))


def test_images_to_latents_and_back(tiny_sd):
    """Reference: the VAE called directly."""
    images = randn(2, 3, 16, 16).clamp(-1, 1)
    posterior = tiny_sd.vae.encode(images).latent_dist
    latents = tiny_sd.encode_images(images)
    assert latents.shape == (2, 4, 8, 8)
    torch.testing.assert_close(latents, posterior.mean * 0.7)
    sampled = tiny_sd.encode_images(images, torch.Generator().manual_seed(3))
    torch.testing.assert_close(sampled, (posterior.mean + posterior.std * randn(2, 4, 8, 8, seed=3)) * 0.7)
    decoded = tiny_sd.decode_latents(latents * 50)
    torch.testing.assert_close(decoded, tiny_sd.vae.decode(latents * 50 / 0.7).sample.clamp(-1, 1))
    assert decoded.abs().max() <= 1


def test_the_vae_of_sdxl_works_in_float32_when_held_in_float16(tiny_xl):
    images = randn(1, 3, 16, 16)
    half = tiny_xl.to(dtype=torch.float16)
    weights = [parameter.clone() for parameter in half.vae.parameters()]
    latents = half.encode_images(images)
    assert latents.dtype == half.vae.dtype == torch.float16
    assert all(map(torch.equal, weights, half.vae.parameters()))
    expected = half.vae.to(torch.float32).encode(images).latent_dist.mode() * 0.7
    torch.testing.assert_close(latents, expected.half())

"""What the network is told, what is trained, and the artifact."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open

from common.backbones import load_backbone
from common.io import load_safetensors
from common.training.losses import denoising_loss as common_denoising_loss
from common.training.losses import fixed_noise_validation
from common.training.noising import noise_batch
from common.training.seeding import keys_of_step

PROMPT = "a photo of a <duck>"
LOSSES_OF_FIVE_STEPS = [1.1124165, 1.1775169, 1.2111948, 1.1862726, 1.1313679]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(paper, backbone, **changes):
    config = replace(paper.config.ProSpectConfig.tiny(), initializer_token="duck", **changes)
    return paper.method.ProSpect(backbone, config)


def with_words(paper, method, seed=5):
    """Ten words of their own, as after training."""
    own = (method.config.num_stages, method.word.shape[1])
    method.stages = paper.network.StageWords(randn(*own, seed=seed))
    return method


def batch(step, prompt=PROMPT):
    latents, keys = randn(2, 4, 8, 8, seed=100 + step), keys_of_step(step, 2)
    return {"latents": latents, "prompt": [prompt] * 2, "sample_keys": keys, "step": step}


def context_by_hand(backbone, prompt, vectors):
    """The text encoder with a manual causal pass; words that are keys of `vectors` are read as their vectors."""
    encoder, tokenizer = backbone.text_encoder, backbone.tokenizer
    ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    embeds = encoder.get_input_embeddings().weight[ids.clamp(max=encoder.config.vocab_size - 1)].clone()
    for name, vector in vectors.items():
        embeds[ids == tokenizer.convert_tokens_to_ids(name)] = vector
    mask = torch.full((1, 1, 77, 77), torch.finfo(torch.float32).min).triu(1)
    hidden = encoder.encoder(inputs_embeds=encoder.embeddings(inputs_embeds=embeds), attention_mask=mask)
    return encoder.final_layer_norm(hidden.last_hidden_state)


# What the network is told


def test_words_are_written_where_the_placeholders_stand(paper):
    """By hand: two rows, ids 8 and 9 are placeholders."""
    embeds, ids = torch.arange(8.0).view(2, 4, 1), torch.tensor([[1, 9, 2, 9], [8, 9, 3, 4]])
    words = {9: torch.tensor([[-1.0], [-2.0]]), 8: torch.tensor([[-3.0], [-4.0]])}
    written = paper.method.write_words(embeds, ids, words)
    assert written[..., 0].tolist() == [[0, -1, 2, -1], [-4, -2, 6, 7]]


@torch.no_grad()
def test_each_stage_reads_its_own_prompt_and_word(paper, backbone):
    method = with_words(paper, make(paper, backbone))
    fills = ["<duck>"] * 3 + ["red <duck>", "cat", 9] + ["<duck> <duck>"] * 4
    told, words = method.conditioning(f"{PROMPT} on the beach", fills), method.stage_words()
    texts = ["<duck>"] * 3 + ["red <duck>", "cat", "<duck>"] + ["<duck> <duck>"] * 4
    sources = [0, 1, 2, 3, 4, 9, 6, 7, 8, 9]
    for stage, (text, source) in enumerate(zip(texts, sources, strict=True)):
        expected = context_by_hand(backbone, f"a photo of a {text} on the beach", {"<duck>": words[source]})
        for t in (100 * stage, 100 * stage + 99):
            keys, values = told.for_layer(0, torch.tensor([t]))
            torch.testing.assert_close(keys, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(keys, values)


@torch.no_grad()
def test_the_initializers_word_in_all_stages_is_the_base_bit_for_bit(paper, backbone):
    latents, timesteps = randn(1, 4, 8, 8), torch.tensor([500])

    def output(conditioning):
        return backbone.predict_noise(latents, timesteps, conditioning)

    base = output(backbone.encode_prompt("a photo of a duck"))
    method = make(paper, backbone, direct=True)  # starts at p_0 in all stages
    assert torch.equal(output(method.conditioning(PROMPT)), base)
    assert torch.equal(output(method.conditioning("a photo of a duck")), base)
    assert torch.equal(output(method.conditioning(PROMPT, ["duck"] * 10)), base)
    words = method.stage_words()
    words[4] += 1.0
    method.stages = paper.network.StageWords(words)
    assert torch.equal(output(method.conditioning(PROMPT)), base)  # t = 500 is stage 5
    words[5] += 1.0
    method.stages = paper.network.StageWords(words)
    assert not torch.allclose(output(method.conditioning(PROMPT)), base)
    method.tokens.remove()
    assert torch.equal(output(backbone.encode_prompt("a photo of a duck")), base)


@torch.no_grad()
def test_samples_of_a_batch_are_told_the_words_of_their_stages(paper, backbone):
    """Reference: each sample alone with the staged conditioning of generation; dropout off by a draw that keeps all."""
    method, one = with_words(paper, make(paper, backbone)), batch(7)
    noised = noise_batch(backbone, one["latents"], one["sample_keys"], seed=0)
    stages = paper.stages.stage_of(noised["timesteps"], 10).tolist()
    assert stages[0] != stages[1]
    told = method.conditioning(PROMPT)
    losses = [
        common_denoising_loss(backbone, {key: value[[i]] for key, value in noised.items()}, told) for i in range(2)
    ]
    assert method.training_loss(one).item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


@torch.no_grad()
def test_denoising_loss_is_the_mean_squared_error(paper, backbone):
    noised = noise_batch(backbone, randn(2, 4, 8, 8), torch.tensor([0, 1]), seed=0)
    told = make(paper, backbone).conditioning(PROMPT).repeat(2)
    losses = paper.method.denoising_loss(backbone, noised, told)
    answer = backbone.predict_noise(noised["noisy_latents"], noised["timesteps"], told)
    expected = [((answer[i] - noised["noise"][i]) ** 2).sum() / (4 * 8 * 8) for i in range(2)]
    torch.testing.assert_close(losses, torch.stack(expected))


# What is trained


def test_only_the_network_is_trained(paper, backbone):
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in backbone.modules]
    method = make(paper, backbone)
    start = {name: value.clone() for name, value in method.stages.state_dict().items()}
    word, idle = method.word.clone(), {f"attn{i}.to_{x}.weight" for i in (1, 2) for x in "qk"}
    idle |= {"norm2.weight", "norm2.bias"}  # they reach the queries of the second attention alone
    optimizer = torch.optim.AdamW([p for _, p in method.parameters()], lr=1e-3, weight_decay=0.0)
    for step in range(2):
        method.training_loss(batch(step)).backward()
        for name, parameter in method.parameters():  # one token: queries and keys get rounding errors at most
            assert (parameter.grad.abs().max() < 1e-9) == (name in idle), name
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for module in backbone.modules for p in module.parameters())
    for module, old in zip(backbone.modules, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in module.state_dict().items())
    assert torch.equal(method.word, word) and not method.word.requires_grad
    changed = {name for name, value in method.stages.state_dict().items() if not torch.equal(value, start[name])}
    assert changed >= set(start) - idle


def test_gradients_reach_the_words_of_the_sampled_stages_alone(paper, backbone):
    method, one = make(paper, backbone, direct=True), batch(7)
    method.training_loss(one).backward()
    timesteps = noise_batch(backbone, one["latents"], one["sample_keys"], seed=0)["timesteps"]
    touched = method.stages.words.grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == sorted(set(paper.stages.stage_of(timesteps, 10).tolist()))


def test_the_loss_of_a_batch_is_the_mean_of_its_parts(paper, backbone):
    """Dropout, noise and timesteps belong to the samples, so a batch may be split in any way."""
    method, whole = make(paper, backbone), batch(3)
    with torch.no_grad():
        parts = [method.training_loss({k: v[i : i + 1] for k, v in whole.items() if k != "step"}) for i in range(2)]
        assert method.training_loss(whole).item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)


def test_losses_of_five_steps(paper, backbone):
    """Stored with torch 2.13.0 on a CPU: the small random Stable Diffusion of conftest.py, AdamW."""
    method = make(paper, backbone)
    optimizer = torch.optim.AdamW([p for _, p in method.parameters()], lr=1e-3, weight_decay=0.01)
    losses = []
    for step in range(5):
        loss = method.training_loss(batch(step))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(LOSSES_OF_FIVE_STEPS, rel=1e-4)


@torch.no_grad()
def test_sizes_on_stable_diffusion_1_are_the_papers(paper):
    """31,477,248 parameters of f, 125.9 MB; P* is 7,680 numbers, 30,720 bytes."""
    backbone = load_backbone("sd15", weights="meta")
    width = backbone.text_encoder.config.hidden_size
    with torch.device("meta"):
        network = paper.network.StageNetwork(width, 10, seed=0)
    count = sum(p.numel() for p in network.parameters())
    attention, norms = 3 * 768 * 512 + 512 * 768 + 768, 3 * 2 * 768
    assert count == 2 * attention + (768 * 6144 + 6144) + (3072 * 7680 + 7680) + norms == 31_477_248
    direct = paper.network.StageWords(torch.zeros(10, width))
    assert sum(p.numel() * p.element_size() for p in direct.parameters()) == 30_720


def test_validation_loss_is_that_of_fixed_noise_in_each_stage(paper, backbone):
    method, latents = with_words(paper, make(paper, backbone)), randn(2, 4, 8, 8)
    losses = []
    with torch.no_grad():
        for stage in range(10):
            context = context_by_hand(backbone, PROMPT, {"<duck>": method.stage_words()[stage]})
            conditioning = type(method.conditioning(PROMPT))(context)
            losses.append(fixed_noise_validation(backbone, latents, conditioning, timesteps=(100 * stage + 50,)))
    assert method.validation_loss(latents) == pytest.approx(np.mean(losses), rel=1e-5)


# Sampling


def ddim(backbone, steps):
    config = backbone.noise_scheduler.config
    scheduler = DDIMScheduler.from_config(config, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    return scheduler


def test_pictures_are_made_with_the_context_of_each_stage(paper, backbone):
    """Reference: diffusers' DDIM in a plain loop, stages chosen by the timestep."""
    method = with_words(paper, make(paper, backbone, num_inference_steps=7))
    fills = ["<duck>"] * 5 + ["cat"] * 5
    got = method.generate(PROMPT, seeds=[7], fills=fills)
    scheduler, latents, words = ddim(backbone, 7), randn(1, 4, 8, 8, seed=7), method.stage_words()
    with torch.no_grad():
        empty = backbone.encode_prompt("").prompt_embeds
        for t in scheduler.timesteps:
            stage = int(t * 10 / 1000)
            told = context_by_hand(backbone, f"a photo of a {fills[stage]}", {"<duck>": words[stage]})
            uncond, cond = (backbone.unet(latents, t, part).sample for part in (empty, told))
            latents = scheduler.step(uncond + 5.0 * (cond - uncond), t, latents).prev_sample
        expected = backbone.decode_latents(latents)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.shape == (1, 3, 32, 32)
    assert not torch.allclose(method.generate(PROMPT, seeds=[7]), got)
    two = method.generate(PROMPT, seeds=[8, 7], fills=fills, batch_size=1)
    torch.testing.assert_close(two[1:], got, rtol=1e-4, atol=1e-4)


def test_stages_that_are_not_run_say_nothing_to_an_edit(paper, backbone):
    method = with_words(paper, make(paper, backbone, num_inference_steps=10))
    picture = randn(1, 3, 32, 32).clamp(-1, 1)

    def edited(fills, strength):
        return method.edit(picture, PROMPT, seeds=[0], strength=strength, fills=fills)

    late, early = ["<duck>"] * 5 + ["cat"] * 5, ["cat"] * 5 + ["<duck>"] * 5
    assert torch.equal(edited(late, 0.5), edited(["<duck>"] * 10, 0.5))
    assert not torch.allclose(edited(early, 0.5), edited(["<duck>"] * 10, 0.5))
    assert edited(late, 1.0).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="strength"):
        edited(late, 0.0)


def test_several_concepts_in_one_picture(paper, backbone_folder, tmp_path):
    """A concept that was added is told as in its own method; both can stand in one stage."""
    other = paper.method.ProSpect(
        load_backbone(backbone_folder), replace(paper.config.ProSpectConfig.tiny(), initializer_token="cat")
    )
    with_words(paper, other, seed=9).save(tmp_path / "cat")
    method = with_words(paper, make(paper, load_backbone(backbone_folder)))
    assert method.add_concept(tmp_path / "cat") == "<cat>"
    with torch.no_grad():
        expected, t = other.conditioning("a <cat> on the beach"), torch.tensor([930])
        swapped = method.conditioning("a <duck> on the beach", ["<duck>"] * 9 + ["<cat>"])
        torch.testing.assert_close(swapped.for_layer(0, t)[0], expected.for_layer(0, t)[0])
        alone = method.conditioning("a <cat> on the beach")
        torch.testing.assert_close(alone.for_layer(0, t)[0], expected.for_layer(0, t)[0])
        both = method.conditioning("a <duck> and a <cat>").for_layer(0, torch.tensor([120]))[0]
        words = {"<duck>": method.stage_words()[1], "<cat>": other.stage_words()[1]}
        by_hand = context_by_hand(method.backbone, "a <duck> and a <cat>", words)
        torch.testing.assert_close(both, by_hand, rtol=1e-4, atol=1e-5)


# The artifact


def test_artifact_round_trip_and_size(paper, backbone_folder, tmp_path):
    """Of the network without dropout; what is loaded is the words alone, and gives the same picture."""
    method = make(paper, load_backbone(backbone_folder))
    method.save(tmp_path)
    expected, path = method.generate(PROMPT, seeds=[3]), tmp_path / "stage_words.safetensors"
    loaded = paper.method.load_method(path)
    assert loaded.config == method.config and isinstance(loaded.stages, paper.network.StageWords)
    assert torch.equal(loaded.generate(PROMPT, seeds=[3]), expected)
    assert torch.equal(paper.method.load_method(tmp_path).stage_words(), method.stage_words())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["slug"] == paper.slug
        assert sorted(file.keys()) == [f"<duck>[{stage}]" for stage in range(10)]
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header_bytes + 10 * 32 * 4
    assert json.loads((tmp_path / "artifact.json").read_text())["placeholder"] == "<duck>"
    method.tokens.remove()
    with pytest.raises(ValueError, match=r"holds words \(10, 32\), but <duck> needs \(5, 32\)"):
        make(paper, method.backbone, num_stages=5).load(tmp_path)


def test_network_file_is_named_as_the_official_one(paper, backbone, tmp_path):
    method = make(paper, backbone)
    method.save_network(tmp_path)
    tensors, header = load_safetensors(tmp_path / "stage_network.safetensors")
    assert header["slug"] == paper.slug and torch.equal(tensors.pop("initial_embeddings"), method.word)
    again = paper.network.StageNetwork(32, 10, seed=1)
    again.load_state_dict({name.removeprefix("attention."): value for name, value in tensors.items()})
    assert torch.equal(again(method.word)[0], method.stage_words())


def test_stock_diffusers_makes_the_same_picture(paper, backbone_folder, tmp_path):
    """A pipeline that has never seen our code: its loader of embeddings, and prompts changed between its steps."""
    method = with_words(paper, make(paper, load_backbone(backbone_folder), num_inference_steps=10))
    method.save(tmp_path)
    expected = method.generate(f"{PROMPT} on the beach", seeds=[3])
    tensors, _ = load_safetensors(tmp_path / "stage_words.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(backbone_folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = ddim(method.backbone, 10)
    pipe.load_textual_inversion([{name: vector} for name, vector in tensors.items()])
    told = [pipe.encode_prompt(f"a photo of a <duck>[{i}] on the beach", "cpu", 1, True, "") for i in range(10)]
    stages = [int(t) * 10 // 1000 for t in pipe.scheduler.timesteps] + [0]

    def next_stage(pipe, step, timestep, tensors):
        positive, negative = told[stages[step + 1]]
        return {"prompt_embeds": torch.cat([negative, positive])}

    theirs = pipe(
        prompt_embeds=told[stages[0]][0], negative_prompt_embeds=told[0][1], guidance_scale=5.0, num_inference_steps=10,
        generator=torch.Generator().manual_seed(3), callback_on_step_end=next_stage, output_type="pt",
        height=32, width=32,
    ).images  # fmt: skip
    torch.testing.assert_close(theirs * 2 - 1, expected, rtol=1e-4, atol=1e-5)


def test_a_foreign_artifact_is_refused(paper, tmp_path):
    from safetensors.torch import save_file

    save_file({"<x>": torch.zeros(1, 32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors was not written by this method"):
        paper.method.load_method(tmp_path / "x.safetensors")


# Settings and errors


def test_presets_are_the_papers(paper):
    config = paper.config.ProSpectConfig
    assert config().plain_prompt() == "<object>" and config.tiny().plain_prompt() == "a photo of a <object>"
    assert (config().num_stages, config().batch_size, config().learning_rate) == (10, 1, 1e-4)
    assert (config().num_inference_steps, config().guidance_scale, config().weight_decay) == (50, 10, 0.01)
    assert (config.tiny().num_inference_steps, config.tiny().guidance_scale) == (30, 5)
    assert config(placeholder_token="*s*").plain_prompt() == "*s*"


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_stages", 0), ("train_steps", 0), ("batch_size", 0), ("num_inference_steps", 0), ("learning_rate", 0.0),
     ("learning_rate", float("nan")), ("weight_decay", -1.0), ("training_prompt", "a photo")],
)  # fmt: skip
def test_bad_settings_are_named(paper, field, value):
    with pytest.raises(ValueError, match=field):
        paper.config.ProSpectConfig(**{field: value})


def test_bad_prompts_are_named(paper, backbone):
    method = make(paper, backbone)
    with pytest.raises(ValueError, match="each of the 10 stages, got 2"):
        method.conditioning(PROMPT, ["a", "b"])
    with pytest.raises(ValueError, match="81 tokens, but .* reads 77"):
        method.conditioning("a <duck>" + " a" * 77)


def test_two_text_encoders_are_refused(paper):
    with pytest.raises(ValueError, match="two text encoders"):
        paper.method.ProSpect(load_backbone("sdxl", weights="meta"), paper.config.ProSpectConfig())

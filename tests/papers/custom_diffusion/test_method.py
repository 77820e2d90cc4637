"""What is trained, the loss, the artifact, the settings."""

import dataclasses
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

from common.backbones import load_backbone
from common.backbones.adapters import DenseDelta
from common.backbones.attention import install
from common.training import losses as common_losses
from common.training.noising import noise_batch

STORED_LOSSES = [2.177167, 2.047488, 2.107081, 2.152452, 2.066796]
PROMPT = "a photo of a <new1> dog"


def make_batch(step=0, size=32, prompts=(PROMPT, "very small photo of a <new1> dog")):
    generator = torch.Generator().manual_seed(step)
    latent = size // 4
    mask = torch.ones(2, 1, latent, latent)
    mask[1, :, : latent // 2] = 0
    pixel_values = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    captions = ["a photo of a red dog in the snow", "a photo of a dog at night"]
    return {
        "instance": {"pixel_values": pixel_values, "mask": mask, "prompt": list(prompts)},
        "class": {"latents": torch.randn(2, 4, latent, latent, generator=generator), "prompt": captions},
        "sample_keys": torch.arange(2 * step, 2 * step + 2),
        "step": step,
    }


def make_method(paper, backbone, **changes):
    config = dataclasses.replace(paper.config.CustomDiffusionConfig.tiny("dog"), num_inference_steps=3, **changes)
    return paper.method.CustomDiffusion(backbone, config)


def named(method):
    return [pair for group in method.parameters() for pair in group["params"]]


def disturb(method, scale=0.05):
    """Stand in for training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in named(method):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return method


# The equations


def test_relative_change_by_hand_and_kinds_of_layers(paper):
    base = {"a.weight": torch.tensor([[3.0, 4.0]]), "b.weight": torch.tensor([[0.0], [2.0]]), "a.bias": torch.ones(2)}
    tuned = {
        "a.weight": torch.tensor([[3.0, 5.0]]),
        "b.weight": torch.tensor([[3.0], [-2.0]]),
        "a.bias": torch.zeros(2),
    }
    assert paper.method.relative_change(tuned, base) == {"a.weight": pytest.approx(0.2), "b.weight": pytest.approx(2.5)}
    kinds = {}
    for name, p in load_backbone("sd15", weights="meta").unet.named_parameters():
        if name.endswith(".weight") and p.ndim > 1:
            kinds.setdefault(paper.method.layer_kind(name), []).append(name)
    assert len(kinds["cross-attention K, V"]) == 32 and len(kinds["cross-attention Q, out"]) == 32
    assert len(kinds["self-attention"]) == 64
    assert all(name.endswith(("proj_in.weight", "proj_out.weight")) or "conv" not in name for name in kinds["others"])
    assert {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"} <= set(kinds["convolutions"])


def test_start_token_gives_no_gradient_and_the_output_of_diffusers_processor(paper, backbone):
    """Reference: diffusers' CustomDiffusionAttnProcessor with the same matrices; output, gradients of W^k and W^v."""
    attention = backbone.freeze().unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    theirs = CustomDiffusionAttnProcessor(train_kv=True, train_q_out=False, hidden_size=16, cross_attention_dim=32)
    theirs.to_k_custom_diffusion.weight.data.copy_(attention.to_k.weight)
    theirs.to_v_custom_diffusion.weight.data.copy_(attention.to_v.weight)
    generator = torch.Generator().manual_seed(0)
    hidden, context = torch.randn(2, 9, 16, generator=generator), torch.randn(2, 7, 32, generator=generator)
    expected = theirs(attention, hidden, context)
    expected.square().sum().backward()
    plain = attention(hidden, context)
    for projection in (attention.to_k, attention.to_v):
        projection.weight.requires_grad_(True)
    with install(backbone.unet, [paper.method.DetachStartToken()]):
        ours = attention(hidden, context)
        ours.square().sum().backward()
    assert torch.equal(ours, plain)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(attention.to_k.weight.grad, theirs.to_k_custom_diffusion.weight.grad)
    torch.testing.assert_close(attention.to_v.weight.grad, theirs.to_v_custom_diffusion.weight.grad)
    only_start = torch.zeros_like(context)
    only_start[:, 0] = context[:, 0]
    attention.to_v.weight.grad = None
    with install(backbone.unet, [paper.method.DetachStartToken()]):
        attention(hidden, only_start).square().sum().backward()
    assert attention.to_v.weight.grad.abs().max() == 0


def test_masked_loss_by_hand_and_against_the_shared_one(paper, backbone):
    batch = make_batch()
    latents, mask = batch["class"]["latents"], batch["instance"]["mask"]
    noised = noise_batch(backbone, latents, torch.arange(2), seed=0)
    conditioning = backbone.encode_prompt(["a dog", "a cat"])
    with torch.no_grad():
        ours = paper.method.masked_denoising_loss(backbone, noised, conditioning, mask)
        answer = backbone.unet(noised["noisy_latents"], noised["timesteps"], conditioning.prompt_embeds).sample
        shared = common_losses.denoising_loss(backbone, noised, conditioning, mask=mask)
    error = (answer - noised["noise"]).square()
    expected = torch.stack([error[0].mean(), error[1, :, 4:].mean()])  # the second mask is 0 in the upper half
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(ours, shared)
    official = (error * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])  # what the code computes: 4 channels, 4 times (D3)
    torch.testing.assert_close(4 * ours, official)


def test_compression_keeps_the_fewest_values_that_reach_the_share(paper):
    """Official compress.py (7c19c9a) keeps 1 of these: it drops the value with which the sum passes 60% (D5)."""
    change = torch.tensor([[(3 * i + j + i * j) % 7 - 3 for j in range(4)] for i in range(5)]).double() / 8
    up, down = paper.method.compress(change, 0.6)  # shares 0.3216, 0.6240, 0.8865, 1
    assert up.shape == (5, 2) and down.shape == (2, 4)
    official = torch.tensor([0.012367616502, -0.025774779710, -0.004673772570, 0.039381708362], dtype=torch.float64)
    torch.testing.assert_close(up[0, :1] @ down[:1], official, rtol=1e-8, atol=1e-11)
    for share, rank in ((0.3, 1), (0.65, 3), (1.0, 4)):
        up, down = paper.method.compress(change, share)
        assert up.shape[1] == rank
        shared = DenseDelta(change.float()).compress(share)
        torch.testing.assert_close((up @ down).float(), shared.delta(change).detach())
    torch.testing.assert_close(up @ down, change)
    with pytest.raises(ValueError, match="share"):
        paper.method.compress(change, 0.0)


# What is trained


@pytest.mark.parametrize("trained", ["crossattn_kv", "crossattn"])
def test_trained_numbers_on_stable_diffusion_1(paper, trained):
    """Sum over the blocks of 2 C 768; with queries and outputs, 2 C^2 more: 2 (5 x 320^2 + 5 x 640^2 + 6 x 1280^2)."""
    config = paper.config.CustomDiffusionConfig(class_nouns=("cat", "dog"), trained=trained)
    method = paper.method.CustomDiffusion(load_backbone("sd15", weights="meta"), config)
    matrices, rows = ([p for _, p in group["params"]] for group in method.parameters())
    assert 5 * 320**2 + 5 * 640**2 + 6 * 1280**2 == 12_390_400
    extra = 0 if trained == "crossattn_kv" else 2 * 12_390_400
    assert sum(p.numel() for p in matrices) == 19_169_280 + extra
    assert len(matrices) == 32 * (1 if trained == "crossattn_kv" else 2)
    assert [tuple(row.shape) for row in rows] == [(1, 768), (1, 768)]
    if trained == "crossattn_kv":
        assert f"{4 * sum(p.numel() for p in matrices) / 1e6:.1f}" == "76.7"  # MB in float32


def test_training_loss_is_two_separate_passes(paper, backbone):
    """Reference: each term alone, with a prior weight of 0.25, from one call of the U-Net each."""
    method, batch = make_method(paper, backbone, prior_loss_weight=0.25), make_batch()
    disturb(method)
    latents = method._encode_images(batch["instance"]["pixel_values"], batch["sample_keys"])
    seeds = (0, paper.method.derive_seed(0, paper.method.REGULARISATION_STREAM))
    terms = []
    for seed, clean, part in zip(seeds, (latents, batch["class"]["latents"]), ("instance", "class"), strict=True):
        noised = noise_batch(backbone, clean, batch["sample_keys"], seed=seed)
        context = backbone.encode_prompt(batch[part]["prompt"]).prompt_embeds
        error = (backbone.unet(noised["noisy_latents"], noised["timesteps"], context).sample - noised["noise"]).square()
        mask = batch["instance"]["mask"].expand_as(error) if part == "instance" else torch.ones_like(error)
        terms.append(((error * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean())
    torch.testing.assert_close(method.training_loss(batch), terms[0] + 0.25 * terms[1], rtol=1e-5, atol=0)
    method.config = dataclasses.replace(method.config, prior_loss_weight=0.0)
    del batch["class"]
    torch.testing.assert_close(method.training_loss(batch), terms[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("trained", ["crossattn_kv", "crossattn"])
def test_only_the_matrices_and_the_word_change(paper, backbone, trained):
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in backbone.modules]
    method = make_method(paper, backbone, trained=trained)
    start = {name: parameter.detach().clone() for name, parameter in named(method)}
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3, weight_decay=1e-2)
    for step in range(2):
        method.training_loss(make_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for module in backbone.modules for p in module.parameters())
    for module, old in zip(backbone.modules, before, strict=True):  # every row of the vocabulary is in there
        assert all(torch.equal(value, old[name]) for name, value in module.state_dict().items())
    assert all(not torch.equal(parameter, start[name]) for name, parameter in named(method))
    assert [group.get("weight_decay") for group in method.parameters()] == [None, 0.0]


def test_strength_zero_and_a_fresh_method_are_the_backbone_bit_for_bit(paper, backbone):
    latents, timesteps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])

    def output():
        with torch.no_grad():
            return backbone.predict_noise(latents, timesteps, backbone.encode_prompt("a photo of a dog"))

    base = output()
    method = make_method(paper, backbone)
    assert torch.equal(output(), base)
    disturb(method)
    assert not torch.allclose(output(), base)
    method.attached.set_strength(0.0)
    assert torch.equal(output(), base)
    method.attached.detach()
    method.tokens.remove()
    assert torch.equal(output(), base)


def test_losses_of_five_steps_are_the_stored_ones(paper):
    """tiny-sd with random weights of seed 0, so that training new weights changes nothing here."""
    method = make_method(paper, load_backbone("tiny-sd", weights="random"))
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    losses = []
    for step in range(5):
        loss = method.training_loss(make_batch(step, size=64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(STORED_LOSSES, rel=1e-3)


# The artifact


@pytest.mark.parametrize("trained", ["crossattn_kv", "crossattn"])
def test_stock_diffusers_draws_the_same_picture(paper, backbone, backbone_folder, tmp_path, trained):
    """A pipeline that has never seen our code, through `load_attn_procs` and `load_textual_inversion`."""
    method = disturb(make_method(paper, backbone, trained=trained))
    method.save(tmp_path)
    ours = method.generate(PROMPT, seeds=[3])
    pipe = StableDiffusionPipeline.from_pretrained(backbone_folder, safety_checker=None, requires_safety_checker=False)
    settings = {"num_inference_steps": 3, "guidance_scale": method.config.guidance_scale, "output_type": "pt"}
    pipe.scheduler = backbone.to_pipeline().scheduler
    pipe.set_progress_bar_config(disable=True)
    weight_name = "pytorch_custom_diffusion_weights.safetensors"
    pipe.unet.load_attn_procs(tmp_path, weight_name=weight_name, _pipeline=pipe)  # without it, 0.42.1 loads nothing
    pipe.load_textual_inversion(tmp_path, weight_name="<new1>.safetensors")
    theirs = pipe(PROMPT, generator=torch.Generator().manual_seed(3), **settings).images * 2 - 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    kinds = {name.split(".")[-2]: type(p).__name__ for name, p in pipe.unet.attn_processors.items()}
    assert kinds == {"attn1": "CustomDiffusionAttnProcessor", "attn2": "CustomDiffusionAttnProcessor"}
    method.attached.set_strength(0.0)
    assert (method.generate(PROMPT, seeds=[3]) - ours).abs().max() > 1e-3


def test_artifact_round_trip_and_size(paper, backbone, tmp_path):
    method = disturb(make_method(paper, backbone))
    method.save(tmp_path)
    ours = method.generate(PROMPT, seeds=[5])
    for path in (tmp_path, tmp_path / "pytorch_custom_diffusion_weights.safetensors"):
        loaded = paper.method.load_method(path)
        assert loaded.config == method.config
        assert torch.equal(loaded.generate(PROMPT, seeds=[5]), ours)
    header = json.loads((tmp_path / "artifact.json").read_text())
    assert header["slug"] == paper.slug and header["config"]["class_nouns"] == ["dog"]
    weights = tmp_path / "pytorch_custom_diffusion_weights.safetensors"
    header_bytes = int.from_bytes(weights.read_bytes()[:8], "little")
    assert weights.stat().st_size == 8 + header_bytes + 4 * sum(p.numel() for p in method.base_weights.values())
    with pytest.raises(ValueError, match="trained"):
        paper.method.load_method(_with(tmp_path, trained="crossattn"))
    (tmp_path / "artifact.json").unlink()
    with pytest.raises(FileNotFoundError, match="artifact.json"):
        paper.method.load_method(tmp_path)


def _with(folder, **changes):
    path = folder / "artifact.json"
    header = json.loads(path.read_text())
    header["config"] |= changes
    path.write_text(json.dumps(header))
    return folder


def test_compressed_artifact_is_smaller_and_close(paper, backbone, tmp_path):
    method = disturb(make_method(paper, backbone))
    whole = {name: residual.change.detach().clone() for name, residual in method.changes.items()}
    method.save(tmp_path)
    method.save(tmp_path, share=0.6)
    assert not (tmp_path / "pytorch_custom_diffusion_weights.safetensors").exists()
    loaded = paper.method.load_method(tmp_path)
    for name, change in whole.items():
        ours = loaded.changes[name].change
        assert 0 < (ours - change).norm() / change.norm() < 0.6
        assert torch.linalg.matrix_rank(ours) == paper.method.compress(change, 0.6)[0].shape[1]
    method.save(tmp_path, share=1.0)
    ours = paper.method.load_method(tmp_path).generate(PROMPT, seeds=[5])
    torch.testing.assert_close(ours, method.generate(PROMPT, seeds=[5]), rtol=0, atol=1e-4)
    method.save(tmp_path)
    assert not (tmp_path / "compressed.safetensors").exists()


# The settings


def test_prompts_and_words(paper):
    config = paper.config.CustomDiffusionConfig(class_nouns=("cat", "wooden pot"))
    assert config.instance_prompt() == "photo of a <new1> cat" and config.class_prompt(1) == "photo of a wooden pot"
    assert config.words(1) == "<new2> wooden pot" and config.placeholders == ["<new1>", "<new2>"]
    plain = paper.config.CustomDiffusionConfig(class_nouns=("moongate",), initializer_tokens=("",))
    assert plain.instance_prompt() == "photo of a moongate"


def test_a_concept_without_a_word_and_bad_methods(paper, backbone):
    method = make_method(paper, backbone, initializer_tokens=("",))
    assert len(method.parameters()) == 1 and method.config.instance_prompt() == "a photo of a dog"
    assert torch.isfinite(method.training_loss(make_batch(prompts=("a photo of a dog",) * 2)))
    with pytest.raises(ValueError, match="fresh backbone"):
        make_method(paper, backbone)
    with pytest.raises(ValueError, match="class_nouns"):
        paper.method.CustomDiffusion(backbone, paper.config.CustomDiffusionConfig())


def test_presets_have_the_papers_values_and_bad_values_raise(paper):
    Config = paper.config.CustomDiffusionConfig
    config, tiny = Config(class_nouns=("dog",)), Config.tiny("dog")
    assert (config.train_steps, 2 * config.batch_size, config.learning_rate) == (250, 8, 8e-5)
    assert (config.num_regularisation_images, config.prior_loss_weight) == (200, 1.0)
    assert (config.num_inference_steps, config.guidance_scale, config.eta) == (200, 6.0, 1.0)
    assert (tiny.train_steps, tiny.num_inference_steps, tiny.guidance_scale) == (250, 30, 5.0)
    bad = {
        "prior_loss_weight": -1, "learning_rate": 0, "train_steps": 0, "batch_size": 0, "num_inference_steps": 0,
        "num_regularisation_images": 0, "weight_decay": float("nan"), "prompt_template": "a dog", "trained": "all",
        "eta": -0.1, "initializer_tokens": (),
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(config, **{name: value})

"""The equations, what is trained, the artifact, the settings."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from common.backbones import load_backbone
from common.backbones.adapters import add_lora
from common.training import losses as common_losses
from common.training.noising import noise_batch

STORED_LOSSES = [1.082987, 1.01069, 1.091067, 1.020725, 0.975435]
PROMPT, SEED = "a photo of a sks dog in the snow", 7


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_batch(step=0, batch_size=2, *, size=8, with_class=False):
    generator = torch.Generator().manual_seed(step)

    def part(prompt):
        return {"latents": torch.randn(batch_size, 4, size, size, generator=generator), "prompt": [prompt] * batch_size}

    batch = {"instance": part("a photo of a sks dog")} | ({"class": part("a photo of a dog")} if with_class else {})
    return {**batch, "sample_keys": torch.arange(step * batch_size, (step + 1) * batch_size), "step": step}


def make_method(paper, backbone, **changes):
    settings = {"rank": 3, "num_inference_steps": 3, **changes}
    return paper.method.LoRA(backbone, dataclasses.replace(paper.config.LoRAConfig.tiny("dog"), **settings))


def named(method):
    return [pair for group in method.parameters() for pair in group["params"]]


def train_a_little(method):
    """Values as training could leave them."""
    for i, (_, parameter) in enumerate(named(method)):
        parameter.data.copy_(0.1 * draw(*parameter.shape, seed=i))
    return method


def predict(backbone):
    with torch.no_grad():
        return backbone.unet(draw(2, 4, 8, 8), torch.tensor([5, 900]), draw(2, 7, 16, seed=2)).sample


def test_equation_3_by_hand(paper):
    """W = [[1, 2], [3, 4]], A = [[1, -1]], B = [[2], [5]], alpha 3, r 1: s B A = [[6, -6], [15, -15]]."""
    pair = paper.formats.Factors(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [5.0]]), 3.0)
    weight, bias, inputs = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([10.0, 20.0]),
        torch.tensor([[4.0, 1.0]]),
    )
    assert paper.method.weight_delta(pair).tolist() == [[6.0, -6.0], [15.0, -15.0]]
    assert paper.method.merged_weight(weight, pair, 0.5).tolist() == [[4.0, -1.0], [10.5, -3.5]]
    assert paper.method.adapted_linear(inputs, weight, bias, pair).tolist() == [[16.0 + 18.0, 36.0 + 45.0]]
    assert paper.method.adapted_linear(inputs, weight, bias, pair, 0.5).tolist() == [[16.0 + 9.0, 36.0 + 22.5]]


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_equations_are_what_peft_computes(paper, kind):
    """Reference: PEFT's layers, forward and delta, with alpha / r = 2.5."""
    layer = nn.Linear(5, 7) if kind == "linear" else nn.Conv2d(5, 7, 3, stride=2, padding=1)
    inputs = draw(2, 4, 5) if kind == "linear" else draw(2, 5, 6, 6)
    network = nn.Sequential(layer)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=5.0, target_modules=["0"], init_lora_weights=False), network)
    down, up = network[0].lora_A["default"].weight.detach(), network[0].lora_B["default"].weight.detach()
    pair = paper.formats.Factors(down, up, 5.0)
    torch.testing.assert_close(paper.method.weight_delta(pair), network[0].get_delta_weight("default").detach())
    expected = network(inputs).detach()
    merged = paper.method.merged_weight(layer.weight.detach(), pair)
    if kind == "linear":
        ours = paper.method.adapted_linear(inputs, layer.weight, layer.bias, pair).detach()
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(F.linear(inputs, merged, layer.bias).detach(), expected)
    else:
        ours = F.conv2d(inputs, merged, layer.bias, stride=2, padding=1).detach()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_mask_weights_by_hand(paper):
    """A 4 x 4 mask at 2 x 2: nearest takes rows and columns 0 and 2; (1.01, 0.01)^2 over the largest."""
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 0, 0], mask[0, 0, 1, 2] = 1.0, 1.0  # the second one is never looked at
    weights = paper.method.mask_weights(mask, (2, 2), temperature=2.0)
    low = 0.01**2 / 1.01**2
    torch.testing.assert_close(weights[0, 0], torch.tensor([[1.0, low], [low, low]]))
    torch.testing.assert_close(weights[1], torch.ones(1, 2, 2))  # no subject anywhere: an ordinary loss


def test_loss_equals_the_shared_one_and_the_mask_weighs_both_sides(paper, backbone):
    method, batch = train_a_little(make_method(paper, backbone)), make_batch()
    noised = noise_batch(backbone, batch["instance"]["latents"], batch["sample_keys"], seed=0)
    conditioning = method.encode(batch["instance"]["prompt"])
    ours = paper.method.denoising_loss(backbone, noised, conditioning)
    assert torch.equal(ours, common_losses.denoising_loss(backbone, noised, conditioning))
    weights = draw(2, 1, 8, 8).abs()
    error = backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning) - noised["target"]
    expected = (weights.square() * error.square()).mean((1, 2, 3))
    torch.testing.assert_close(paper.method.denoising_loss(backbone, noised, conditioning, weights), expected)

    batch["instance"]["mask"] = torch.zeros(2, 1, 16, 16)
    batch["instance"]["mask"][:, :, :8] = 1
    masked, plain = method.training_loss(batch), method.training_loss(make_batch())
    assert masked < 0.8 * plain


def test_prior_loss_adds_the_class_term(paper, backbone):
    """Reference: each term alone, noised by the closed form, with lambda = 0.25."""
    method = train_a_little(make_method(paper, backbone, prior_loss_weight=0.25))
    batch, terms, drawn = make_batch(with_class=True), [], []
    for name in ("instance", "class"):
        seed = paper.method.derive_seed(method.config.seed, name)
        noised = noise_batch(backbone, batch[name]["latents"], batch["sample_keys"], seed=seed)
        alpha_bar = backbone.noise_scheduler.alphas_cumprod[noised["timesteps"]].view(-1, 1, 1, 1)
        z = alpha_bar.sqrt() * batch[name]["latents"] + (1 - alpha_bar).sqrt() * noised["noise"]
        context = backbone.encode_prompt(batch[name]["prompt"]).prompt_embeds
        terms.append(F.mse_loss(backbone.unet(z, noised["timesteps"], context).sample, noised["noise"]))
        drawn.append(noised)
    torch.testing.assert_close(method.training_loss(batch), terms[0] + 0.25 * terms[1], rtol=1e-5, atol=0)
    assert not torch.equal(drawn[0]["timesteps"], drawn[1]["timesteps"])


def test_timestep_share_keeps_to_the_first_part(paper, backbone, monkeypatch):
    seen, predict_with = [], backbone.predict
    monkeypatch.setattr(
        backbone, "predict", lambda latents, timesteps, c: seen.append(timesteps) or predict_with(latents, timesteps, c)
    )
    method = make_method(paper, backbone, timestep_share=0.2)
    method.training_loss(make_batch(batch_size=64))
    assert 150 < max(t.max().item() for t in seen) < 200


def test_fresh_pairs_and_strength_0_are_the_base_bit_for_bit(paper, backbone):
    base = predict(backbone)
    method = make_method(paper, backbone)
    assert torch.equal(predict(backbone), base)
    train_a_little(method)
    full = predict(backbone)
    assert (full - base).abs().max() > 1e-3
    method.set_strength(0.0)
    assert torch.equal(predict(backbone), base)
    method.set_strength(1.0)
    assert torch.equal(predict(backbone), full)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_merge_predicts_the_same_and_unmerge_restores_every_bit(paper, backbone, strength):
    method = train_a_little(make_method(paper, backbone, text_encoder_learning_rate=1e-4))
    method.set_strength(strength)
    adapter, text = predict(backbone), backbone.encode_prompt(PROMPT).prompt_embeds
    before = {name: tensor.clone() for name, tensor in backbone.unet.state_dict().items()}
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = backbone.unet.get_submodule(name.removeprefix("unet.")).get_base_layer().weight
    expected = paper.method.merged_weight(weight.detach().clone(), method.factors()[name], strength)
    method.merge()
    torch.testing.assert_close(weight.detach(), expected)
    torch.testing.assert_close(predict(backbone), adapter, rtol=0, atol=1e-5)
    torch.testing.assert_close(backbone.encode_prompt(PROMPT).prompt_embeds, text, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="unmerge"):
        method.set_strength(0.5)
    with pytest.raises(RuntimeError, match="merged already"):
        method.merge()
    method.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.unet.state_dict().items())
    assert torch.equal(predict(backbone), adapter)
    assert torch.equal(backbone.encode_prompt(PROMPT).prompt_embeds, text)


def test_only_pairs_get_gradients_and_b_moves_first(paper, backbone):
    method = make_method(paper, backbone, text_encoder_learning_rate=5e-5, init="gaussian")
    method.training_loss(make_batch()).backward()
    trained = dict(named(method))
    assert {id(p) for p in trained.values()} == {
        id(p) for module in backbone.modules for p in module.parameters() if p.grad is not None
    }
    assert all(p.grad.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
    assert all(p.grad.abs().sum() == 0 for name, p in trained.items() if "lora_A" in name)  # since B = 0
    assert [group["lr"] for group in method.parameters()] == [method.config.learning_rate, 5e-5]


def test_where_a_starts(paper, backbone):
    """N(0, 1/r^2) or uniform in +-1/sqrt(in); two seeds differ, one seed gives the same."""
    other = copy.deepcopy(backbone)
    gaussian = make_method(paper, backbone, rank=8, init="gaussian").factors()
    kaiming = make_method(paper, other, rank=8, init="kaiming", seed=1).factors()
    values = torch.cat([pair.down.flatten() for pair in gaussian.values()])
    assert values.std().item() == pytest.approx(1 / 8, rel=0.05)
    for name, pair in kaiming.items():
        assert 0.8 < pair.down.abs().max().item() * pair.down.shape[1] ** 0.5 <= 1
        assert not torch.equal(pair.down, gaussian[name].down)
        assert not pair.up.any()


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # several adapters on one network
def test_sizes_on_stable_diffusion_15(paper):
    """The sheet's arithmetic: values for each rank, and megabytes of float32."""
    backbone, config = load_backbone("sd15", weights="meta"), paper.config
    counts = {}
    for name in ("ATTENTION", "ATTENTION_AND_GEGLU", "TRANSFORMER"):
        pairs = add_lora(backbone.unet, 1, target_modules=getattr(config, name), adapter_name=name)
        counts[name] = (len(pairs) // 2, sum(parameter.numel() for parameter in pairs))
    assert counts == {"ATTENTION": (128, 199_296), "ATTENTION_AND_GEGLU": (144, 311_616), "TRANSFORMER": (192, 423_936)}
    for name, layers in (("attention", config.TEXT_ATTENTION), ("kohya", (*config.TEXT_ATTENTION, "fc1", "fc2"))):
        pairs = add_lora(backbone.text_encoder, 1, target_modules=layers, adapter_name=name)
        counts[name] = (len(pairs) // 2, sum(parameter.numel() for parameter in pairs))
    assert (counts["attention"], counts["kohya"]) == ((48, 73_728), (72, 165_888))

    config = paper.config.LoRAConfig(class_noun="dog")
    trained = sum(p.numel() for _, p in named(paper.method.LoRA(load_backbone("sd15", weights="meta"), config)))
    assert trained == 4 * 199_296 and f"{4 * trained / 1e6:.2f}" == "3.19"
    config = dataclasses.replace(paper.config.LoRAConfig.pivotal("dog"), rank=1)
    trained = sum(p.numel() for _, p in named(paper.method.LoRA(load_backbone("sd15", weights="meta"), config)))
    assert trained == 385_344 and f"{4 * trained / 1e6:.2f}" == "1.54"  # the "386K, 1.6 MB" of HyperDreamBooth


def test_losses_of_five_steps_are_the_stored_ones(paper):
    """tiny-sd with random weights of seed 0, so that training new weights changes nothing here."""
    method = make_method(paper, load_backbone("tiny-sd", weights="random"), rank=4)
    base = {name: p.clone() for name, p in method.backbone.unet.named_parameters() if "lora_" not in name}
    optimizer = torch.optim.AdamW([parameter for _, parameter in named(method)], lr=1e-2)
    losses = []
    for step in range(5):
        loss = method.training_loss(make_batch(step, size=16))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(STORED_LOSSES, rel=1e-3)
    assert all(torch.equal(p, base[name]) for name, p in method.backbone.unet.named_parameters() if name in base)
    assert all(pair.up.abs().sum() > 0 for pair in method.factors().values())


@pytest.mark.parametrize("text_rate, alpha", [(0.0, None), (1e-4, 7.5)])
def test_artifact_gives_the_same_image_here_and_in_a_stock_pipeline(paper, backbone, tmp_path, text_rate, alpha):
    untuned = copy.deepcopy(backbone)
    backbone.to_pipeline().save_pretrained(tmp_path / "model")
    method = train_a_little(make_method(paper, backbone, text_encoder_learning_rate=text_rate, alpha=alpha))
    ours = method.generate(PROMPT, seeds=[SEED])
    method.save(tmp_path / "artifact")
    method.save(tmp_path / "artifact")  # over itself

    pipe = untuned.to_pipeline()
    pipe.set_progress_bar_config(disable=True)
    settings = {
        "num_inference_steps": 3, "guidance_scale": method.config.guidance_scale, "output_type": "pt",
    }  # fmt: skip
    base = pipe(PROMPT, generator=torch.Generator().manual_seed(SEED), **settings).images * 2 - 1
    pipe.load_lora_weights(tmp_path / "artifact")
    theirs = pipe(PROMPT, generator=torch.Generator().manual_seed(SEED), **settings).images * 2 - 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - base).abs().max() > 1e-3

    loaded = paper.method.load_method(tmp_path / "artifact", str(tmp_path / "model"))
    assert loaded.config == method.config
    assert torch.equal(loaded.generate(PROMPT, seeds=[SEED]), ours)
    header = json.loads((tmp_path / "artifact" / "artifact.json").read_text())
    assert (header["slug"], header["class_noun"], header["identifier"]) == (paper.slug, "dog", "sks")
    size = (tmp_path / "artifact" / paper.method.ARTIFACT).stat().st_size
    numbers = sum(p.numel() for _, p in named(method))
    assert 4 * numbers < size < 4 * numbers + 20_000
    assert isinstance(pipe, StableDiffusionPipeline)


def test_pairs_of_another_alpha_keep_their_delta_and_others_are_refused(paper, backbone):
    method = train_a_little(make_method(paper, backbone))
    expected, pairs = predict(backbone), method.factors()
    doubled = {name: pair._replace(up=pair.up / 2, alpha=2 * pair.alpha) for name, pair in pairs.items()}
    method.load_factors(doubled)
    torch.testing.assert_close(predict(backbone), expected)
    first = next(iter(pairs))
    with pytest.raises(ValueError, match=f"1 missing.*{first}"):
        method.load_factors({name: pair for name, pair in pairs.items() if name != first})
    with pytest.raises(ValueError, match="1 unknown.*unet.elsewhere"):
        method.load_factors({**pairs, "unet.elsewhere": pairs[first]})
    with pytest.raises(ValueError, match=first):
        method.load_factors({**pairs, first: pairs[first]._replace(down=torch.zeros(5, 16))})
    assert torch.equal(method.factors()[first].down, pairs[first].down)


def test_prompts_presets_and_bad_values(paper, backbone):
    Config = paper.config.LoRAConfig
    config, pivotal, tiny = Config(class_noun="dog"), Config.pivotal("dog"), Config.tiny("dog")
    assert (config.rank, config.alpha, config.train_steps, config.learning_rate) == (4, None, 500, 1e-4)
    assert (config.instance_prompt(), config.class_prompt()) == ("a photo of a sks dog", "a photo of a dog")
    assert pivotal.instance_prompt() == "a photo of a <s1>"
    assert (pivotal.timestep_share, pivotal.inversion_steps, pivotal.train_steps) == (0.8, 1000, 1000)
    assert tiny.train_steps <= 300
    bad = {
        "rank": 0, "alpha": 0.0, "train_steps": 0, "batch_size": 0, "learning_rate": 0, "weight_decay": -1,
        "text_encoder_learning_rate": float("nan"), "prior_loss_weight": -1, "num_class_images": 0,
        "timestep_share": 1.1, "inversion_steps": -1, "inversion_learning_rate": 0, "num_inference_steps": 0,
        "class_noun": "", "identifier": "", "init": "zeros",
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(config, **{name: value})
    with pytest.raises(ValueError, match="not found in the base model"):
        make_method(paper, backbone, layers=("nowhere",))
    with pytest.raises(ValueError, match="two text encoders"):
        paper.method.LoRA(
            load_backbone("sdxl", weights="meta"), dataclasses.replace(config, text_encoder_learning_rate=1e-5)
        )

"""The equations, what is trained, the artifact, the settings."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

from common.backbones import load_backbone
from common.training import losses as common_losses
from common.training.noising import noise_batch

STORED_LOSSES = [2.238122, 1.555314, 1.678459, 1.567492, 1.212115]


def make_batch(step=0, batch_size=2, *, size=8, with_class=True):
    generator = torch.Generator().manual_seed(step)

    def part(prompt):
        return {"latents": torch.randn(batch_size, 4, size, size, generator=generator), "prompt": [prompt] * batch_size}

    batch = {"instance": part("a photo of a sks dog")} | ({"class": part("a photo of a dog")} if with_class else {})
    return {**batch, "sample_keys": torch.arange(step * batch_size, (step + 1) * batch_size), "step": step}


def make_method(paper, backbone, **changes):
    config = dataclasses.replace(paper.config.DreamBoothConfig.tiny("dog"), **changes)
    return paper.method.DreamBooth(backbone, config)


def named(method):
    return [pair for group in method.parameters() for pair in group["params"]]


def test_prior_preservation_loss_by_hand(paper):
    instance, of_class = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 8.0])
    loss = paper.method.prior_preservation_loss
    assert loss(instance, of_class, 0.5).item() == 2 + 0.5 * 6
    assert loss(instance, of_class, 0.0).item() == 2
    assert loss(of_class, instance, 0.5).item() == 6 + 0.5 * 2  # the two arguments are not the same thing


def test_denoising_loss_is_the_papers_x_prediction_loss_up_to_its_weight(paper, backbone):
    """Eq. 1 with x_theta = (z - sigma eps_theta) / alpha and w_t = alpha^2 / sigma^2, in float64."""
    backbone.to(dtype=torch.float64).freeze()
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noised = noise_batch(backbone, latents, torch.arange(3), seed=0)
    conditioning = backbone.encode_prompt(["a sks dog"] * 3)
    ours = paper.method.denoising_loss(backbone, noised, conditioning)

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)[noised["timesteps"]].view(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    z = alpha * latents + sigma * noised["noise"]
    eps = backbone.unet(z, noised["timesteps"], conditioning.prompt_embeds).sample
    x_error = ((z - sigma * eps) / alpha - latents).square().flatten(1).mean(1)
    expected = (alpha**2 / sigma**2).flatten() * x_error
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=0)


def test_denoising_loss_equals_the_shared_one(paper, backbone):
    noised = noise_batch(backbone, torch.randn(2, 4, 8, 8), torch.arange(2), seed=0)
    conditioning = backbone.encode_prompt(["a sks dog", "a dog"])
    ours = paper.method.denoising_loss(backbone, noised, conditioning)
    assert torch.equal(ours, common_losses.denoising_loss(backbone, noised, conditioning))


def test_training_loss_is_two_separate_passes(paper, backbone):
    """Reference: each term alone, noised here by the closed form, with lambda = 0.25."""
    method, batch = make_method(paper, backbone, prior_loss_weight=0.25), make_batch()
    streams = {"instance": 0, "class": paper.method.derive_seed(0, paper.method.CLASS_STREAM)}
    terms, drawn = [], []
    for name, seed in streams.items():
        noised = noise_batch(backbone, batch[name]["latents"], batch["sample_keys"], seed=seed)
        alpha_bar = backbone.noise_scheduler.alphas_cumprod[noised["timesteps"]].view(-1, 1, 1, 1)
        z = alpha_bar.sqrt() * batch[name]["latents"] + (1 - alpha_bar).sqrt() * noised["noise"]
        context = backbone.encode_prompt(batch[name]["prompt"]).prompt_embeds
        terms.append(F.mse_loss(backbone.unet(z, noised["timesteps"], context).sample, noised["noise"]))
        drawn.append(noised)
    torch.testing.assert_close(method.training_loss(batch), terms[0] + 0.25 * terms[1], rtol=1e-5, atol=0)
    assert not torch.equal(drawn[0]["timesteps"], drawn[1]["timesteps"])  # t and t' are drawn independently
    assert not torch.equal(drawn[0]["noise"], drawn[1]["noise"])


def test_without_prior_loss_no_class_batch_is_needed(paper, backbone):
    with_prior, naive = make_method(paper, backbone), make_method(paper, backbone, prior_loss_weight=0.0)
    batch = make_batch(with_class=False)
    alone = paper.method.prior_preservation_loss(naive.training_loss(batch)[None], torch.zeros(1), 1.0)
    assert torch.equal(alone, naive.training_loss(make_batch()))
    assert with_prior.training_loss(make_batch()) > alone
    with pytest.raises(KeyError, match="class"):
        with_prior.training_loss(batch)


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_gradients_reach_what_is_trained_and_nothing_else(paper, backbone, train_text_encoder):
    method = make_method(paper, backbone, train_text_encoder=train_text_encoder)
    method.training_loss(make_batch()).backward()
    trained = {id(parameter) for _, parameter in named(method)}
    with_grad = {id(p) for module in backbone.modules for p in module.parameters() if p.grad is not None}
    assert with_grad == trained
    assert trained >= {id(p) for p in backbone.unet.parameters()}
    assert (id(backbone.text_encoder.get_input_embeddings().weight) in trained) == train_text_encoder
    assert all(p.grad is None for p in backbone.vae.parameters())


def test_class_prompts_train_the_text_encoder_too(paper, backbone):
    method = make_method(paper, backbone, train_text_encoder=True)
    batch = make_batch()
    batch["class"]["prompt"] = ["a photo of a teapot"] * 2
    method.training_loss(batch).backward()
    rows = backbone.text_encoder.get_input_embeddings().weight.grad.abs().sum(1).nonzero().flatten().tolist()
    words = {backbone.tokenizer.decode([row]).strip() for row in rows}
    assert {"sks", "dog", "teapot"} <= words and "house" not in words


def test_vocabulary_is_not_decayed(paper, backbone):
    groups = make_method(paper, backbone, train_text_encoder=True).parameters()
    spared = [name for group in groups if group.get("weight_decay") == 0.0 for name, _ in group["params"]]
    assert len(spared) == 1 and spared[0].endswith("token_embedding.weight")


@pytest.mark.parametrize("train_text_encoder, numbers", [(False, 859_520_964), (True, 982_581_444)])
def test_sizes_on_stable_diffusion_15(paper, train_text_encoder, numbers):
    config = paper.config.DreamBoothConfig(class_noun="dog", train_text_encoder=train_text_encoder)
    method = paper.method.DreamBooth(load_backbone("sd15", weights="meta"), config)
    trained = sum(parameter.numel() for _, parameter in named(method))
    assert trained == numbers
    assert f"{4 * trained / 1e9:.2f}" == ("3.93" if train_text_encoder else "3.44")  # GB in float32
    if train_text_encoder:
        assert f"{4 * trained / 2**30:.2f}" == "3.66"  # the "3.66GB" of other papers


def test_losses_of_five_steps_are_the_stored_ones(paper):
    """tiny-sd with random weights of seed 0, so that training new weights changes nothing here."""
    method = make_method(paper, load_backbone("tiny-sd", weights="random"))
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    losses = []
    for step in range(5):
        loss = method.training_loss(make_batch(step, size=16))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(STORED_LOSSES, rel=1e-3)


def test_artifact_is_a_pipeline_that_gives_the_same_image(paper, backbone, tmp_path):
    untuned = copy.deepcopy(backbone)
    method = make_method(paper, backbone, num_inference_steps=3, train_text_encoder=True)
    with torch.no_grad():
        for _, parameter in named(method):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    prompt, seed = "a photo of a sks dog in the snow", 7
    ours = method.generate(prompt, seeds=[seed])
    method.save(tmp_path)
    method.save(tmp_path)  # over itself

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": method.config.guidance_scale, "output_type": "pt"}
    theirs = pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images * 2 - 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    loaded = paper.method.load_method(tmp_path)
    assert loaded.config == method.config
    assert torch.equal(loaded.generate(prompt, seeds=[seed]), ours)
    fresh = make_method(paper, untuned, **dataclasses.asdict(method.config))
    assert not torch.equal(fresh.generate(prompt, seeds=[seed]), ours)
    fresh.load(tmp_path)
    assert torch.equal(fresh.generate(prompt, seeds=[seed]), ours)

    header = json.loads((tmp_path / "artifact.json").read_text())
    assert header["slug"] == paper.slug
    assert (header["class_noun"], header["identifier"]) == ("dog", "sks")
    unet_bytes = (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert unet_bytes == pytest.approx(4 * sum(p.numel() for p in backbone.unet.parameters()), rel=0.2)
    (tmp_path / "artifact.json").unlink()
    with pytest.raises(FileNotFoundError, match="artifact.json"):
        paper.method.load_method(tmp_path)


def test_identifier_is_read_back_as_the_tokens_that_were_drawn(paper, backbone):
    find, tokenizer = paper.method.rare_token_identifier, backbone.tokenizer
    rare = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("sks", "zwx", "qlv", "ohwx", "yellow")]
    drawn = {find(tokenizer, token_ids=rare, generator=torch.Generator().manual_seed(i)) for i in range(40)}
    assert drawn == {"sks", "zwx", "qlv"}  # the others are longer than 3 characters
    pair = find(tokenizer, token_ids=rare, num_tokens=2, generator=torch.Generator().manual_seed(0))
    ids = tokenizer(pair, add_special_tokens=False).input_ids
    assert len(set(ids)) == 2 and set(ids) <= set(rare)
    with pytest.raises(ValueError, match="cannot draw 1 tokens from the 0"):
        find(tokenizer, generator=torch.Generator())  # ids of CLIP's vocabulary, which this one does not have


def test_prompts(paper):
    config = paper.config.DreamBoothConfig(class_noun="dog")
    assert paper.method.instance_prompt(config) == "a sks dog"
    assert paper.method.class_prompt(config) == "a dog"
    without = dataclasses.replace(config, class_noun="", prior_loss_weight=0)
    assert paper.method.instance_prompt(without) == "a sks"
    with pytest.raises(ValueError, match="rare_token_identifier"):
        paper.method.DreamBooth(load_backbone("tiny-sd", weights="meta"), dataclasses.replace(config, identifier=None))


def test_presets_have_the_papers_values_and_bad_values_raise(paper):
    Config = paper.config.DreamBoothConfig
    config, tiny = Config(class_noun="dog"), Config.tiny("dog")
    assert (config.learning_rate, config.train_steps, config.prior_loss_weight) == (5e-6, 1000, 1.0)
    assert (config.num_class_images, config.train_text_encoder) == (1000, False)
    assert tiny.train_steps == 200 and tiny.batch_size == 2
    bad = {
        "prior_loss_weight": -1, "learning_rate": 0, "train_steps": 0, "batch_size": 0, "num_class_images": 0,
        "num_inference_steps": 0, "weight_decay": float("nan"), "prompt_template": "a dog", "identifier": " ",
        "class_noun": "",
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(config, **{name: value})

"""The losses, what learns from them, sampling, the artifact, the settings."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common.backbones import load_backbone
from common.io import load_safetensors
from common.sampling import sample_clips, seeded_noise
from common.training.noising import noise_batch
from common.training.seeding import seed_global_generators, seeded_integers

from .conftest import randn

LOSSES_OF_FIVE_STEPS = [3.6100185, 4.5984554, 4.1543560, 4.3116980, 4.2648520]
PROMPT = "a video of a cat zigzag"


def grads(method):
    """Paths that have gradients."""
    return {path for path in method.paths.paths if any(p.grad is not None for _, p in method.paths.pairs(path))}


# The losses


def test_debiasing_by_hand(paper):
    """beta = 1: sqrt(2) eps_i - eps_anchor; the anchor becomes (sqrt(2) - 1) eps. beta = 0.75: the root is 1.25."""
    noise = torch.tensor([1.0, 2.0, 5.0]).view(1, 1, 3, 1, 1)
    found = paper.method.debiased(noise, torch.tensor([1]), 1.0).flatten()
    root = 2**0.5
    torch.testing.assert_close(found, torch.tensor([root - 2, 2 * (root - 1), 5 * root - 2]))
    found = paper.method.debiased(noise, torch.tensor([2]), 0.75).flatten()
    torch.testing.assert_close(found, torch.tensor([1.25 - 3.75, 2.5 - 3.75, 6.25 - 3.75]))
    assert torch.equal(paper.method.debiased(noise, torch.tensor([0]), 0.0), noise)


def test_every_clip_has_its_own_anchor(paper):
    noise, anchors = randn(2, 4, 3, 2, 2), torch.tensor([2, 0])
    found = paper.method.debiased(noise, anchors, 1.0)
    alone = torch.cat([paper.method.debiased(noise[i : i + 1], anchors[i : i + 1], 1.0) for i in range(2)])
    assert torch.equal(found, alone)
    assert torch.equal(paper.method.frames_of(noise, anchors), torch.stack([noise[0, :, 2:3], noise[1, :, 0:1]]))


@pytest.mark.parametrize(
    ("anchor", "debiased_loss", "temporal_loss", "debiased_prediction"),
    [
        (2, 3.9175479412078857, 6.184820652008057,
         [-2.0602744, -1.4719710, -1.7980318, -0.8796467, 0.7321613, 1.1363611, -1.8905697, -3.2574213]),
        (1, 4.381520748138428, 6.6487932205200195,
         [-2.4408884, -2.3216925, -0.0383589, 1.5016221, 0.3515473, 0.2866396, -0.1308968, -0.8761525]),
        (0, 3.4704959392547607, 5.737768650054932,
         [-0.4663382, -0.4773232, -0.1037931, -0.1797185, 2.3260975, 2.1310089, -0.1963310, -2.5574930]),
    ],
)  # fmt: skip
def test_temporal_loss_has_the_official_values(paper, anchor, debiased_loss, temporal_loss, debiased_prediction):
    """showlab/MotionDirector 0146a50, MotionDirector_train.py, the lines of finetune_unet from loss_temporal on;
    model_pred and target are torch.randn(1, 2, 3, 2, 2) of one generator with seed 0; the anchors are those of
    torch.manual_seed(0), (1), (2)."""
    generator = torch.Generator().manual_seed(0)
    model_pred, target = (torch.randn(1, 2, 3, 2, 2, generator=generator) for _ in range(2))
    anchors = torch.tensor([anchor])
    assert paper.method.debiased_loss(model_pred, target, anchors, 1.0).item() == pytest.approx(debiased_loss, rel=1e-5)
    assert paper.method.temporal_loss(model_pred, target, anchors, 1.0).item() == pytest.approx(temporal_loss, rel=1e-5)
    found = paper.method.debiased(model_pred, anchors, 1.0).flatten()[:8]
    torch.testing.assert_close(found, torch.tensor(debiased_prediction), rtol=1e-5, atol=1e-5)


def test_spatial_loss_is_that_of_one_frame_without_temporal_layers(paper, video_backbone):
    """Reference: the frame as a picture through the network, compared with its own noise."""
    latents, keys = randn(2, 4, 4, 8, 8), torch.tensor([3, 4])
    noised = noise_batch(video_backbone, latents, keys, seed=0)
    told = video_backbone.encode_prompt(["a duck", "a cat"])
    with torch.no_grad():
        found = paper.method.spatial_loss(video_backbone, noised, told, torch.tensor([1, 3]))
        for module in (video_backbone.unet.transformer_in, video_backbone.unet.mid_block.temp_convs[0]):
            for parameter in module.parameters():
                parameter.add_(1.0)  # nothing of this is looked at
        expected = []
        for i, frame in enumerate((1, 3)):
            picture = noised["noisy_latents"][i : i + 1, :, frame : frame + 1]
            answer = video_backbone.predict(picture, noised["timesteps"][i], told[i], temporal=False)
            expected.append(F.mse_loss(answer[0, :, 0], noised["noise"][i, :, frame]))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


# What learns


def test_loss_is_the_sum_of_both_paths_losses(paper, make, batch, train_a_little):
    """Reference: both losses from the network's answers; the spatial path is on in both."""
    method = train_a_little(make(spatial_off_share=0.0))
    told, given = method.backbone.encode_prompt(batch()["prompt"]), batch(step=7)
    with torch.no_grad():
        found = method.training_loss(given)
        noised = noise_batch(method.backbone, given["latents"], given["sample_keys"], seed=0)
        with method.paths.using({"spatial_000": 1.0}):
            frame = seeded_integers(given["sample_keys"], 0, 4, seed=0, stream="frame")
            spatial = paper.method.spatial_loss(method.backbone, noised, told, frame)
        with method.paths.using({"spatial_000": 1.0, "temporal": 1.0}):
            answer = method.backbone.predict(noised["noisy_latents"], noised["timesteps"], told)
        anchor = seeded_integers(given["sample_keys"], 0, 4, seed=0, stream="anchor")
        temporal = paper.method.temporal_loss(answer, noised["noise"], anchor, 1.0)
    assert found.item() == pytest.approx((spatial + temporal).item(), rel=1e-5)
    assert method.last_losses == pytest.approx({"spatial_loss": spatial.item(), "temporal_loss": temporal.item()})


def test_anchors_and_frames_are_new_in_every_step(make):
    method, clips = make(), randn(1, 4, 4, 2, 2)
    drawn = {s: [method._draw(clips, torch.tensor([key]), s).item() for key in range(40)] for s in ("frame", "anchor")}
    assert all(set(numbers) == {0, 1, 2, 3} for numbers in drawn.values()) and drawn["frame"] != drawn["anchor"]


def test_one_step_updates_as_two_alternating_ones_would(paper, make, batch, small, video_backbone, train_a_little):
    """Reference: backward of L_spatial, backward of L_temporal from the same weights, gradients that L_temporal leaves
    on the spatial path thrown away, and a step of an optimiser for each path."""
    start = train_a_little(make(spatial_off_share=0.0))
    twin = paper.method.MotionDirector(load_backbone(video_backbone.name), start.config)
    train_a_little(twin)
    settings = {"lr": 1e-2, "weight_decay": 1e-2}
    one = torch.optim.AdamW(start.parameters(), **settings)
    two = {path: torch.optim.AdamW(twin.paths.pairs(path), **settings) for path in twin.paths.paths}
    for step in range(3):
        start.training_loss(batch(step)).backward()
        one.step()
        one.zero_grad()

        given = batch(step)
        noised = noise_batch(twin.backbone, given["latents"], given["sample_keys"], seed=0)
        told = twin.backbone.encode_prompt(given["prompt"])
        both = {"spatial_000": 1.0, "temporal": 1.0}
        with twin.paths.using({"spatial_000": 1.0}, learning=["spatial_000"]):
            frame = seeded_integers(given["sample_keys"], 0, 4, seed=0, stream="frame")
            paper.method.spatial_loss(twin.backbone, noised, told, frame).mean().backward()
            kept = [parameter.grad.clone() for _, parameter in twin.paths.pairs("spatial_000")]
        with twin.paths.using(both, learning=both):
            answer = twin.backbone.predict(noised["noisy_latents"], noised["timesteps"], told)
            anchor = seeded_integers(given["sample_keys"], 0, 4, seed=0, stream="anchor")
            paper.method.temporal_loss(answer, noised["noise"], anchor, 1.0).mean().backward()
        polluted = [parameter.grad for _, parameter in twin.paths.pairs("spatial_000")]
        assert any(not torch.equal(a, b) for a, b in zip(kept, polluted, strict=True))
        for gradient, (_, parameter) in zip(kept, twin.paths.pairs("spatial_000"), strict=True):
            parameter.grad = gradient
        for optimizer in two.values():
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), (_, theirs) in zip(start.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_only_this_clips_spatial_path_and_the_temporal_one_learn(make, batch):
    method = make(num_clips=2, spatial_off_share=0.0)
    before = {name: p.clone() for name, p in method.backbone.unet.named_parameters()}
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    method.training_loss(batch(clip=1)).backward()
    assert grads(method) == {"spatial_001", "temporal"}
    optimizer.step()
    after = dict(method.backbone.unet.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name and "spatial_000" not in name for name in changed)
    assert {True} == {any(path in name for name in changed) for path in ("spatial_001", "temporal")}
    assert all(p.grad is None for name, p in after.items() if "lora_" not in name)


def test_a_share_of_the_steps_leaves_the_spatial_path_off(paper, make, batch, train_a_little):
    method = train_a_little(make(spatial_off_share=1.0))
    method.training_loss(batch()).backward()
    assert grads(method) == {"temporal"} and set(method.last_losses) == {"temporal_loss"}
    noised = noise_batch(method.backbone, batch()["latents"], torch.tensor([0]), seed=0)
    with torch.no_grad(), method.paths.using({"temporal": 1.0}):
        told = method.backbone.encode_prompt(batch()["prompt"])
        answer = method.backbone.predict(noised["noisy_latents"], noised["timesteps"], told)
    anchor = seeded_integers(torch.tensor([0]), 0, 4, seed=0, stream="anchor")
    expected = paper.method.temporal_loss(answer, noised["noise"], anchor, 1.0)
    assert method.last_losses["temporal_loss"] == pytest.approx(expected.item(), rel=1e-5)
    method.config = replace(method.config, spatial_off_share=0.2)
    off = 0
    for step in range(30):
        with torch.no_grad():
            method.training_loss(batch(step))
        off += "spatial_loss" not in method.last_losses
    assert 2 <= off <= 12


def test_one_spatial_path_can_serve_all_clips(make, batch):
    method = make(num_clips=3, single_spatial_lora=True, spatial_off_share=0.0)
    assert method.paths.paths == ("spatial_000", "temporal")
    method.training_loss(batch(clip=2)).backward()
    assert grads(method) == {"spatial_000", "temporal"}


def test_losses_of_five_steps(make, batch):
    method = make(num_clips=2, dropout=0.1, learning_rate=1e-2)
    optimizer, losses = torch.optim.AdamW(method.parameters(), lr=1e-2, weight_decay=1e-2), []
    for step in range(5):
        seed_global_generators(0, step)
        loss = method.training_loss(batch(step, clip=step % 2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(LOSSES_OF_FIVE_STEPS, rel=1e-4)


def test_appearance_learns_from_pictures_alone(paper, video_backbone, small):
    method = paper.method.Appearance(video_backbone, small())
    pictures = {
        "latents": randn(2, 4, 8, 8),
        "prompt": ["a photo of a sks cat"] * 2,
        "sample_keys": torch.tensor([0, 1]),
    }
    loss = method.training_loss(pictures)
    loss.backward()
    assert method.paths.paths == ("spatial_000",) and grads(method) == {"spatial_000"}
    noised = noise_batch(video_backbone, pictures["latents"][:, :, None], pictures["sample_keys"], seed=0)
    with torch.no_grad():
        told = video_backbone.encode_prompt(pictures["prompt"])
        answer = video_backbone.predict(noised["noisy_latents"], noised["timesteps"], told, temporal=False)
    assert loss.item() == pytest.approx(F.mse_loss(answer, noised["noise"]).item(), rel=1e-5)


def test_two_clips_in_one_step_are_refused(make, batch):
    two = {**batch(), "latents": randn(2, 4, 4, 8, 8)}
    with pytest.raises(ValueError, match="a step takes one clip, got 2"):
        make().training_loss(two)


# Sampling


def test_inference_uses_the_temporal_path_unless_asked(paper, make, video_backbone, train_a_little):
    method = make()
    settings = {"seeds": [0, 1], "num_inference_steps": 2, "guidance_scale": 5.0}
    untuned = sample_clips(video_backbone, PROMPT, **settings)
    assert torch.equal(method.generate(PROMPT, seeds=[0, 1]), untuned) and untuned.shape == (2, 3, 4, 32, 32)
    train_a_little(method)
    moved = method.generate(PROMPT, seeds=[0, 1])
    with method.paths.using({"temporal": 1.0}):
        assert torch.equal(moved, sample_clips(video_backbone, PROMPT, **settings))
    both = method.generate(PROMPT, seeds=[0, 1], spatial_scale=0.5)
    with method.paths.using({"temporal": 1.0, "spatial_000": 0.5}):
        assert torch.equal(both, sample_clips(video_backbone, PROMPT, **settings))
    assert not torch.equal(both, moved) and not torch.equal(moved, untuned)


def test_noise_prior(make, video_backbone, train_a_little):
    """Reference: x_T = sqrt(p) z_inv + sqrt(1 - p) noise, from the noise that the seeds stand for."""
    method = train_a_little(make(num_clips=2))
    with pytest.raises(ValueError, match="noise_prior 0.5 needs inverted noise"):
        method.generate(PROMPT, seeds=[0], noise_prior=0.5)
    method.invert(randn(2, 4, 4, 8, 8, seed=3))
    inverted = method.inverted[1:]
    noise = 0.25**0.5 * inverted + 0.75**0.5 * seeded_noise(video_backbone, [0, 1])
    with method.paths.using({"temporal": 1.0}):
        expected = sample_clips(
            video_backbone, PROMPT, seeds=[0, 1], noise=noise, num_inference_steps=2, guidance_scale=5.0
        )
    found = method.generate(PROMPT, seeds=[0, 1], noise_prior=0.25, clip_index=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    one, other = method.generate(PROMPT, seeds=[0, 1], noise_prior=1.0)
    assert torch.equal(one, other)


def test_inversion_is_that_of_the_untuned_backbone(make, video_backbone, train_a_little):
    """With the empty prompt. Reference: two steps of DDIM backwards by hand, 0 -> 1 -> 501, without any pairs."""
    method, clip = train_a_little(make()), randn(1, 4, 4, 8, 8, seed=3)
    method.invert(clip)
    fresh = load_backbone(video_backbone.name)
    alphas, latents = fresh.noise_scheduler.alphas_cumprod.double(), clip
    with torch.no_grad():
        for below, timestep in ((0, 1), (1, 501)):
            eps = fresh.predict(latents.float(), timestep, fresh.encode_prompt(""))
            clean = (latents - (1 - alphas[below]).sqrt() * eps) / alphas[below].sqrt()
            latents = alphas[timestep].sqrt() * clean + (1 - alphas[timestep]).sqrt() * eps
    torch.testing.assert_close(method.inverted, latents.float(), rtol=1e-4, atol=1e-4)


def test_validation_is_of_the_temporal_path_alone(make, batch, train_a_little):
    method, latents = make(), batch()["latents"]
    fresh = method.validation_loss(latents, [PROMPT])
    train_a_little(method)
    assert method.validation_loss(latents, [PROMPT]) != fresh
    for _, parameter in method.paths.pairs("temporal"):
        parameter.data.zero_()
    assert method.validation_loss(latents, [PROMPT]) == fresh


# The artifact


def test_artifact_round_trip_and_size(paper, make, train_a_little, tmp_path):
    method = train_a_little(make(num_clips=2))
    method.invert(randn(2, 4, 4, 8, 8))
    method.save(tmp_path)
    names = ["inverted_noise", "spatial_000_lora", "spatial_001_lora", "temporal_lora"]
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == names
    tensors, header = load_safetensors(tmp_path / "temporal_lora.safetensors")
    numbers = sum(parameter.numel() for _, parameter in method.paths.pairs("temporal"))
    assert sum(tensor.numel() for tensor in tensors.values()) == numbers and header["slug"] == paper.slug
    assert (tmp_path / "temporal_lora.safetensors").stat().st_size - 4 * numbers < 20_000
    assert json.loads((tmp_path / "artifact.json").read_text())["backbone"] == method.backbone.name
    again = paper.method.load_method(tmp_path / "temporal_lora.safetensors")
    for (name, ours), (_, theirs) in zip(again.parameters(), method.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for changes in ({}, {"noise_prior": 0.5, "spatial_scale": 1.0, "clip_index": 1}):
        clips = [m.generate(PROMPT, seeds=[4], **changes) for m in (method, again)]
        assert torch.equal(*clips)


def test_a_look_learned_elsewhere_is_used_with_the_motion(paper, make, small, train_a_little, video_backbone, tmp_path):
    motion = train_a_little(make(num_clips=2))
    motion.save(tmp_path / "motion")
    look = paper.method.Appearance(load_backbone(video_backbone.name), small(spatial_scale=1.0))
    for i, (_, parameter) in enumerate(look.parameters()):
        parameter.data.copy_(0.1 * randn(*parameter.shape, seed=500 + i))
    look.save(tmp_path / "look")
    mixed = paper.method.load_method(tmp_path / "motion", appearance=tmp_path / "look")
    for path, source in (("temporal", motion), ("spatial_000", look)):
        for (_, ours), (_, theirs) in zip(mixed.paths.pairs(path), source.paths.pairs(path), strict=True):
            assert torch.equal(ours, theirs)
    clips = mixed.generate(PROMPT, seeds=[0])
    assert torch.equal(clips, mixed.generate(PROMPT, seeds=[0], spatial_scale=1.0))
    assert not torch.equal(clips, motion.generate(PROMPT, seeds=[0], spatial_scale=1.0))
    alone = paper.method.load_method(tmp_path / "look")
    assert alone.paths.paths == ("spatial_000",) and alone.generate(PROMPT, seeds=[0]).shape == clips.shape


def test_foreign_artifacts_are_refused(paper, tmp_path):
    (tmp_path / "artifact.json").write_text(json.dumps({"slug": "another"}))
    with pytest.raises(ValueError, match="was not written by this method, but by another"):
        paper.method.load_method(tmp_path)


# Settings


@pytest.mark.parametrize("preset", ["several_clips", "appearance", "tiny", "tiny_appearance"])
def test_presets_differ_from_the_default_and_stay_valid(paper, preset):
    config_class = paper.config.MotionDirectorConfig
    config = getattr(config_class, preset)()
    assert config != config_class() and config == replace(config)
    assert (config.spatial_scale == 1.0) == preset.endswith("appearance")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be >= 1"),
        ({"num_frames": 0}, "num_frames must be >= 1"),
        ({"debias_strength": -1.0}, "debias_strength must be >= 0"),
        ({"noise_prior": 1.5}, r"noise_prior must be in \[0, 1\]"),
        ({"spatial_off_share": -0.1}, r"spatial_off_share must be in \[0, 1\]"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
    ],
)
def test_bad_settings(paper, changes, message):
    with pytest.raises(ValueError, match=message):
        paper.config.MotionDirectorConfig(**changes)


def test_picture_backbones_and_odd_sizes_are_refused(paper, video_backbone, small):
    with pytest.raises(ValueError, match="makes pictures"):
        paper.method.MotionDirector(load_backbone("sd15", weights="meta"), small())
    with pytest.raises(ValueError, match="resolution_px must be a multiple of 4"):
        paper.method.MotionDirector(video_backbone, small(resolution_px=33))

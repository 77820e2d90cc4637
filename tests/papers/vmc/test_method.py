"""What is trained, inversion, generation, the artifact, settings."""

import json
from dataclasses import replace

import pytest
import torch

from common.backbones import load_backbone
from common.io import atomic_save_safetensors, load_safetensors
from common.sampling.video import sample_clips
from common.training.seeding import keys_of_step

LOSSES_OF_FIVE_STEPS = {
    "paper": [1.0834198, 0.9810139, 1.0262293, 0.9937828, 1.0115272],
    "official": [0.2520512, 0.2086079, 0.2309408, 0.2371520, 0.2468510],
    "l2": [2.1222827, 2.2233434, 1.9477549, 2.0816956, 2.0037777],
}
TEMPORAL = 18  # matrices of the small network: three blocks


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(paper, backbone, kind=None, **changes):
    changes = {"num_frames": 4, "num_inference_steps": 2} | changes
    config = replace(paper.config.VMCConfig.tiny(), **changes)
    method = (kind or paper.method.VMC)(backbone, config)
    method.set_source(randn(4, config.num_frames, 8, 8), "a duck zigzag")
    return method


def batch(step: int, clips: int = 1) -> dict:
    latents = randn(1, 4, 4, 8, 8).expand(clips, -1, -1, -1, -1)
    return {"latents": latents, "prompt": ["a duck zigzag"] * clips, "sample_keys": keys_of_step(step, clips)}


def train(method, steps=5, learning_rate=1e-3):
    parameters, losses = [parameter for _, parameter in method.parameters()], []
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    for step in range(steps):
        loss = method.training_loss(batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# What is trained


def test_numbers_on_modelscope(paper):
    method = paper.method.VMC(load_backbone("modelscope", weights="meta"), paper.config.VMCConfig())
    parameters = method.parameters()
    assert len(parameters) == 96 and sum(p.numel() for _, p in parameters) == 74_342_400
    ends = {tuple(name.rsplit(".", 4)[1:3]) for name, _ in parameters}
    assert ends == {(block, part) for block in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v")}
    assert all(".temp_attentions." in name for name, _ in parameters)
    assert method.backbone.latent_shape == (4, 8, 32, 32)


def test_a_rank_makes_the_changes_small(paper):
    config = paper.config.VMCConfig(rank=32)
    method = paper.method.VMC(load_backbone("modelscope", weights="meta"), config)
    widths = [len(weight) for weight in method.select(method.backbone.unet).values()]
    assert sum(p.numel() for _, p in method.parameters()) == sum(2 * 32 * width for width in widths)


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 2])
def test_a_fresh_adapter_changes_nothing(paper, video_backbone, rank):
    latents, told = randn(1, 4, 4, 8, 8), video_backbone.encode_prompt("a duck")
    before = video_backbone.predict(latents, 500, told)
    method = make(paper, video_backbone, rank=rank)
    assert torch.equal(video_backbone.predict(latents, 500, told), before)
    for _, parameter in method.parameters():
        parameter.add_(0.3 * randn(*parameter.shape))
    assert not torch.equal(video_backbone.predict(latents, 500, told), before)
    method.set_strength(0)
    assert torch.equal(video_backbone.predict(latents, 500, told), before)


@pytest.mark.parametrize("residual_loss", ["paper", "official", "l2"])
def test_only_queries_keys_and_values_of_temporal_attention_learn(paper, video_backbone, residual_loss):
    method = make(paper, video_backbone, residual_loss=residual_loss)
    before = {name: value.clone() for name, value in video_backbone.unet.state_dict().items()}
    assert len(method.changes) == TEMPORAL and set(method.changes) <= set(before)
    losses = train(method)
    after = video_backbone.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for module in video_backbone.modules for p in module.parameters())
    assert all(change.change.abs().max() > 0 for change in method.changes.values())
    assert losses == pytest.approx(LOSSES_OF_FIVE_STEPS[residual_loss], rel=1e-4)


def test_the_loss_is_the_residual_loss_of_the_noise(paper, video_backbone):
    method = make(paper, video_backbone)
    told = batch(3, clips=2)
    with torch.no_grad():
        noise_pred, noise = method.predict_noise(told)
        expected = paper.method.residual_cosine_loss(noise_pred, noise)
        assert method.training_loss(told) == expected.mean() and len(expected) == 2
    assert (noise[0] - noise[1]).abs().max() > 1  # each draw its own noise
    correlation = torch.corrcoef(noise[0].transpose(0, 1).flatten(1))
    assert (correlation - torch.eye(4)).abs().max() < 0.3  # and each frame


def test_training_lowers_the_validation_loss(paper, video_backbone):
    method = make(paper, video_backbone)
    before = method.validation_loss()
    assert method.validation_loss() == before
    train(method, steps=30, learning_rate=1e-2)
    assert method.validation_loss() < before - 1e-3


def test_baselines_tune_what_they_say(paper, video_backbone):
    names = set(make(paper, video_backbone, paper.variants.TuneAVideoStyle).changes)
    temporal = {name for name in names if ".temp_attentions." in name}
    spatial = names - temporal
    assert len(temporal) == TEMPORAL // 3 * 4 and any(name.endswith("to_out.0.weight") for name in temporal)
    assert len(spatial) == 6 and all(name.endswith("to_q.weight") and ".attentions." in name for name in spatial)

    video_backbone = load_backbone(video_backbone.name)
    method = make(paper, video_backbone, paper.variants.DenoisingTuning)
    assert set(method.changes) == set(paper.method.temporal_projections(video_backbone.unet))
    with torch.no_grad():
        noise_pred, noise = method.predict_noise(batch(0))
        assert method.training_loss(batch(0)).item() == pytest.approx((noise_pred - noise).square().mean().item())


def test_networks_without_temporal_attention_are_refused(paper, shared_backbone):
    with pytest.raises(ValueError, match="has no layers called temp_attentions"):
        paper.method.VMC(shared_backbone, paper.config.VMCConfig())


# Inversion and generation


def test_inversion_has_the_official_values(paper, video_backbone, monkeypatch):
    """HyeonHo99/Video-Motion-Customization 0d8779f, common/util.py, ddim_inversion, 5 steps, its scheduler folder.

    The network is 0.8 sin(2 x + t / 300), told nothing; the clip is seeded with 1.
    """
    method = make(paper, video_backbone, num_frames=2)
    method.set_source(torch.randn(4, 2, 1, 2, generator=torch.Generator().manual_seed(1)), "a duck")
    empty = video_backbone.encode_prompt("").prompt_embeds

    def predict_noise(latents, timesteps, conditioning):
        assert torch.equal(conditioning.prompt_embeds, empty)
        return 0.8 * torch.sin(2 * latents + timesteps[0] / 300)

    monkeypatch.setattr(video_backbone, "predict_noise", predict_noise)
    expected = [
        -0.4676, 0.216887, 0.237307, -0.486441, 0.062722, 0.222768, -0.055554, -0.486367, 0.234239, 0.071371, 0.19738,
        0.066028, 0.063857, 0.074274, 0.070545, 0.072404,
    ]  # fmt: skip
    torch.testing.assert_close(method.inverted_noise(5).flatten(), torch.tensor(expected), rtol=1e-4, atol=2e-5)


def test_inversion_follows_the_weights(paper, video_backbone):
    method = make(paper, video_backbone)
    untuned = method.inverted_noise(2)
    assert method.inverted_noise(2) is untuned and untuned.shape == (1, 4, 4, 8, 8)
    train(method, steps=3, learning_rate=1e-2)
    tuned = method.inverted_noise(2)
    assert not torch.equal(tuned, untuned)
    method.set_strength(0)
    assert torch.equal(method.inverted_noise(2), untuned)
    method.set_strength(1)
    assert torch.equal(method.inverted_noise(2), tuned)
    method.set_source(randn(4, 4, 8, 8, seed=7), "a duck zigzag")
    assert not torch.equal(method.inverted_noise(2), tuned)


def test_clips_begin_at_the_inverted_noise(paper, video_backbone):
    method = make(paper, video_backbone)
    clips = method.generate("a red car", seeds=[0, 1])
    assert clips.shape == (2, 3, 4, 32, 32) and torch.equal(clips[0], clips[1])
    settings = {"num_inference_steps": 2, "guidance_scale": method.config.guidance_scale}
    expected = sample_clips(video_backbone, "a red car", seeds=[5], noise=method.inverted_noise(2), **settings)
    assert torch.equal(clips[:1], expected)

    fresh = method.generate("a red car", seeds=[0, 1], inverted_share=0)
    assert torch.equal(fresh, sample_clips(video_backbone, "a red car", seeds=[0, 1], **settings))
    mixed = method.generate("a red car", seeds=[0, 1], inverted_share=0.5)
    assert not torch.equal(mixed[0], mixed[1]) and not torch.equal(mixed, fresh)


def test_without_a_clip_there_is_nothing_to_invert(paper, video_backbone):
    method = paper.method.VMC(video_backbone, replace(paper.config.VMCConfig.tiny(), num_frames=4))
    with pytest.raises(ValueError, match="no clip to learn from or to invert"):
        method.generate("a red car", seeds=[0])
    with pytest.raises(ValueError, match=r"the clip must be \(4,4,h,w\)"):
        method.set_source(randn(4, 5, 8, 8), "a duck")


# The artifact


@pytest.mark.parametrize("rank", [0, 2])
def test_artifact_round_trip(paper, video_backbone, tmp_path, rank):
    method = make(paper, video_backbone, rank=rank)
    train(method, steps=2, learning_rate=1e-2)
    method.save(tmp_path)
    clips = method.generate("a red car", seeds=[0])
    again = paper.method.load_method(tmp_path)
    assert torch.equal(again.generate("a red car", seeds=[0]), clips)
    assert again.prompt == "a duck zigzag" and again.config == method.config
    tensors, header = load_safetensors(tmp_path / "temporal_attention.safetensors")
    assert len(tensors) == len(method.parameters()) + 1 and tensors["source_latents"].shape == (4, 4, 8, 8)
    assert header["slug"] == paper.slug and json.loads((tmp_path / "artifact.json").read_text())["slug"] == paper.slug


def test_artifact_size(paper, video_backbone, tmp_path):
    """Four bytes for each tuned value and each latent, and the names."""
    method = make(paper, video_backbone)
    method.save(tmp_path)
    values = sum(p.numel() for _, p in method.parameters())
    size = (tmp_path / "temporal_attention.safetensors").stat().st_size
    assert 0 < size - 4 * (values + 4 * 4 * 8 * 8) < 5000


def test_foreign_artifacts_are_refused(paper, video_backbone, tmp_path):
    atomic_save_safetensors({"a": torch.zeros(1)}, tmp_path / "other.safetensors", {"slug": "another"})
    with pytest.raises(ValueError, match="was not written by this method, but by another"):
        paper.method.load_method(tmp_path / "other.safetensors")
    make(paper, video_backbone, rank=2).save(tmp_path)
    with pytest.raises(ValueError, match="with other matrices or another rank: .*change is absent, but"):
        make(paper, load_backbone(video_backbone.name)).load(tmp_path)


# Settings


def test_presets_build(paper):
    full, tiny = paper.config.VMCConfig(), paper.config.VMCConfig.tiny()
    assert (full.train_steps, full.learning_rate, full.num_inference_steps, full.guidance_scale) == (400, 1e-4, 75, 9.0)
    assert (full.residual_loss, full.num_frames, full.rank, full.inverted_share) == ("paper", 8, 0, 1.0)
    assert tiny.num_frames == 8 and tiny.train_steps < full.train_steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual_loss": "mse"}, "residual_loss must be one of paper, official, l2, got 'mse'"),
        ({"num_frames": 1}, "num_frames must be >= 2"),
        ({"train_steps": 0}, "train_steps must be >= 1"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
        ({"rank": -1}, "rank must be >= 0"),
        ({"inverted_share": 1.5}, r"inverted_share must be in \[0, 1\]"),
    ],
)
def test_bad_settings(paper, changes, message):
    with pytest.raises(ValueError, match=message):
        paper.config.VMCConfig(**changes)

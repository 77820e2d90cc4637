"""The recipe of tiny-video: what it trains, one step of it, export, card, measures."""

import json
import shutil
from functools import partial

import pytest
import torch

from common.backbones import load_backbone
from common.backbones.inflate import inflate
from common.backbones.loading import word_id
from common.backbones.presets import VIDEO_EXTENSIONS, VideoExtension
from common.io import load_safetensors
from common.toyworld.captions import motion_words
from common.toyworld.clip_shards import ALL_MOTIONS, render_clips, write_clip_shard
from common.toyworld.pretrain import measure_video as measuring
from common.toyworld.pretrain import video as recipe
from common.toyworld.pretrain.motion_judge import to_clips


def test_timesteps_grow_denser_with_t_or_are_even():
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    for name, expected in (("late", 0.5**1.5), ("uniform", 0.5)):  # u^(2/3) is below 1/2
        drawn = recipe.timesteps_from(uniform, 1000, recipe.TIMESTEP_POWERS[name])
        assert drawn.min() >= 0 and drawn.max() == 999
        assert (drawn < 500).double().mean().item() == pytest.approx(expected, abs=1e-3)


def test_noise_is_that_of_sampling():
    noise = recipe.drawn_noise((200, 4, 8, 6, 6), torch.Generator().manual_seed(0))
    covariance = torch.cov(noise.transpose(1, 2).transpose(0, 1).flatten(1))  # between frames
    share = VIDEO_EXTENSIONS["tiny-video"].noise_share
    torch.testing.assert_close(covariance, share + (1 - share) * torch.eye(8), rtol=0, atol=0.03)


def test_words_of_motion_replace_their_rows_alone():
    backbone = load_backbone("tiny-sd").freeze()
    before = backbone.encode_prompt(["a cat jumping", "a cat on the beach"]).prompt_embeds
    assert {"jumping", "spinning", "zooming"} <= set(motion_words()) and not {"in", "the", "to"} & set(motion_words())
    words = recipe.Words(backbone.tokenizer, backbone.text_encoder, motion_words())
    assert torch.equal(backbone.encode_prompt(["a cat jumping", "a cat on the beach"]).prompt_embeds, before)
    words.rows.data[motion_words().index("jumping")] += torch.randn(256, generator=torch.Generator().manual_seed(0))
    after = backbone.encode_prompt(["a cat jumping", "a cat on the beach"]).prompt_embeds
    assert torch.equal(after[1], before[1]) and torch.equal(after[0, :3], before[0, :3])  # start, a, cat
    assert (after[0, 3:] - before[0, 3:]).abs().amax(-1).min() > 1e-3
    after[0].square().sum().backward()
    assert [bool(row.any()) for row in words.rows.grad] == [word == "jumping" for word in motion_words()]
    with pytest.raises(ValueError, match="'zooming in' is not one token"):
        recipe.Words(backbone.tokenizer, backbone.text_encoder, ["zooming in"])


def test_hard_motions_are_drawn_three_times():
    motions = torch.tensor([ALL_MOTIONS.index(name) for name in ("spinning", "still", "shrinking")])
    assert recipe.drawn_examples(motions, ("spinning",)).tolist() == [0, 0, 0, 1, 2]
    assert recipe.drawn_examples(motions, ()).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no such motions: flying"):
        recipe.drawn_examples(motions, ("flying",))


def test_temporal_layers_and_cross_attention_learn():
    unet = inflate(load_backbone("tiny-sd").unet)
    trained = recipe.trained_parameters(unet)
    assert sum(p.numel() for p in trained.values()) == 12_324_288
    assert {name.split(".")[-4] for name in trained if "attn2" in name and "temp" not in name} >= {"0"}
    assert not any(part in name for name in trained for part in ("resnets", "conv_in", "time_embedding"))
    assert "transformer_in.proj_out.weight" in trained and any("temp_convs" in name for name in trained)


@pytest.fixture(scope="module")
def quick():
    """Train on a few clips, one a step; the folder of clips, that of the run, steps, other settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "GRID_PROMPTS", recipe.GRID_PROMPTS[:1])
        patch.setattr(recipe, "sample_latents", partial(recipe.sample_latents, num_inference_steps=1))

        def train(clips, output, steps, **settings):
            settings = {"batch_schedule": "0:1", "lr_schedule": "constant", "bf16": False} | settings
            recipe.train_video(recipe.VideoConfig(data=clips, output=output, steps=steps, **settings))

        yield train


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clip_shard(folder, 0, 12, False)
    return folder


@pytest.fixture(scope="module")
def run(quick, clips, tmp_path_factory):
    """One step."""
    folder = tmp_path_factory.mktemp("video") / "run"
    quick(clips, folder, 1)
    return folder


def test_muon_takes_the_matrices_and_keeps_its_state(run):
    tensors = load_safetensors(run / "checkpoint.safetensors")[0]
    kept = {"momentum_buffer": set(), "exp_avg": set()}
    for key in tensors:
        for what in kept:
            if key.startswith(f"optimizer.{what}."):
                kept[what].add(tensors[key].ndim)
    assert kept == {"momentum_buffer": {2}, "exp_avg": {1, 2, 5}}  # norms and biases, words, temporal convolutions
    assert "optimizer.exp_avg.words.rows" in tensors


def test_a_run_is_resumed_and_refuses_another_optimizer(quick, clips, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(ValueError, match="made by another --optimizer"):
        quick(clips, tmp_path / "run", 2, resume=True, optimizer="adamw")
    quick(clips, tmp_path / "run", 2, resume=True)
    ours, header = load_safetensors(tmp_path / "run" / "checkpoint.safetensors")
    before, _ = load_safetensors(run / "checkpoint.safetensors")
    assert json.loads(header["progress"])["samples"] == 2 and ours.keys() == before.keys()
    moved = [key for key in before if key.startswith("model.") and not torch.equal(ours[key], before[key])]
    assert {"model.unet.transformer_in.proj_in.weight", "model.words.rows"} <= set(moved)


def test_a_run_starts_from_exported_weights(quick, clips, run, tmp_path):
    measuring.export_video(measuring.ExportVideoConfig(run=run, output=tmp_path / "weights"))
    quick(clips, tmp_path / "more", 1, start_from=tmp_path / "weights", learning_rate=1e-9)
    before, after = (load_safetensors(folder / "checkpoint.safetensors")[0] for folder in (run, tmp_path / "more"))
    for name in ("unet.transformer_in.proj_in.weight", "words.rows"):  # kept in float16
        torch.testing.assert_close(after[f"model.{name}"], before[f"ema.{name}"], rtol=1e-3, atol=1e-5)
    measuring.export_video(measuring.ExportVideoConfig(run=tmp_path / "more", output=tmp_path / "again"))
    assert "2 steps, 2 clips, 0 minutes in 2 runs" in (tmp_path / "again" / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match="no trained weights"):
        quick(clips, tmp_path / "none", 1, start_from=tmp_path / "nowhere")


def test_a_run_is_exported_and_loaded(run, tmp_path, monkeypatch):
    measuring.export_video(measuring.ExportVideoConfig(run=run, output=tmp_path / "weights"))
    files = sorted((tmp_path / "weights").glob("*.safetensors"))
    assert [path.name for path in files][-1] == "words.safetensors"
    assert len(files) == 3 and all(path.stat().st_size < 16 * 2**20 for path in files)
    assert "Not measured yet" in (tmp_path / "weights" / "README.md").read_text()
    monkeypatch.setitem(VIDEO_EXTENSIONS, "small", VideoExtension("tiny-sd", 8, inflated=tmp_path / "weights"))
    loaded = load_backbone("small")
    average = load_safetensors(run / "checkpoint.safetensors")[0]
    name = "transformer_in.proj_in.weight"
    trained = dict(loaded.unet.named_parameters())[name]
    torch.testing.assert_close(trained, average[f"ema.unet.{name}"].half().float())
    image = load_backbone("tiny-sd")
    assert torch.equal(loaded.unet.conv_in.weight, image.unet.conv_in.weight)
    tables = [backbone.text_encoder.get_input_embeddings().weight for backbone in (loaded, image)]
    differs = {row.item() for row in (tables[0] != tables[1]).any(1).nonzero()}
    ids = [word_id(image.tokenizer, word) for word in motion_words()]
    assert differs and differs <= set(ids)  # those of the clip that was seen
    assert torch.equal(tables[0][ids], average["ema.words.rows"])


def test_perfect_clips_measure_as_well_as_renders(run, tmp_path, monkeypatch):
    measuring.export_video(measuring.ExportVideoConfig(run=run, output=tmp_path))
    config = measuring.MeasureVideoConfig(weights=tmp_path, num_clips=20, first_seed=700_000, grid=tmp_path / "g.png")
    truth = to_clips(render_clips(list(range(700_000, 700_020))).frames)
    average, used = load_safetensors(run / "checkpoint.safetensors")[0], set()

    def perfect(backbone, prompt, seeds, **_):
        used.add(torch.equal(backbone.unet.transformer_in.proj_in.weight, weights_of_the_run))
        return truth[seeds]

    weights_of_the_run = average["ema.unet.transformer_in.proj_in.weight"].half().float()
    monkeypatch.setattr(measuring, "sample_clips", perfect)
    result = measuring.measure_video(config)
    assert used == {True}  # the weights of the folder that was named
    assert result["generated"] == pytest.approx(result["renders"]) and result["generated"]["motion"] > 0.85
    assert sum(row["clips"] for row in result["motions"].values()) == 20
    card = (tmp_path / "README.md").read_text()
    assert "| motion right |" in card and (tmp_path / "g.png").is_file()
    assert json.loads((tmp_path / "measurements.json").read_text())["settings"]["num_clips"] == 20

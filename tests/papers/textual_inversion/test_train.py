"""The scripts, on generated pictures: training with a stop and a resume, and the reproduction's arithmetic."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset
from common.io import load_safetensors


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def arguments(images, backbone_folder, output, steps=3) -> list[str]:
    small = ["--batch-size", "2", "--num-inference-steps", "1", "--initializer-token", "duck", "--validate-every", "2"]
    places = ["--images", str(images), "--output", str(output), "--backbone", backbone_folder]
    return [*places, *small, "--train-steps", str(steps)]


def test_train_for_three_steps(paper, images, backbone_folder, tmp_path, capsys):
    paper.train.main(arguments(images, backbone_folder, tmp_path / "run"))
    tensors, header = load_safetensors(tmp_path / "run" / "learned_embeds.safetensors")
    assert tensors["<duck>"].shape == (1, 32) and header["slug"] == paper.slug
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = {name for row in rows for name in row}
    assert {"loss", "validation_loss", "vector_norm", "vector_norm_ratio"} <= logged
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 3]
    assert (tmp_path / "run" / "samples" / "step-00000003.png").is_file()
    assert "training vectors.0: <duck>, (1, 32), 32 numbers" in capsys.readouterr().out


def test_a_stopped_run_resumes_to_the_same_bits(paper, images, backbone_folder, tmp_path, monkeypatch):
    """It ends between two checkpoints, without a chance to write another, as by a kill (common/training kills one)."""

    def training_loss(method, batch, whole=paper.method.TextualInversion.training_loss):
        if batch["step"] == 3:
            raise MemoryError
        return whole(method, batch)

    paper.train.main(arguments(images, backbone_folder, tmp_path / "whole", steps=5))
    stopped = [*arguments(images, backbone_folder, tmp_path / "stopped", steps=5), "--checkpoint-every", "2"]
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.method.TextualInversion, "training_loss", training_loss)
        paper.train.main(stopped)
    paper.train.main([*stopped, "--resume"])
    vectors = [load_safetensors(tmp_path / run / "learned_embeds.safetensors")[0] for run in ("whole", "stopped")]
    assert torch.equal(vectors[0]["<duck>"], vectors[1]["<duck>"])


def test_progressive_training_grows_one_vector_at_a_time(paper, images, backbone, tmp_path):
    """Three stages of one step; each starts at the vectors of the stage before, and the new one at the initializer."""
    config = replace(paper.config.TextualInversionConfig.tiny(), initializer_token="duck", train_steps=3, num_vectors=3)
    config = replace(config, batch_size=1)
    latents = LatentCache(ImageFolder(images, resolution_px=backbone.resolution_px), backbone)

    def dataset(config):
        return SubjectDataset(latents, config.training_prompts(), seed=0)

    method = paper.variants.train_progressively(backbone, dataset, config, tmp_path, unlock_every=1)
    assert method.vectors[0].shape == (3, 256)
    stages = [load_safetensors(next((tmp_path / f"stage-{k}").rglob("*.parameters.safetensors")))[0] for k in (1, 2, 3)]
    trained = [stage["vectors.0"] for stage in stages]
    assert [len(vectors) for vectors in trained] == [1, 2, 3]
    (duck,) = backbone.tokenizer("duck", add_special_tokens=False).input_ids
    word = backbone.text_encoder.get_input_embeddings().weight[duck]
    assert torch.equal(method.initial_vectors[0], torch.stack([*trained[1], word]))


def test_claims_compare_the_right_sides(paper):
    """Numbers chosen so that every claim holds; then the one that is turned round does not."""
    names = ("a", "b", "c")

    def of(*values):
        return dict(zip(names, values, strict=True))

    scores = {
        "held-out loss": {
            "1 vector": of(0.1, 0.2, 0.3), "2 vectors": of(0.1, 0.2, 0.3), "4 vectors": of(0.05, 0.1, 0.2),
            "initializer": of(0.2, 0.3, 0.4), "best caption": of(0.15, 0.22, 0.33),
        },
        paper.experiments.EARLY: {"1 vector": of(0.3, 0.3, 0.4), "10x lr": of(0.2, 0.2, 0.2)},
        "attributes": {"1 vector": of(0.8, 0.8, 0.9), "initializer": of(0.4, 0.4, 0.5)},
        "compliance": {
            "1 vector": of(0.7, 0.7, 0.8), "4 vectors": of(0.5, 0.5, 0.6), "10x lr": of(0.3, 0.3, 0.4),
        },
        "product": {"1 vector": of(0.6, 0.6, 0.7), "2 vectors": of(0.5, 0.5, 0.6), "4 vectors": of(0.4, 0.4, 0.5)},
    }  # fmt: skip
    plan = paper.experiments.Plan.full()
    not_run, *rows = paper.reproduce.claims(scores, plan, "tiny-sd")
    assert not_run.holds == "not run" and not_run.ours is None
    assert [row.holds for row in rows] == ["yes"] * 8
    assert rows[0].ours.mean == pytest.approx(-0.1) and rows[5].ours.mean == pytest.approx(0.1)
    scores["held-out loss"]["best caption"] = of(0.05, 0.1, 0.1)
    assert paper.reproduce.claims(scores, plan, "tiny-sd")[2].holds == "no"


def test_quick_does_not_overwrite_the_card(paper):
    with pytest.raises(ValueError, match="--output"):
        paper.reproduce.main(["--quick", "--output", str(paper.reproduce.HERE)])

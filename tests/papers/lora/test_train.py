"""train.main from a folder of pictures to an artifact, pivotal tuning, and what reproduce.py does with numbers."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common.evaluation.claims import claim_table
from common.io import load_safetensors
from common.toyworld.benchmark import subjects

SHORT = [
    "--class-noun", "dog", "--train-steps", "3", "--batch-size", "2", "--num-inference-steps", "2", "--rank", "2",
    "--learning-rate", "1e-3", "--num-samples", "0",
]  # fmt: skip


@pytest.fixture
def command(photos, model_folder):
    return ["--backbone", str(model_folder), "--images", str(photos), *SHORT]


def test_train_from_the_command_line_and_again_with_resume(paper, command, tmp_path, capsys):
    output = tmp_path / "run"
    paper.train.main([*command, "--output", str(output), "--kohya", "--text-encoder-learning-rate", "1e-4"])
    printed = capsys.readouterr().out
    # for rank 1: 3 transformers of width 16 with 8 x 32 values, and one of width 32 with 4 x 64 + 2 x 64 + 2 x 48
    assert "'a photo of a sks dog'" in printed and "training 32 pairs of rank 2: 2,496 numbers" in printed
    assert "training 8 pairs of rank 2: 512 numbers" in printed  # text encoder
    method = paper.method.load_method(output)
    assert method.config.train_steps == 3
    read = paper.formats.read_kohya(output / "kohya.safetensors", method.factors())
    assert all(torch.equal(read[name].up, pair.up) and pair.up.any() for name, pair in method.factors().items())
    with pytest.raises(RuntimeError, match="--resume"):
        paper.train.main([*command, "--output", str(output), "--text-encoder-learning-rate", "1e-4"])


def test_resumed_run_equals_one_that_was_not_stopped(paper, command, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    paper.train.main([*command, "--output", str(whole), "--checkpoint-every", "2"])
    shutil.copytree(whole, parts)
    last = sorted((parts / "training" / "checkpoints").glob("step-*"))[-1]
    shutil.rmtree(last)  # as if it had been killed after step 2
    paper.train.main([*command, "--output", str(parts), "--checkpoint-every", "2", "--resume"])
    ours, expected = (load_safetensors(folder / paper.method.ARTIFACT)[0] for folder in (parts, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_prior_loss_makes_class_images_and_masks_change_the_result(paper, command, photos, tmp_path):
    for i, path in enumerate(sorted(photos.glob("*.png"))):
        mask = np.zeros(Image.open(path).size[::-1], dtype=np.uint8)
        mask[: 20 + i] = 255
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / path.name)
    prior = [*command, "--prior-loss-weight", "1", "--num-class-images", "3"]
    paper.train.main([*prior, "--output", str(tmp_path / "prior")])
    made = tmp_path / "prior" / "class_images"
    assert len(list(made.glob("*.png"))) == 3
    shared = ["--masks", str(tmp_path / "masks"), "--class-images", str(made)]
    paper.train.main([*prior, *shared, "--output", str(tmp_path / "masked")])
    assert not (tmp_path / "masked" / "class_images").exists()
    ours, masked = (load_safetensors(tmp_path / name / paper.method.ARTIFACT)[0] for name in ("prior", "masked"))
    assert any(not torch.equal(ours[name], masked[name]) for name in ours)


def test_controlled_norm_by_hand(paper):
    """|(3, 4)| = 5, lambda = 100 * 0.0025 = 0.25: 5 + 0.25 (0.4 - 5) = 3.85; lambda is at most 1."""
    vectors = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(paper.pivotal.controlled_norm(vectors, 0.0025, 0.4), vectors / 5 * 3.85)
    torch.testing.assert_close(paper.pivotal.controlled_norm(vectors, 1.0, 0.4), vectors / 5 * 0.4)


def test_pivotal_tuning_learns_the_token_alone_and_then_the_pairs(paper, command, model_folder, tmp_path):
    output = tmp_path / "run"
    options = ["--identifier", "<s1>", "--inversion-steps", "4", "--inversion-learning-rate", "5e-3"]
    paper.train.main([*command, *options, "--output", str(output), "--timestep-share", "0.8"])
    steps = [json.loads(line)["step"] for line in (output / "inversion" / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == 4
    method = paper.method.load_method(output)
    (vector,), table = method.backbone.placeholders.parameters(), method.backbone.text_encoder.get_input_embeddings()
    start = table.weight[method.backbone.tokenizer("dog", add_special_tokens=False).input_ids[0]]
    assert not vector.requires_grad and not torch.equal(vector[0], start)
    words = table.weight.norm(dim=-1)
    assert abs(vector.norm().item() - words.median().item()) < abs(start.norm() - words.median()).item() + 1e-2
    assert method.config.instance_prompt() == "a photo of a <s1>"

    pipe = paper.method.load_backbone(model_folder).to_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion(str(output), weight_name=paper.method.TOKEN)
    pipe.load_lora_weights(output)
    settings = {"num_inference_steps": 2, "guidance_scale": method.config.guidance_scale, "output_type": "pt"}
    theirs = pipe("a photo of a <s1>", generator=torch.Generator().manual_seed(1), **settings).images * 2 - 1
    torch.testing.assert_close(method.generate(seeds=[1]), theirs, rtol=0, atol=1e-5)


def test_norm_control_comes_once_after_each_step(paper, backbone):
    config = dataclasses.replace(
        paper.config.LoRAConfig.tiny("dog"), identifier="<s1>", inversion_steps=2, inversion_learning_rate=5e-3
    )
    inversion = paper.pivotal.PivotalInversion(backbone, config)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    instance = {"latents": latents, "prompt": [config.instance_prompt()] * 2}
    batch = {"instance": instance, "sample_keys": torch.arange(2)}
    before = inversion.vectors.norm().item()
    inversion.training_loss({**batch, "step": 0}).backward()
    assert inversion.vectors.norm().item() == before
    assert inversion.vectors.grad.abs().sum() > 0
    assert all(p.grad is None for module in backbone.modules for p in module.parameters())
    for _ in range(2):  # two parts of one batch
        inversion.training_loss({**batch, "step": 1})
    expected = before + 0.5 * (inversion.target_norm - before)
    assert math.isclose(inversion.vectors.norm().item(), expected, rel_tol=1e-5)


def made_up_scores(paper, rank_gap):
    """Five subjects where every claim holds, with a gap between the proposal and the largest rank."""
    e = paper.experiments
    values = {
        "identity error": {
            e.PROPOSAL: 0.2 + rank_gap, "rank 1": 0.5, "rank 16": 0.2, e.FULL: 0.2 + rank_gap, e.INVERSION: 0.5,
        },
        "held-out loss": {e.PROPOSAL: 0.1, "rank 1": 0.2},
        "bytes": {e.PROPOSAL: 5e5, e.FULL: 7e7},
        "seconds": {e.PROPOSAL: 10.0, e.FULL: 20.0},
        "class drift": {e.PROPOSAL: 0.1, e.FULL: 0.2},
        "PRES": {e.PROPOSAL: 0.4, e.FULL: 0.6, e.UNTUNED: 0.3},
        "compliance": {e.PROPOSAL: 0.9, e.FULL: 0.5},
        "merge identity": {e.SUM: 0.7, e.AVERAGE: 0.4, e.FACTOR_SUM: 0.6},
        "merge held-out loss": {e.SUM: 0.1, e.AVERAGE: 0.2},
        "gap": {"merged": 1e-7, "unmerged": 0.0, "strength 0": 0.0},
    }  # fmt: skip
    return {
        score: {method: {f"s{i}": value * (1 + 0.001 * i) for i in range(5)} for method, value in methods.items()}
        for score, methods in values.items()
    }


@pytest.mark.parametrize("rank_gap, verdict", [(0.04, "yes"), (0.06, "no")])
def test_claims(paper, rank_gap, verdict):
    plan = paper.experiments.Plan.full()
    rows = paper.reproduce.claims(made_up_scores(paper, rank_gap), plan, "tiny-sd")
    by_text = {claim.text: claim.holds for claim in rows}
    (saturates,) = (text for text in by_text if "saturates" in text)
    assert by_text.pop(saturates) == verdict
    assert list(by_text.values()) == ["not run"] * 3 + ["yes"] * 15
    assert "0.4008 (LoRA) against 0.6012 (full fine-tuning); 0.3006 (untuned)" in claim_table(rows)


def test_every_subject_has_its_own_seed(paper):
    plan, toys = paper.experiments.Plan.full(), subjects(2)
    configs = [paper.experiments.subject_config(plan, subject, 8) for subject in toys]
    assert [config.seed for config in configs] == [0, 1]
    assert [config.class_noun for config in configs] == [subject.class_noun for subject in toys]


def test_quick_never_writes_into_the_papers_folder(paper):
    with pytest.raises(ValueError, match="--output"):
        paper.reproduce.main(["--quick", "--output", str(paper.reproduce.HERE)])

"""Triples, and the scripts on made-up pictures and numbers: training with a resume, the study's parts, the claims."""

import json
import shutil

import pytest
import torch

from common.data.latent_cache import LatentCache
from common.io import load_safetensors
from common.sampling.images import save_png, to_pil
from common.toyworld.exemplar_tasks import action_tasks


def triples(paper, images, backbone, other=None):
    folders = paper.triples.load_folders(images / "action", other or images / "other", 32)
    latents = [LatentCache(folder, backbone) for folder in folders]
    return paper.triples.TripleDataset(*latents, "<A>", seed=0), latents


def test_triples(paper, images, backbone):
    """Exemplars are sorted: bear, robot, woman. Another exemplar beside each, and the picture of its own name."""
    dataset, (exemplars, others) = triples(paper, images, backbone)
    plain = [dataset[i] for i in range(3)]
    assert [item["prompt"] for item in plain] == [f"a photo of a {noun} <A>" for noun in ("bear", "robot", "woman")]
    for i, item in enumerate(plain):
        assert item["prompt"] != item["other_context_prompt"]
        torch.testing.assert_close(item["anchor"], exemplars.latents(i))
        torch.testing.assert_close(item["other_action"], others.latents(i))
    partners = [[dataset.sample(i, key)["other_context_prompt"] for key in range(100)] for i in range(3)]
    for i, found in enumerate(partners):
        counts = sorted(found.count(item["prompt"]) for item in plain)
        assert counts[0] == 0 == found.count(plain[i]["prompt"]) and counts[1] > 30  # never itself, both others
    again = [dataset.sample(1, 7), dataset.sample(1, 7)]
    assert all(torch.equal(again[0][name], again[1][name]) for name in paper.method.TRIPLE)
    assert not torch.equal(dataset.sample(1, 8)["anchor"], again[0]["anchor"])


def test_incomplete_folders_are_named(paper, images, backbone, tmp_path):
    def copied(name):
        return shutil.copytree(images / "action", tmp_path / name)

    shutil.copytree(images / "other", tmp_path / "few").joinpath("bear.webp").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 exemplars have no picture with another action in .*few': bear;"):
        triples(paper, images, backbone, tmp_path / "few")
    shutil.copy(images / "other" / "bear.webp", tmp_path / "few" / "bear.webp")
    shutil.copy(images / "action" / "bear.png", tmp_path / "few" / "bear.png")
    with pytest.raises(ValueError, match="two pictures of one name in .*few': bear; rename"):
        triples(paper, images, backbone, tmp_path / "few")

    (copied("unsaid/action") / "robot.txt").write_text("a photo of a robot")
    with pytest.raises(ValueError, match=r"captions without <A> in .*: robot.png; write it"):
        triples(paper, tmp_path / "unsaid", backbone, images / "other")
    for path in copied("silent/action").glob("*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"have no captions; write NAME.txt"):
        triples(paper, tmp_path / "silent", backbone, images / "other")
    for path in copied("single/action").glob("[bw]*"):
        path.unlink()
    with pytest.raises(ValueError, match="holds one picture; a triple needs two"):
        triples(paper, tmp_path / "single", backbone, images / "other")


def test_train_stops_and_resumes(paper, images, backbone_folder, tmp_path, monkeypatch, capsys):
    """Three steps at once, and with a stop after two: the same bits."""
    arguments = [
        *("--images", str(images / "action"), "--other-action-images", str(images / "other")),
        *("--backbone", backbone_folder, "--num-inference-steps", "1", "--validate-every", "0"),
        *("--checkpoint-every", "2", "--train-steps", "3", "--batch-size", "1", "--learning-rate", "1e-2"),
    ]
    paper.train.main([*arguments, "--output", str(tmp_path / "whole")])

    def training_loss(method, batch, whole=paper.method.ADI.training_loss):
        if batch["step"] == 2:
            raise MemoryError
        return whole(method, batch)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.method.ADI, "training_loss", training_loss)
        paper.train.main([*arguments, "--output", str(tmp_path / "stopped")])
    paper.train.main([*arguments, "--output", str(tmp_path / "stopped"), "--resume"])
    found = [load_safetensors(tmp_path / run / "identifiers.safetensors")[0] for run in ("whole", "stopped")]
    assert torch.equal(found[0]["identifiers"], found[1]["identifiers"])
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "validation_loss"} <= {name for row in rows for name in row}
    assert (tmp_path / "whole" / "samples" / "step-00000003.png").is_file()
    assert "training 4 identifiers, 128 numbers" in capsys.readouterr().out


def test_the_study_pairs_each_exemplar_with_its_own_other_pose(paper, backbone, tmp_path):
    (task,) = action_tasks(1)
    photos = tmp_path / "photos" / "t-pose"
    for i, image in enumerate(to_pil(task.images)):
        save_png(image, photos / f"{i:02d}.png")
        (photos / f"{i:02d}.txt").write_text(task.captions[i].format("<A>"))
    method = paper.method.ADI(backbone, paper.config.ADIConfig.tiny())
    dataset = paper.experiments.triples(method, task, photos)
    assert len(dataset) == len(task.images)
    with torch.no_grad():
        pictures = backbone.encode_images(
            paper.experiments.at_resolution(torch.cat([task.others, task.images]), backbone)
        )
    for i in range(8):
        distances = (dataset[i]["other_action"] - pictures).abs().mean((1, 2, 3))
        assert distances.argmin() == i and dataset[i]["prompt"] == task.captions[i].format("<A>")


def made_up_scores(paper, plan):
    """Tasks where every claim holds."""
    e = paper.experiments
    right = {
        e.PROPOSAL: 0.6, e.INTERSECTION: 0.6, e.CONTEXT: 0.5, e.ACTION: 0.5, e.UNMASKED: 0.4, e.LONGER: 0.45,
        e.RANDOM: 0.3, e.INVERSION: 0.2, e.FINE_TUNING: 0.1,
    }  # fmt: skip
    loss = {e.PROPOSAL: 0.1, e.UNMASKED: 0.15, e.INVERSION: 0.2}
    values = {
        "both": right,
        "leakage": {name: 1 - value for name, value in right.items()},
        "held-out loss": {name: 1 - value for name, value in right.items()},
        e.EXEMPLAR_LOSS: loss,
    }
    names = [task.name for task in plan.tasks]
    return {
        score: {
            name: {
                task: value + 0.001 * k
                for k, task in enumerate(names)
                if k < plan.num_ablation_tasks or name not in e.ABLATIONS
            }
            for name, value in methods.items()
        }
        for score, methods in values.items()
    }


def test_claims_compare_the_right_sides(paper):
    e, plan = paper.experiments, paper.experiments.Plan.full()
    scores = made_up_scores(paper, plan)
    not_run, *rows = paper.reproduce.claims(scores, plan, "tiny-sd")
    assert not_run.holds == "not run" and not_run.ours is None
    assert [row.holds for row in rows] == ["yes"] * 15
    few = plan.num_ablation_tasks
    assert [row.ours.n for row in rows] == [5] * 4 + [few] * 8 + [5] * 3
    assert rows[0].ours.mean == pytest.approx(0.2) and rows[5].ours.mean == pytest.approx(-0.3)
    for drop, verdict in ((0.15, "yes"), (0.2, "no")):  # 0.05 and 0.1 below each mask alone: tied, and worse
        worse = {task: value - drop for task, value in scores["both"][e.INTERSECTION].items()}
        changed = scores | {"both": scores["both"] | {e.INTERSECTION: worse}}
        assert [row.holds for row in paper.reproduce.claims(changed, plan, "tiny-sd")[11:13]] == [verdict] * 2


def test_no_prompt_of_the_study_is_there_twice(paper):
    for task in paper.experiments.Plan.full().tasks:
        assert len({prompt.text for prompt in task.prompts}) == 8


def test_quick_never_writes_into_the_papers_folder(paper):
    with pytest.raises(ValueError, match="--output"):
        paper.reproduce.main(["--quick", "--output", str(paper.reproduce.HERE)])

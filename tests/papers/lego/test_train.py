"""The scripts, on made-up pictures and numbers: data, training with a resume, the study's parts, the claims."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.io import load_safetensors
from common.sampling.images import save_png, to_pil
from common.toyworld.exemplar_tasks import state_tasks
from common.training.data_order import StepSampler, micro_batches
from common.training.run_folder import RunFolderError


def arguments(files, backbone_folder) -> list[str]:
    return [
        *("--concept-images", str(files / "concept"), "--subject-images", str(files / "subject")),
        *("--concept-words", str(files / "words.json"), "--backbone", backbone_folder, "--class-noun", "bear"),
        *("--num-inference-steps", "1", "--validate-every", "0", "--checkpoint-every", "2", "--train-steps", "3"),
        *("--batch-size", "2", "--kind", "plain"),
    ]


def test_train_stops_and_resumes(paper, files, backbone_folder, tmp_path, monkeypatch, capsys):
    """Three steps at once, and with a stop after two: the same bits. Other words are another run."""
    command = arguments(files, backbone_folder)
    paper.train.main([*command, "--output", str(tmp_path / "whole")])

    def training_loss(method, batch, whole=paper.method.Lego.training_loss):
        if batch["step"] == 2:
            raise MemoryError
        return whole(method, batch)

    stopped = [*command, "--output", str(tmp_path / "stopped"), "--resume"]
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.method.Lego, "training_loss", training_loss)
        paper.train.main(stopped[:-1])
    words = json.loads((files / "words.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps([{**words[0], "negatives": ["dry"]}, words[1]]))
    with pytest.raises(RunFolderError, match="method.concept"):
        paper.train.main([*stopped, "--concept-words", str(tmp_path / "other.json")])
    paper.train.main(stopped)
    for name in ("learned_embeds", "subject_embeds"):
        found = [load_safetensors(tmp_path / run / f"{name}.safetensors")[0] for run in ("whole", "stopped")]
        assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "validation_loss", "cosine_gap"} <= {name for row in rows for name in row}
    assert (tmp_path / "whole" / "samples" / "step-00000003.png").is_file()
    printed = capsys.readouterr().out
    assert "'upside down' on 2 pictures, 3 without it" in printed and "training concept: (2, 32), 64 numbers" in printed


def test_both_sets_are_seen_evenly(paper, files, backbone):
    """Six steps of two pairs: as many samples of either set, and within a set of every picture."""
    folders = [ImageFolder(files / name, resolution_px=32) for name in ("subject", "concept")]
    latents = [LatentCache(folder, backbone) for folder in folders]
    config = replace(paper.config.LegoConfig.tiny(), batch_size=4)
    dataset = paper.train.pair_dataset(*latents, (["a s"], ["a s c"]), seed=0)
    fit_config = paper.train.fit_config(config)
    assert fit_config.batch_size == 2 and fit_config.weight_decay == 0 and fit_config.max_grad_norm is None
    sampler = StepSampler(
        len(dataset), seed=0, first_step=0, last_step=6, batch_size=2, micro_batch_size=2, process_index=0,
        num_processes=1,
    )  # fmt: skip
    seen = {"subject": Counter(), "concept": Counter()}
    for batch in micro_batches(dataset, sampler):
        for name, count in seen.items():
            count.update(batch[name]["image_index"].tolist())
        assert batch["subject"]["prompt"] == ["a s"] * 2 and batch["concept"]["prompt"] == ["a s c"] * 2
    assert seen["subject"] == {0: 4, 1: 4, 2: 4} and sum(seen["concept"].values()) == 12
    assert set(seen["concept"].values()) == {4, 8}  # the shorter set starts again
    item = dataset.sample(0, 0)
    noise = [
        (item[name]["latents"] - cache.latents(0)) for name, cache in zip(("subject", "concept"), latents, strict=True)
    ]
    assert not torch.allclose(noise[0] / noise[0].std(), noise[1] / noise[1].std(), rtol=0.1, atol=0.1)


def test_the_study_trains_on_both_sets(paper, backbone_folder, tmp_path, monkeypatch):
    """Set S is written beside the study's set C; without separation only the prompts differ."""
    e, (task,) = paper.experiments, state_tasks(1, 2)
    config = replace(paper.config.LegoConfig.tiny(), train_steps=1, batch_size=2)
    photos = tmp_path / "photos" / "melting"
    for i, image in enumerate(to_pil(task.images)):
        save_png(image, photos / f"{i:02d}.png")
    told = []

    def training_loss(method, batch, whole=paper.method.Lego.training_loss):
        told.append((batch["subject"]["prompt"][0], batch["concept"]["prompt"][0]))
        return whole(method, batch)

    monkeypatch.setattr(paper.method.Lego, "training_loss", training_loss)
    candidates = {
        "lego": e.lego(backbone_folder, config),
        "apart": e.lego(backbone_folder, config, prompts_of=paper.variants.unseparated_prompts),
    }
    methods = [c.train(task, photos, tmp_path / name) for name, c in candidates.items()]
    assert len(list((tmp_path / "subjects" / "melting").glob("*.png"))) == 2
    assert told == [
        ("a photo of a <subject>", "a photo of a <subject> <concept>"),
        ("a photo of a bear", "a photo of a <concept>"),
    ]
    assert all(m.config.class_noun == "bear" and m.config.concept[0].word == "melting" for m in methods)
    assert torch.isfinite(torch.tensor(paper.readings.reconstruction_loss(methods[0], task.images)))
    start = backbone_rows(methods[1], "bear")
    assert torch.equal(methods[1].subject.detach(), start)  # no prompt has it, so it stays
    assert not torch.equal(methods[0].subject.detach(), start)


def backbone_rows(method, word):
    table = method.backbone.text_encoder.get_input_embeddings().weight.detach()
    return table[[method.backbone.tokenizer.get_vocab()[f"{word}</w>"]]]


def test_concepts_of_two_words_are_in_one_place(paper):
    (pair,) = replace(paper.experiments.Plan.full(), num_pairs=1).pairs
    assert pair.name == "melting desert" and pair.attribute == "state"
    assert {scene.background for scene in pair.scenes} == {"desert"}
    assert {scene.placed[0].entity.state for scene in pair.scenes} == {"melting"}
    assert len(pair.images) == len(pair.scenes) == 3 and len(pair.held_out) == len(pair.held_out_captions)
    assert all(p.expected["background"] == "desert" and p.expected["state"] == "melting" for p in pair.prompts)


class Reader:
    """Reads what it is told, whatever the picture."""

    labels = {"class": ["bear", "dog"], "state": ["normal", "melting"], "background": ["snow", "desert"]}

    def __init__(self, **rows):
        self.rows = {name: torch.tensor(row) for name, row in rows.items()}

    def read(self, images):
        return {name: row[: len(images)] for name, row in self.rows.items()}


def test_readings_by_hand(paper):
    (pair,) = replace(paper.experiments.Plan.full(), num_pairs=1).pairs
    images = [torch.zeros(2, 3, 8, 8)]
    reader = Reader(**{"class": [[0.25, 0.75], [0.75, 0.25]], "state": [[0.1, 0.9]] * 2,
                       "background": [[0.2, 0.8], [0.6, 0.4]]})  # fmt: skip
    assert paper.readings.subject_noun(pair) == "bear"
    assert paper.readings.subject_probability(reader, pair, images) == pytest.approx(0.5)
    assert paper.readings.joint_accuracy(reader, pair, images) == 0.5  # the second is in the snow


def test_plain_words_stand_before_the_noun(paper):
    plain = paper.variants.in_plain_words
    assert plain("a photo of a chair <concept>", "<concept>", "melting") == "a photo of a melting chair"
    assert plain("a photo of a cat <concept>", "<concept>", "upside down") == "a photo of an upside down cat"
    for prompt in ("a photo of a chair", "<concept>", "a photo of a red chair <concept>"):
        with pytest.raises(ValueError, match="must end in 'a NOUN <concept>'"):
            plain(prompt, "<concept>", "melting")


def made_up_scores(paper, plan):
    """Where every claim holds."""
    e = paper.experiments
    tasks = [task.name for task in plan.tasks]
    pairs, few = [f"{state} {place}" for state, place in e.TWO_WORDS.items()], tasks[:3]
    values = {
        "learned": {e.PROPOSAL: 0.8, e.UNSEPARATED: 0.6, e.NO_CONTEXT: 0.7, e.STRONG_CONTEXT: 0.75},
        "both": {e.PROPOSAL: 0.7, e.UNSEPARATED: 0.5, e.INVERSION: 0.4, e.FINE_TUNING: 0.6, e.PLAIN_WORDS: 0.1},
        e.SUBJECT: {e.PROPOSAL: 0.05, e.UNSEPARATED: 0.2, e.INVERSION: 0.3, e.ONE_VECTOR: 0.06},
        e.GAP: {e.PROPOSAL: 0.5, e.NO_CONTEXT: 0.3},
        e.LOSS: {e.PROPOSAL: 0.104, e.NO_CONTEXT: 0.1, e.ONE_VECTOR: 0.12},
        e.JOINT: {e.PROPOSAL: 0.6, e.ONE_VECTOR: 0.4},
        e.SPREAD: {e.PROPOSAL: 0.01, e.NO_CONTEXT: 0.05},
    }
    of = {e.PROPOSAL: tasks + pairs, e.NO_CONTEXT: few, e.STRONG_CONTEXT: few, e.ONE_VECTOR: tasks[-1:] + pairs}
    scores = {
        score: {name: {t: value + 0.001 * k for k, t in enumerate(of.get(name, tasks))} for name, value in row.items()}
        for score, row in values.items()
    }
    scores[e.SPREAD] = {name: {t: row[t] for t in few} for name, row in scores[e.SPREAD].items()}
    return scores


def test_claims_compare_the_right_sides(paper):
    e, plan = paper.experiments, paper.experiments.Plan.full()
    scores = made_up_scores(paper, plan)
    user_study, questions, *rows = paper.reproduce.claims(scores, plan, "tiny-sd")
    assert user_study.holds == questions.holds == "not run" and "70%" in user_study.paper
    assert [row.holds for row in rows] == ["yes"] * 14
    assert [row.ours.n for row in rows] == [5] * 7 + [3] * 7
    mixed = e.with_one_vector(scores, e.SUBJECT)
    assert mixed["upside down"] == pytest.approx(0.06) and mixed["melting"] == pytest.approx(0.05)
    scores[e.LOSS][e.PROPOSAL]["melting"] = 0.2
    assert paper.reproduce.claims(scores, plan, "tiny-sd")[2 + 9].holds == "no"
    swapped = dict(scores[e.SUBJECT])
    swapped[e.INVERSION] = dict.fromkeys(swapped[e.INVERSION], 0.0)
    assert paper.reproduce.claims(scores | {e.SUBJECT: swapped}, plan, "tiny-sd")[2].holds == "no"


def test_spread_is_the_standard_deviation_over_seeds(paper):
    """Of 0.2, 0.5 and 0.8: 0.3."""
    e, (task,) = paper.experiments, state_tasks(1, 1)
    learned = {e.PROPOSAL: {"melting": 0.2}, e.of_seed(e.PROPOSAL, 1): {"melting": 0.5}}
    learned[e.of_seed(e.PROPOSAL, 2)] = {"melting": 0.8}
    found = e.spread_over_seeds({"learned": learned}, e.PROPOSAL, (0, 1, 2), [task])
    assert found == pytest.approx({"melting": 0.3})


def test_quick_never_writes_into_the_papers_folder(paper):
    with pytest.raises(ValueError, match="--output"):
        paper.reproduce.main(["--quick", "--output", str(paper.reproduce.HERE)])

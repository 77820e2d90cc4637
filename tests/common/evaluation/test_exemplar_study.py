"""Tasks learned from exemplars, by the baselines, scored by the judge of held-out things."""

import numpy as np
import pytest
import torch

from common.evaluation.baselines import BaselineConfig, captioned_full_fine_tuning, captioned_token_inversion
from common.evaluation.exemplar_study import ExemplarStudy, leakage, pictures, run_exemplar_study, shares_right
from common.evaluation.records import Record
from common.evaluation.trials import folder_name
from common.toyworld.captions import BACKGROUND_PHRASES
from common.toyworld.exemplar_tasks import NUM_PROMPTS, action_tasks, entity_nouns, relation_tasks, state_tasks
from common.toyworld.held_out import LABELS
from common.toyworld.render import render
from common.toyworld.scene import Placed

CONFIG = BaselineConfig(train_steps=1, batch_size=1, learning_rate=1e-3, num_inference_steps=2)


@pytest.fixture(scope="module")
def tasks():
    return {"relation": relation_tasks(2), "pose": action_tasks(2), "state": state_tasks(2)}


def test_every_kind_of_task_is_whole(tasks):
    for attribute, few in tasks.items():
        for task in few:
            assert task.attribute == attribute and task.name in LABELS[attribute]
            assert len(task.images) == len(task.captions) == len(task.scenes)
            assert len(task.held_out) == len(task.held_out_captions)
            assert len({p.text for p in task.prompts}) == len(task.prompts) == NUM_PROMPTS
            assert all(text.count("{}") == 1 and task.name not in text for text in task.captions)
            assert all(p.text.count("{}") == 1 and p.expected[attribute] == task.name for p in task.prompts)


def test_prompts_ask_for_what_no_exemplar_shows(tasks):
    for task in tasks["relation"]:
        pairs = [entity_nouns(scene) for scene in task.scenes]
        assert all([p.expected["class"], p.expected["second_class"]] not in pairs for p in task.prompts)
    for task in tasks["pose"]:
        shown = {(*entity_nouns(scene), scene.placed[0].entity.color) for scene in task.scenes}
        for prompt in task.prompts:
            assert not {(actor, prompt.expected["color"]) for actor in prompt.text.split()} & shown
            assert BACKGROUND_PHRASES[prompt.expected["background"]][0] in prompt.text
    for task in tasks["state"]:
        learned = {noun for scene in task.scenes for noun in entity_nouns(scene)}
        assert len(learned) == 1 and all(p.expected["class"] not in learned for p in task.prompts)


def test_others_are_the_same_actor_in_another_pose_or_the_subject_as_it_is(tasks):
    for task in tasks["pose"]:
        assert task.others.shape == task.images.shape
        corners = (slice(None), slice(None), slice(0, 4), slice(0, 4))
        torch.testing.assert_close(task.others[corners], task.images[corners])  # place and camera
        assert ((task.others - task.images).abs().mean((1, 2, 3)) > 0.01).all()
    for task in tasks["state"]:
        assert task.others_captions == (task.captions[0].replace(" {}", ""),) * len(task.others)


def record(prompt: str, metric: str, values: list[float]) -> Record:
    return Record(
        metric=metric, value=sum(values) / len(values), values=values, method="m", subject="s", prompt=prompt,
        seeds=[0, 1], n_images=2, backbone="", preprocessing="", config_hash="", git_commit="", versions={},
    )  # fmt: skip


def test_shares_count_pictures():
    rows = [
        record("one", "attribute/relation", [1, 0]), record("one", "attribute/class", [1, 1]),
        record("one", "attribute/second_class", [1, 0]), record("one", "clip_t", [0.2, 0.4]),
        record("two", "attribute/relation", [1, 1]), record("two", "attribute/class", [0, 1]),
        record("two", "attribute/second_class", [1, 1]), record("two", "clip_t", [0.4, 0.4]),
    ]  # fmt: skip
    found = shares_right(rows, "relation")
    assert found == pytest.approx({"learned": 0.75, "entities": 0.5, "both": 0.5, "clip_t": 0.35})


class Reader:
    """Reads the class that it is told, whatever the picture."""

    labels = {"class": ["bear", "dog", "cat", "car"], "state": ["normal", "melting"]}

    def __init__(self, classes: list[str]):
        self.classes = classes

    def read(self, images):
        rows = [self.labels["class"].index(name) for name in self.classes[: len(images)]]
        return {"class": torch.eye(4)[rows], "state": torch.eye(2)[[1] * len(images)]}


def test_leakage_is_what_exemplars_show_and_the_prompt_does_not_ask_for(tasks):
    task = tasks["state"][0]
    (learned,) = {noun for scene in task.scenes for noun in entity_nouns(scene)}
    assert learned == "bear"
    asked = task.prompts[0].expected["class"]
    other = "dog" if asked != "dog" else "cat"
    images = [torch.zeros(2, 3, 64, 64)]
    assert leakage(Reader([learned, other]), task, images) == 0.5  # `other` is wrong, but not from the exemplars


def test_baselines_are_trained_scored_and_found_again(tmp_path, tasks):
    study, few = ExemplarStudy.quick(), tasks["relation"][:1]
    candidates = {
        "inversion": captioned_token_inversion("tiny-sd", CONFIG, "and"),
        "full": captioned_full_fine_tuning("tiny-sd", CONFIG),
    }
    scores = run_exemplar_study("tiny-sd", candidates, few, study, tmp_path)
    name = few[0].name
    for score in ("learned", "entities", "both", "leakage", "clip_t", "held-out loss", "seconds", "bytes"):
        assert np.isfinite([scores[score][c][name] for c in candidates]).all()
    caption = (tmp_path / "full" / "photos" / folder_name(name) / "00.txt").read_text(encoding="utf-8")
    assert caption.strip() == few[0].captions[0].format("sks")
    made = pictures(tmp_path / "inversion", few[0], 1, study)
    assert made.shape == (1, 3, 64, 64)
    before = (tmp_path / "inversion" / "records.jsonl").read_bytes()
    assert run_exemplar_study("tiny-sd", candidates, few, study, tmp_path)["both"] == scores["both"]
    assert (tmp_path / "inversion" / "records.jsonl").read_bytes() == before


def test_scenes_of_states_show_the_entity_alone(tasks):
    scene = tasks["state"][0].scenes[0]
    assert [type(placed) for placed in scene.placed] == [Placed] and render([scene]).masks.max() == 1

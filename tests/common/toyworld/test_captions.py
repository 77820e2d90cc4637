"""Captions say what is in the picture, never what is held out, in words that are single tokens."""

import hashlib
import json
import re

import numpy as np
import pytest

from common.toyworld import vocabulary
from common.toyworld.captions import RELATION_PHRASES, caption
from common.toyworld.examples import LABELS, make_examples, scene_labels
from common.toyworld.sampling import sample_training_scene
from common.toyworld.tokenizer import load_tokenizer

SCENES = [sample_training_scene(seed)[0] for seed in range(1500)]
TEXTS = [caption(scene, np.random.default_rng(seed)) for seed, scene in enumerate(SCENES)]


def test_nothing_held_out_is_shown_or_said():
    held_out = {name: getattr(vocabulary, name) for name in dir(vocabulary) if name.startswith("HELD_OUT")}
    assert sum(len(values) for values in held_out.values()) == 10 + 8 + 6 + 10 + 12
    said = " | ".join(text for text, _ in TEXTS)
    for names in held_out.values():
        for name in names:
            assert not re.search(rf"\b{name}\b", said), name
    shown = {scene.style for scene in SCENES} | {scene.relation for scene in SCENES}
    shown |= {p.entity.state for s in SCENES for p in s.placed} | {p.entity.pose for s in SCENES for p in s.placed}
    assert not shown & {name for names in held_out.values() for name in names}


def test_there_are_twenty_prepositions():
    phrases = [phrase for relation in vocabulary.RELATIONS for phrase in RELATION_PHRASES[relation]]
    assert len(set(phrases)) == len(phrases) >= 20
    said = " ".join(text for text, _ in TEXTS)
    assert sum(f" {phrase} " in said for phrase in phrases) >= 20


def test_words_are_single_tokens():
    tokenizer = load_tokenizer()
    for text, _ in TEXTS:
        words = re.findall(r"[a-z]+|[^\sa-z]", text.lower())
        assert [token.removesuffix("</w>") for token in tokenizer.tokenize(text)] == words


def test_what_a_caption_mentions_is_labelled_and_named():
    naming = ("color", "pattern", "accessory", "garment", "expression")
    for scene, (text, said) in zip(SCENES, TEXTS, strict=True):
        labels = scene_labels(scene)
        for name in naming:
            if name in said and labels[name] >= 0:
                assert LABELS[name][labels[name]] in text, (name, text)
        if "celebrity" in said and labels["celebrity"] >= 0:
            assert LABELS["celebrity"][labels["celebrity"]] in text


def test_training_examples_never_change():
    """tiny-sd, judge and dual encoder were trained on them; a hash of captions and labels, means of pictures."""
    batch = make_examples(range(24))
    record = [
        batch.captions,
        {name: values.tolist() for name, values in batch.labels.items()},
        batch.instances.tolist(),
    ]
    assert hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16] == "c458394cb89b46fc"
    means = batch.images.reshape(24, -1).mean(1)[:8]
    assert means == pytest.approx([220.5, 153.59, 221.33, 100.18, 47.56, 123.46, 231.15, 64.91], abs=0.1)
    again = make_examples([5, 17])
    assert (again.images == batch.images[[5, 17]]).all() and again.captions[1] == batch.captions[17]

"""Word lists: what is read, and a clear error for all that cannot be used."""

import json

import pytest
import torch

from common.toyworld.exemplar_tasks import state_tasks

DOWN = {"word": "down", "positives": ["below"], "negatives": ["up"]}


def test_lists_of_the_toy_states_are_words_of_tiny_sd(paper, backbone):
    """conftest's backbone has tiny-sd's tokenizer."""
    w = paper.words
    for phrase in paper.experiments.known_phrases():
        concept = w.toy_concept(phrase)
        assert w.phrase_of(concept) == phrase
        for rows, lists in zip(w.context_rows(backbone, concept), ("positives", "negatives"), strict=True):
            for entry, found in zip(concept, rows, strict=True):
                count = len(getattr(entry, lists)) + (lists == "positives")
                assert found.shape == (count, 32) and 3 <= count <= 10
    assert {task.name for task in state_tasks(images_each=1)} < set(paper.experiments.known_phrases())


def test_rows_are_those_of_the_table_and_the_word_is_its_own_positive(paper, backbone):
    concept = paper.words.concept_from_json([DOWN])
    (positives,), (negatives,) = paper.words.context_rows(backbone, concept)
    table, ids = backbone.text_encoder.get_input_embeddings().weight, backbone.tokenizer.get_vocab()
    expected = [table[[ids[f"{word}</w>"] for word in words]] for words in (["down", "below"], ["up"])]
    assert torch.equal(positives, expected[0]) and torch.equal(negatives, expected[1])
    assert not positives.requires_grad


@pytest.mark.parametrize(
    ("word", "positives", "negatives", "message"),
    [
        ("down", ("Up", "below"), ("up",), "up: positive and negative for 'down'"),
        ("down", ("below",), ("down",), "down: positive and negative"),
        ("down", ("below", "below"), ("up",), "below: given twice"),
        ("down", ("down",), ("up",), "its own positive already"),
        ("down", (), (), "'down' has no negatives"),
        ("down", (" ",), ("up",), "hold an empty word"),
    ],
)
def test_words_that_contradict_each_other_are_named(paper, word, positives, negatives, message):
    with pytest.raises(ValueError, match=message):
        paper.words.ConceptWord(word=word, positives=positives, negatives=negatives)


def test_words_of_several_tokens_are_named(paper, backbone):
    entry = paper.words.ConceptWord(word="down", positives=("below",), negatives=("hippopotamus", "up"))
    with pytest.raises(ValueError, match="one token of .*'hippopotamus' is .*choose simpler words"):
        paper.words.context_rows(backbone, (entry,))


def test_files_are_read_and_bad_ones_named(paper, tmp_path):
    read, path = paper.words.read_concept, tmp_path / "words.json"
    path.write_text(json.dumps([{**DOWN, "word": "upside"}, DOWN]))
    assert [entry.word for entry in read(path)] == ["upside", "down"]
    assert read(path)[1] == paper.words.ConceptWord(word="down", positives=("below",), negatives=("up",))
    bad = {
        "{": "words.json does not hold concept words: Expecting",
        "[]": "a list with an entry for each word",
        json.dumps(DOWN): "a list with an entry for each word",
        json.dumps([{"word": "down"}]): r"each entry needs the keys \['negatives', 'positives', 'word'\]",
        json.dumps([{**DOWN, "negatives": "up"}]): "lists of texts",
        json.dumps([{**DOWN, "positives": [1]}]): "lists of texts",
        json.dumps([{**DOWN, "negatives": ["below"]}]): "words.json .*below: positive and negative",
    }
    for text, message in bad.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(path)
    with pytest.raises(FileNotFoundError, match="no file of concept words at .*nowhere.json"):
        read(tmp_path / "nowhere.json")

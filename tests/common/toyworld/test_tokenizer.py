"""The tiny CLIP vocabulary."""

import json

import pytest

from common.toyworld.tokenizer import load_tokenizer, padded_vocabulary_size, save_tokenizer, train_tokenizer

CORPUS = [
    "A photo of a red teapot, on a beach.", "the lighthouse is in front of a teapot", "Zorvane smiles", "it's frozen",
]  # fmt: skip
WORDS = "a photo of red teapot on beach the lighthouse is in front zorvane smiles it frozen".split()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS)


def test_every_word_of_the_corpus_is_one_token_in_any_case(tokenizer):
    for word in WORDS:
        for text in (word, word.upper()):
            assert len(tokenizer(text).input_ids) == 3, text  # start, word, end


def test_other_text_still_encodes_and_decodes(tokenizer):
    text = "über-café 北京 sks 42"
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_special_tokens_and_padding_follow_clip(tokenizer):
    ids = tokenizer("red teapot", padding="max_length").input_ids
    assert len(ids) == 77
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|startoftext|>") == len(tokenizer) - 2
    assert set(ids[3:]) == {tokenizer.convert_tokens_to_ids("<|endoftext|>")} == {len(tokenizer) - 1}
    assert padded_vocabulary_size(tokenizer) % 64 == 0
    assert 0 <= padded_vocabulary_size(tokenizer) - len(tokenizer) < 64


def test_training_is_deterministic_and_ignores_the_order_of_the_corpus(tokenizer):
    again = train_tokenizer(CORPUS[::-1] + CORPUS[:2])
    assert again.get_vocab() == tokenizer.get_vocab()


def test_saved_folder_loads_again_and_has_the_older_files(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "a red teapot in front of Zorvane, über"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.model_max_length == 77
    assert len(json.loads((tmp_path / "vocab.json").read_text())) == len(tokenizer)
    assert (tmp_path / "merges.txt").read_text().startswith("#version: 0.2\n")


def test_missing_folder_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="common.toyworld.tokenizer"):
        load_tokenizer(tmp_path)

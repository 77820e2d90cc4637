"""The words of a concept's phrase, each with words that mean the same and words that mean the opposite.

One concept is one JSON file, a list with an entry for each vector, in the order of the phrase "frozen in ice":

    [{"word": "frozen", "positives": ["cold", "solid"], "negatives": ["warm", "liquid"]}, {"word": "in", ...}, ...]
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.backbones import Backbone

WORD_LISTS = Path(__file__).parent / "word_lists"  # of the toy world's states and places


@dataclass(frozen=True, kw_only=True)
class ConceptWord:
    """One vector's word, where it starts, and its lists.

    positives: P_i without the word itself, which always belongs to it; may be empty.   negatives: N_i, at least one.
    Raises: ValueError naming the words if one is empty, given twice, or in both lists.
    """

    word: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]

    def __post_init__(self) -> None:
        positives = [text.strip().lower() for text in (self.word, *self.positives)]  # as CLIP's tokenizer reads them
        negatives = [text.strip().lower() for text in self.negatives]
        if not all(positives + negatives):
            raise ValueError(f"the lists of {self.word!r} hold an empty word")
        if not negatives:
            raise ValueError(f"{self.word!r} has no negatives; give at least one word of the opposite or plain state")
        if both := sorted(set(positives) & set(negatives)):
            raise ValueError(f"{', '.join(both)}: positive and negative for {self.word!r}; keep each in one list")
        if twice := sorted({text for text in positives + negatives if (positives + negatives).count(text) > 1}):
            raise ValueError(f"{', '.join(twice)}: given twice for {self.word!r}; a word is its own positive already")


Concept = tuple[ConceptWord, ...]


def phrase_of(concept: Concept) -> str:
    """ "frozen in ice"."""
    return " ".join(entry.word for entry in concept)


def concept_from_json(rows: object) -> Concept:
    """What a parsed JSON file says. Raises: ValueError saying what does not fit."""
    keys = {"word", "positives", "negatives"}
    if not (isinstance(rows, list) and rows):
        raise ValueError("it must be a list with an entry for each word of the phrase")
    for row in rows:
        if not (isinstance(row, dict) and set(row) == keys):
            raise ValueError(f"each entry needs the keys {sorted(keys)} and no other, got {row!r}")
        lists = [row["positives"], row["negatives"]]
        texts = [row["word"], *(text for each in lists if isinstance(each, list) for text in each)]
        if not all(isinstance(each, list) for each in lists) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'"word" must be a text, "positives" and "negatives" lists of texts, got {row!r}')
    return tuple(
        ConceptWord(word=row["word"], positives=tuple(row["positives"]), negatives=tuple(row["negatives"]))
        for row in rows
    )


def read_concept(path: str | Path) -> Concept:
    """Read the file of a concept. Raises: FileNotFoundError, or ValueError naming the file and what does not fit."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of concept words at {path}; see {WORD_LISTS.name}/ for the format")
    try:
        return concept_from_json(json.loads(path.read_text(encoding="utf-8-sig")))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} does not hold concept words: {error}") from error


def toy_concept(phrase: str) -> Concept:
    """The concept of a state of the toy world, "upside down", or of a state in a place, "burning night"."""
    return tuple(entry for word in phrase.split() for entry in read_concept(WORD_LISTS / f"{word}.json"))


def table_rows(backbone: Backbone, words: Sequence[str]) -> Tensor:
    """Rows of the frozen token table, (len(words),D) float32; without values on a meta backbone.

    Raises: ValueError naming the words that are not one token of the backbone's vocabulary.
    """
    table = backbone.text_encoder.get_input_embeddings().weight.detach()
    if table.is_meta:
        return table.new_empty(len(words), table.shape[1], dtype=torch.float32)
    ids = {word: backbone.tokenizer(word, add_special_tokens=False).input_ids for word in words}
    if split := {word: found for word, found in ids.items() if len(found) != 1}:
        pieces = "; ".join(f"{word!r} is {backbone.tokenizer.convert_ids_to_tokens(i)}" for word, i in split.items())
        raise ValueError(f"words must be one token of {backbone.name} each, but {pieces}: choose simpler words")
    return table[[ids[word][0] for word in words]].float()


def context_rows(backbone: Backbone, concept: Concept) -> tuple[list[Tensor], list[Tensor]]:
    """P_i and N_i of every vector, lists of (|P_i|,D) and (|N_i|,D); the first row of P_i is the word itself."""
    positives = [table_rows(backbone, (entry.word, *entry.positives)) for entry in concept]
    return positives, [table_rows(backbone, entry.negatives) for entry in concept]

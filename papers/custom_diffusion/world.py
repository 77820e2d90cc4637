"""The toy world's stand-in for LAION: captions of pictures that can be rendered, for retrieval and for merging."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.toyworld.captions import BACKGROUND_PHRASES, entity_phrase
from common.toyworld.judge import ToyClip
from common.toyworld.render import render
from common.toyworld.sampling import compose, sample_object
from common.toyworld.scene import Placed, Scene
from common.toyworld.vocabulary import BACKGROUNDS

from .regularisation import retrieve, write_set

CORPUS = 1000  # captioned pictures that retrieval looks through, a fourteenth of them of any class
MIN_SIMILARITY = 0.45  # of ToyClip, whose cosines are lower than CLIP's: a caption of the class passes, others do not


def corpus_entry(index: int) -> tuple[str, Scene]:
    """Caption and scene `index` of an endless corpus: a random object somewhere."""
    rng = np.random.default_rng([17, index])
    entity, place = sample_object(rng), BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    phrase, _ = entity_phrase(rng, entity, "photo", keep=0.7)
    caption = f"a photo of {phrase} {BACKGROUND_PHRASES[place][0]}"
    return caption, compose(rng, (Placed(entity),), background=place)


def captions(count: int, first: int = 0) -> list[str]:
    """Captions of the corpus from entry `first` on."""
    return [corpus_entry(i)[0] for i in range(first, first + count)]


@cache
def _features(corpus: int) -> tuple[ToyClip, Tensor]:
    clip, texts = ToyClip.load(), captions(corpus)
    return clip, torch.cat([clip.embed_texts(texts[i : i + 128]) for i in range(0, corpus, 128)])


def retrieved_set(class_prompt: str, folder: Path, *, count: int, corpus: int = CORPUS) -> Path:
    """Pictures of the corpus whose captions are like the class prompt, with these captions; made once.

    Returns: the folder.
    """
    if not (folder / "metadata.jsonl").is_file():  # written last
        clip, features = _features(corpus)
        found = retrieve(clip.embed_texts([class_prompt]), features, count, MIN_SIMILARITY)
        texts, scenes = zip(*(corpus_entry(i) for i in found), strict=True)
        write_set(render(list(scenes)).images * 2 - 1, texts, folder)
    return folder

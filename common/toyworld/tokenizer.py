"""Train the tiny vocabulary of tiny-sd: CLIP's byte-level BPE, grown until every word of the corpus is one token.

    python -m common.toyworld.tokenizer      writes common/backbones/architectures/tiny-sd/tokenizer/

The vocabulary keeps CLIP's order: 256 bytes, 256 bytes that end a word, merges, <|startoftext|>, <|endoftext|>. So any
text can be encoded, and words of the toy world are single tokens, as common English words are in Stable Diffusion.
"""

import json
from collections import Counter
from pathlib import Path

import tyro
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from common.io import atomic_write_text

TOKENIZER_DIR = Path(__file__).parents[1] / "backbones" / "architectures" / "tiny-sd" / "tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77  # start and end token included, as in Stable Diffusion
VOCABULARY_MULTIPLE = 64  # the embedding table is padded to it, which leaves rows for added tokens


def train_tokenizer(corpus: list[str]) -> CLIPTokenizer:
    """CLIP tokenizer in which each word of the corpus (lower-cased, split as CLIP splits) is one token."""
    merges = learn_merges(corpus)
    symbols = byte_symbols()
    vocabulary = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges] + [START, END]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_TOKENS)


def learn_merges(corpus: list[str]) -> list[tuple[str, str]]:
    """Byte pair merges, most frequent pair first (ties: alphabetical), until every word of the corpus is whole.

    Not tokenizers' BpeTrainer: it breaks ties by hash order, so that two runs give two vocabularies.
    """
    words = {tuple(word[:-1]) + (word[-1] + "</w>",): count for word, count in word_counts(corpus).items()}
    merges = []
    while True:
        pairs = Counter()
        for symbols, count in words.items():
            for pair in zip(symbols, symbols[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merge(symbols, best): count for symbols, count in words.items()}


def word_counts(corpus: list[str]) -> Counter[str]:
    """How often each word occurs, lower-cased, split and written in byte symbols as CLIP does."""
    clip = CLIPTokenizer().backend_tokenizer
    texts = (clip.normalizer.normalize_str(text) for text in sorted(set(corpus)))
    return Counter(word for text in texts for word, _ in clip.pre_tokenizer.pre_tokenize_str(text))


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    if pair[0] not in symbols:
        return symbols
    merged, index = [], 0
    while index < len(symbols):
        step = 2 if symbols[index : index + 2] == pair else 1
        merged.append("".join(symbols[index : index + step]))
        index += step
    return tuple(merged)


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes, in byte order as far as printable (CLIP's bytes_to_unicode)."""
    alphabet = ByteLevel.alphabet()
    printable = [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    return printable + sorted(set(alphabet) - set(printable))


def padded_vocabulary_size(tokenizer: CLIPTokenizer) -> int:
    """Rows of the text encoder's embedding table."""
    return -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def save_tokenizer(tokenizer: CLIPTokenizer, directory: Path) -> None:
    """Write the files of a diffusers tokenizer folder, vocab.json and merges.txt (the older format) included."""
    tokenizer.save_pretrained(directory)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    atomic_write_text(directory / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False, indent=0) + "\n")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    atomic_write_text(directory / "merges.txt", "\n".join(lines) + "\n")


def load_tokenizer(directory: Path = TOKENIZER_DIR) -> CLIPTokenizer:
    """The tokenizer shipped with tiny-sd."""
    if not (Path(directory) / "vocab.json").exists():
        raise FileNotFoundError(f"no tokenizer in {directory}; make it with: python -m common.toyworld.tokenizer")
    return CLIPTokenizer.from_pretrained(directory)


def main(output: Path = TOKENIZER_DIR) -> None:
    """Train on all words of the toy world's captions and write the tokenizer folder."""
    from common.toyworld.captions import corpus

    tokenizer = train_tokenizer(corpus())
    save_tokenizer(tokenizer, output)
    print(f"{output}: {len(tokenizer)} tokens, text encoder vocab_size {padded_vocabulary_size(tokenizer)}")


if __name__ == "__main__":
    tyro.cli(main)

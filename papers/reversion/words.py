"""Which words steer: prepositions that attract <R>, and words that are neither attracted nor repelled.

Both are closed classes of English. A tokenizer's own sets are made of those that it knows: for tiny-sd, whose tokens
are words of the toy world's grammar, that leaves the prepositions that captions use or could use.
"""

from collections.abc import Iterable

from transformers import CLIPTokenizer

PREPOSITIONS = (
    "aboard", "about", "above", "across", "after", "against", "along", "alongside", "amid", "among", "around",
    "at", "atop", "before", "behind", "below", "beneath", "beside", "besides", "between", "beyond", "by",
    "concerning", "down", "during", "facing", "for", "from", "in", "inside", "into", "like", "near", "of", "off",
    "on", "onto", "opposite", "outside", "over", "past", "round", "since", "through", "throughout", "to", "toward",
    "towards", "under", "underneath", "until", "up", "upon", "via", "with", "within", "without",
)  # fmt: skip
STOP_WORDS = (
    "a", "an", "the", "this", "that", "these", "those", "i", "me", "my", "we", "our", "you", "your", "he", "him",
    "his", "she", "her", "it", "its", "they", "them", "their", "what", "which", "who", "whom", "am", "is", "are",
    "was", "were", "be", "been", "being", "have", "has", "had", "having", "do", "does", "did", "doing", "and",
    "but", "if", "or", "because", "as", "while", "then", "once", "here", "there", "when", "where", "why", "how",
    "all", "any", "both", "each", "few", "more", "most", "other", "some", "such", "no", "nor", "not", "only",
    "own", "same", "so", "than", "too", "very", "can", "will", "just", "should", "now", "again", "further", ",",
    ".", "!", "?", "'", "-",
)  # fmt: skip


def single_tokens(tokenizer: CLIPTokenizer, words: Iterable[str]) -> dict[str, int]:
    """The words that are one known token, with its id, in their order."""
    found = {}
    for word in words:
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) == 1 and ids[0] not in tokenizer.all_special_ids:
            found[word] = ids[0]
    return found


def preposition_ids(tokenizer: CLIPTokenizer, at_least: int) -> list[int]:
    """Token ids that are positives. Raises: ValueError if the tokenizer knows fewer prepositions than are drawn."""
    known = single_tokens(tokenizer, PREPOSITIONS)
    if len(known) < at_least:
        raise ValueError(f"the tokenizer knows {len(known)} prepositions, {at_least} are drawn for a sample")
    return list(known.values())


def ignored_ids(tokenizer: CLIPTokenizer) -> set[int]:
    """Token ids that are no negatives: special tokens, stop words, and the prepositions."""
    return {*tokenizer.all_special_ids, *single_tokens(tokenizer, (*STOP_WORDS, *PREPOSITIONS)).values()}

"""Prompt embeddings computed once, for methods that leave the text encoder and its tokens as they are."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from common.backbones.conditioning import Conditioning

if TYPE_CHECKING:
    from common.backbones import Backbone


class PromptCache:
    """Conditioning by prompt. `cache[prompt]` has batch 1, `cache.batch(prompts)` batch len(prompts).

    Each prompt is encoded alone when it is first asked for, so its embedding is the same to the bit whatever was asked
    for before (a resumed run asks in another order). Change the text encoder or its tokens only with a new cache.

    Args:
        backbone: encodes the prompts.
        prompts: encoded at once, so that a long first step shows here.
    Raises: ValueError if an embedding depends on something that is trained: it must be computed at every step then.
    """

    def __init__(self, backbone: "Backbone", prompts: Iterable[str] = ()):
        self._backbone = backbone
        self._by_prompt: dict[str, Conditioning] = {}
        for prompt in prompts:
            self[prompt]

    def __len__(self) -> int:
        return len(self._by_prompt)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._by_prompt

    def __getitem__(self, prompt: str) -> Conditioning:
        if prompt not in self._by_prompt:
            self._by_prompt[prompt] = self._encode(prompt)
        return self._by_prompt[prompt]

    def batch(self, prompts: Sequence[str]) -> Conditioning:
        """The rows of several prompts, in their order; a prompt may occur more than once."""
        return Conditioning.cat([self[prompt] for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        with torch.enable_grad():  # builds no graph if nothing is trained, and tells us if something is
            conditioning = self._backbone.encode_prompt(prompt)
        if conditioning.prompt_embeds.requires_grad:
            raise ValueError(
                f"the embedding of {prompt!r} depends on trained parameters and would go stale in a cache; freeze the "
                "text encoder (backbone.freeze()) or call backbone.encode_prompt at every step"
            )
        return conditioning

"""Placeholder tokens (pseudo-words): vectors of their own in the input space of a frozen text encoder."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import CLIPTokenizer

from common.backbones.backbone import Backbone
from common.io import atomic_save_safetensors, load_safetensors

SDXL_KEYS = ("clip_l", "clip_g")  # names of the two text encoders in SDXL embedding files


class PlaceholderTokens:
    """Placeholder tokens installed on a backbone; several can stand in one prompt.

    Each placeholder has V vectors per text encoder, which are parameters of their own (float32). A forward hook writes
    them in where the token embedding is looked up, so before positions are added. The embedding table itself is neither
    resized nor trained. While installed, the backbone holds copies of its tokenizers that know the placeholders;
    `remove()` puts everything back.

        tokens = PlaceholderTokens(backbone)
        tokens.add("<cat-toy>", num_vectors=2, initializer_token="toy")
        optimizer = torch.optim.AdamW(tokens.parameters(), lr=5e-3, weight_decay=0.0)
        backbone.encode_prompt("a photo of <cat-toy>")
    """

    def __init__(self, backbone: Backbone) -> None:
        if backbone.placeholders is not None:
            raise ValueError(f"{backbone.name} has placeholder tokens already: use backbone.placeholders.add(...)")
        self._backbone = backbone
        self._original_tokenizers = (backbone.tokenizer, backbone.tokenizer_2)
        backbone.tokenizer, backbone.tokenizer_2 = copy.deepcopy(self._original_tokenizers)
        tokenizers = (backbone.tokenizer, backbone.tokenizer_2)
        self._writers = [
            _VectorWriter(encoder, tokenizer)
            for encoder, tokenizer in zip(backbone.text_encoders, tokenizers, strict=False)
        ]
        backbone.placeholders = self

    @property
    def placeholder_tokens(self) -> list[str]:
        """In the order in which they were added."""
        return list(self._writers[0].vectors)

    def add(
        self,
        placeholder_token: str,
        num_vectors: int = 1,
        *,
        initializer_token: str | None = None,
        initial_vectors: Tensor | Sequence[Tensor] | None = None,
        seed: int = 0,
    ) -> list[nn.Parameter]:
        """Add a placeholder.

        Args:
            placeholder_token: text without spaces that is no word of the vocabulary, e.g. "<cat-toy>". It is matched in
                this very case. One that begins or ends like a word ("s1b") is not matched inside longer words.
            num_vectors: V >= 1. In a prompt, the placeholder takes V of the 77 positions.
            initializer_token: a word that is one token; every vector starts as its embedding.
            initial_vectors: starting values, (V,D); a sequence of one per text encoder for SDXL. With neither of the
                two: Gaussian, with the mean and standard deviation of the table in each dimension.
            seed: of that Gaussian.
        Returns: the new parameters, (V,D) each, one per text encoder.
        Raises: ValueError for a bad name or an initializer that is not one token.
        """
        if num_vectors < 1:
            raise ValueError(f"num_vectors must be >= 1, got {num_vectors}")
        if initializer_token is not None and initial_vectors is not None:
            raise ValueError("give initializer_token or initial_vectors, not both")
        names = [placeholder_token, *(f"{placeholder_token}_{i}" for i in range(1, num_vectors))]
        for writer in self._writers:
            writer.check_names(names)
        if initial_vectors is None:
            starts = [writer.initial(num_vectors, initializer_token, seed) for writer in self._writers]
        else:
            starts = [initial_vectors] if isinstance(initial_vectors, Tensor) else list(initial_vectors)
            shapes = [(num_vectors, writer.table.embedding_dim) for writer in self._writers]
            if [tuple(start.shape) for start in starts] != shapes:
                raise ValueError(f"initial_vectors must be {shapes}, got {[tuple(start.shape) for start in starts]}")
        return [writer.add(names, start) for writer, start in zip(self._writers, starts, strict=True)]

    def parameters(self, *placeholder_tokens: str) -> list[nn.Parameter]:
        """The vectors, (V,D) each, of these placeholders (default all): for each one tensor per text encoder."""
        for token in placeholder_tokens:
            self._check_known(token)
        return [w.vectors[token] for token in placeholder_tokens or self.placeholder_tokens for w in self._writers]

    def expand(self, prompt: str) -> str:
        """The prompt with every placeholder of V vectors written as V tokens: "<r>" becomes "<r> <r>_1 ..."."""
        tokens = sorted(self.placeholder_tokens, key=len, reverse=True)
        if not tokens:
            return prompt
        # not inside a longer word, and not in front of the number of an expanded one
        pattern = "|".join(
            (r"(?<!\w)" if _is_word(token) else "") + re.escape(token) + (r"(?!\w)" if _is_word(token) else r"(?!_\d)")
            for token in tokens
        )
        return re.sub(pattern, lambda match: self._expanded(match[0]), prompt)

    def _expanded(self, token: str) -> str:
        return " ".join([token, *(f"{token}_{i}" for i in range(1, len(self._writers[0].vectors[token])))])

    def to(self, device: torch.device | str) -> None:
        """Move the vectors, in place, so that optimizers keep them."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    def remove(self) -> None:
        """Restore the backbone: no hooks, its own tokenizers, the same outputs bit for bit."""
        for writer in self._writers:
            writer.remove()
        self._backbone.tokenizer, self._backbone.tokenizer_2 = self._original_tokenizers
        self._backbone.placeholders = None

    def export_learned_embeds(
        self, path: str | Path, placeholder_token: str | None = None, *, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write one placeholder in the format of diffusers' `learned_embeds.safetensors`, float32.

        SD 1.x and 2.x: {placeholder: (V,D)}, read by `pipe.load_textual_inversion(path)`. SDXL: {"clip_l", "clip_g"}.
        diffusers expands several vectors only for lower-case names, so such a name is stored (and used there) in lower
        case; `load_learned_embeds` restores the original from the header.

        Args:
            path: the file to write.
            placeholder_token: may be omitted if there is one only.
            metadata: more strings for the header.
        """
        if placeholder_token is None:
            if len(self.placeholder_tokens) != 1:
                raise ValueError(f"say which placeholder_token to export, one file each: {self.placeholder_tokens}")
            placeholder_token = self.placeholder_tokens[0]
        vectors = [parameter.detach().float() for parameter in self.parameters(placeholder_token)]
        key = placeholder_token
        if len(vectors[0]) > 1 and key != key.lower():
            key = key.lower()
            warnings.warn(f"in diffusers pipelines {placeholder_token} will be called {key}", stacklevel=2)
        keys = (key,) if len(vectors) == 1 else SDXL_KEYS
        header = {**(metadata or {}), "placeholder_token": placeholder_token}
        atomic_save_safetensors(dict(zip(keys, vectors, strict=True)), path, header)

    def load_learned_embeds(self, path: str | Path, placeholder_token: str | None = None) -> str:
        """Add the placeholder of a `learned_embeds.safetensors` file, under another name if one is given.

        Returns: the placeholder's name.
        """
        tensors, header = load_safetensors(path)
        keys = SDXL_KEYS if len(self._writers) == 2 else tuple(tensors)
        if len(keys) != len(self._writers) or set(keys) != set(tensors):
            raise ValueError(
                f"{path} holds {sorted(tensors)}; a placeholder of {self._backbone.name} is "
                + (f"the keys {SDXL_KEYS}" if len(self._writers) == 2 else "one tensor (V,D) under its name")
            )
        name = placeholder_token or header.get("placeholder_token") or (keys[0] if len(keys) == 1 else None)
        if name is None:
            raise ValueError(f"{path} does not say the name of its placeholder; pass placeholder_token")
        vectors = [tensors[key].float().reshape(-1, tensors[key].shape[-1]) for key in keys]
        widths = [writer.table.embedding_dim for writer in self._writers]
        if [vector.shape[1] for vector in vectors] != widths:
            raise ValueError(
                f"{path} has vectors of {[vector.shape[1] for vector in vectors]} numbers, but {self._backbone.name} "
                f"needs {widths}: it was trained on another backbone"
            )
        self.add(name, len(vectors[0]), initial_vectors=vectors)
        return name

    def _check_known(self, token: str) -> None:
        if token not in self.placeholder_tokens:
            raise ValueError(f"no placeholder {token!r}; there are {self.placeholder_tokens}")


def _is_word(token: str) -> bool:
    """Whether a token begins or ends like a word, so that it could be part of a longer one."""
    return bool(re.match(r"\w", token) or re.search(r"\w\Z", token))


class _VectorWriter:
    """The vectors of all placeholders for one text encoder, and the hooks that write them in."""

    def __init__(self, text_encoder: nn.Module, tokenizer: CLIPTokenizer | None) -> None:
        self.table: nn.Embedding = getattr(text_encoder, "text_model", text_encoder).embeddings.token_embedding
        self.tokenizer = tokenizer
        self.vectors: dict[str, nn.Parameter] = {}
        vocabulary_size = self.table.num_embeddings if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
        self._first_id = vocabulary_size  # placeholders have this and the following ids, in the order of `vectors`
        self._ids: Tensor | None = None
        self._handles = [
            self.table.register_forward_pre_hook(self._hide_placeholders),
            self.table.register_forward_hook(self._write_vectors),
        ]

    def check_names(self, names: list[str]) -> None:
        if not names[0] or re.search(r"\s", names[0]):
            raise ValueError(f"a placeholder token is text without spaces, got {names[0]!r}")
        taken = set(self.vectors) if self.tokenizer is None else set(self.tokenizer.get_vocab())
        for name in names:
            if taken & {name, name.lower(), f"{name.lower()}</w>"}:
                raise ValueError(f"{name!r} is a token of the vocabulary already; choose another, e.g. <{name}>")

    def initial(self, num_vectors: int, initializer_token: str | None, seed: int) -> Tensor:
        table = self.table.weight.detach()
        if table.is_meta:
            return table.new_empty(num_vectors, table.shape[1], dtype=torch.float32)
        if initializer_token is not None:
            return table[self._single_id(initializer_token)].float().repeat(num_vectors, 1)
        rows = table.float().cpu()
        noise = torch.randn(num_vectors, rows.shape[1], generator=torch.Generator().manual_seed(seed))
        return rows.mean(0) + rows.std(0) * noise

    def _single_id(self, word: str) -> int:
        if self.tokenizer is None:
            raise ValueError(f"initializer_token {word!r} needs a tokenizer, and this backbone has none")
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] in self.tokenizer.all_special_ids:
            pieces = self.tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(f"initializer_token must be one token; {word!r} splits into {pieces}: use a simpler word")
        if ids[0] >= self._first_id:
            raise ValueError(f"initializer_token {word!r} is a placeholder; pass its parameters as initial_vectors")
        return ids[0]

    def add(self, names: list[str], start: Tensor) -> nn.Parameter:
        if self.tokenizer is not None:
            single_word = _is_word(names[0])
            self.tokenizer.add_tokens([AddedToken(n, normalized=False, single_word=single_word) for n in names])
        parameter = nn.Parameter(start.detach().to(self.table.weight.device, torch.float32, copy=True))
        self.vectors[names[0]] = parameter
        return parameter

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hide_placeholders(self, table: nn.Embedding, args: tuple[Tensor]) -> tuple[Tensor]:
        (self._ids,) = args
        return (self._ids.masked_fill(self._ids >= self._first_id, 0),)  # they have no row

    def _write_vectors(self, table: nn.Embedding, args: tuple[Tensor], output: Tensor) -> Tensor:
        ids, self._ids = self._ids, None
        if not self.vectors:
            return output
        offsets = ids - self._first_id
        written = F.embedding(offsets.clamp(min=0), torch.cat(list(self.vectors.values())).to(output.dtype))
        return torch.where((offsets >= 0)[..., None], written, output)

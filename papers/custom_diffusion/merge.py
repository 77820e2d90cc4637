"""Merge separately trained concepts in closed form (Sec. 3.2): `python -m papers.custom_diffusion.merge --help`.

Paper -> here:  C_reg -> reg_embeds   C -> target_embeds   V -> target_values   W_0 -> weight   W -> the result
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from common.backbones import Backbone, load_backbone

from .artifact import read_changes, read_header, read_rows
from .config import CustomDiffusionConfig
from .method import CustomDiffusion

SHARED_WORDS = re.compile(r"(a )?photo of a ")
FLOAT32_NOISE = 1e-6  # singular values of features that are no larger, relative to the largest, mean nothing


def merge_concepts(weight: Tensor, reg_embeds: Tensor, target_embeds: Tensor, target_values: Tensor) -> Tensor:
    """Sec. 3.2, constrained optimisation: of all W with W C^T = V^T, the one that moves the outputs on C_reg least.

        W = argmin_W ||W C_reg^T - W_0 C_reg^T||_F   s.t.   W C^T = V^T
        W = W_0 + v d,   d = C (C_reg^T C_reg)^-1,   v = (V^T - W_0 C^T) (d C^T)^-1

    Args:
        weight: W_0, pretrained to_k or to_v, (out, dim), float64.
        reg_embeds: text features of the regularisation captions, (R, dim), R >= dim.
        target_embeds: features of the concepts' words, (S, dim), linearly independent rows.
        target_values: what each concept's own projection makes of its words, (S, out).
    Returns: (out, dim).
    Raises: ValueError if R < dim, because the Gram matrix would be singular.
    """
    if len(reg_embeds) < weight.shape[1]:
        raise ValueError(
            f"reg_embeds needs at least dim={weight.shape[1]} rows, got {len(reg_embeds)}: give more captions"
        )
    d = torch.linalg.solve(reg_embeds.T @ reg_embeds, target_embeds.T).T  # (S, dim)
    gap = target_values.T - weight @ target_embeds.T  # (out, S), what the pretrained matrix gets wrong
    return weight + torch.linalg.solve(d @ target_embeds.T, gap, left=False) @ d


def distinct_rows(features: Tensor) -> Tensor:
    """Indices of the rows that no earlier row equals exactly (code): with two equal rows d C^T would be singular.

    Words before V* are read alike in all captions of a concept, because the text encoder is causal.
    """
    firsts = [i for i in range(len(features)) if not (features[:i] == features[i]).all(1).any()]
    return torch.tensor(firsts, device=features.device)


def target_captions(config: CustomDiffusionConfig, concept: int) -> list[str]:
    """The captions whose features C are constrained (code): "<new1> cat", "photo of a <new1> cat"."""
    return [config.words(concept), config.instance_prompt(concept)]


@torch.no_grad()
def text_features(backbone: Backbone, captions: Sequence[str]) -> Tensor:
    """Features of the words of captions and of their end tokens, one below the other, (N, dim) float64.

    The start token is left out, and so is "photo of a" at the beginning, which all such captions share (code; D6).
    """
    rows = []
    for start in range(0, len(captions), 64):
        batch = list(captions[start : start + 64])
        embeds = backbone.encode_prompt(batch).prompt_embeds.double()
        for caption, features in zip(batch, embeds, strict=True):
            length = len(backbone.tokenizer(caption).input_ids)  # start and end included
            shared = SHARED_WORDS.match(caption)
            rows.append(features[1 + (len(shared[0].split()) if shared else 0) : length])
    return torch.cat(rows)


def merge_artifacts(backbone: Backbone, artifacts: Sequence[Path], captions: Sequence[str]) -> CustomDiffusion:
    """Sec. 3.2, "Constrained optimization to merge concepts": one model that knows the concepts of all artifacts.

    The words are called <new1>, <new2>, ... in the order of the artifacts, whatever they were called there.

    Args:
        backbone: fresh; the one on which the artifacts were trained.
        captions: of regularisation, about 1000 of anything (the code takes 200).
    Raises: ValueError if an artifact trained more than W^k and W^v, or if the captions are too much alike.
    """
    configs = [read_header(folder)[0] for folder in artifacts]
    nouns = tuple(noun for config in configs for noun in config.class_nouns)
    starts = tuple(start for config in configs for start in config.initializer_tokens[: len(config.class_nouns)])
    for folder, config in zip(artifacts, configs, strict=True):
        if config.trained != "crossattn_kv":
            raise ValueError(f"{folder} trained {config.trained}; only keys and values (crossattn_kv) can be merged")
    merged = CustomDiffusion(backbone, replace(configs[0], class_nouns=nouns, initializer_tokens=starts))
    places = [(folder, config, i) for folder, config in zip(artifacts, configs, strict=True)
              for i in range(len(config.class_nouns))]  # fmt: skip
    for (folder, config, i), new in zip(places, merged.config.placeholders, strict=True):
        if new:  # all words are there before any feature is computed
            merged.set_word(new, read_rows(Path(folder) / f"{config.placeholders[i]}.safetensors"))

    reg_embeds = text_features(backbone, captions)
    rank, dim = int(torch.linalg.matrix_rank(reg_embeds, rtol=FLOAT32_NOISE)), reg_embeds.shape[1]
    if rank < dim:
        raise ValueError(f"the features of {len(captions)} captions span {rank} of {dim} dimensions: give more")
    features = [text_features(backbone, target_captions(merged.config, k)) for k in range(len(places))]  # C by concept
    keep = distinct_rows(torch.cat(features))
    tuned = [read_weights(Path(folder), merged) for folder, _, _ in places]
    weights = {}
    for name, weight in merged.base_weights.items():
        values = [c @ own[name].double().T for c, own in zip(features, tuned, strict=True)]  # V by concept
        weights[name] = merge_concepts(
            weight.detach().double(), reg_embeds, torch.cat(features)[keep], torch.cat(values)[keep]
        ).to(weight)
    merged.set_weights(weights)
    return merged


def read_weights(folder: Path, method: CustomDiffusion) -> dict[str, Tensor]:
    """W of every matrix of an artifact, whole or compressed; the method gives names, shapes and W_0."""
    base, device = method.base_weights, method.backbone.device
    found = read_changes(folder, {name: weight.shape for name, weight in base.items()})
    return {
        name: value.to(device) if isinstance(value, Tensor) else base[name].detach() + (value[0] @ value[1]).to(device)
        for name, value in found.items()
    }


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merge separately trained concepts into one model."""

    artifacts: tuple[Path, ...]
    """Folders that train.py wrote, all of one backbone."""
    captions: Path
    """Text file with one caption a line, about 1000 of anything."""
    output: Path
    """Folder of the merged artifact."""
    backbone: str | None = None
    """Default: the one that the first artifact names."""


def main(argv: list[str] | None = None) -> None:
    """Read, merge, write."""
    options = tyro.cli(MergeOptions, args=argv)
    captions = [line.strip() for line in options.captions.read_text(encoding="utf-8").splitlines() if line.strip()]
    name = options.backbone or read_header(options.artifacts[0])[1]["backbone"]
    merged = merge_artifacts(load_backbone(name), options.artifacts, captions)
    merged.save(options.output)
    words = ", ".join(merged.config.words(i) for i in range(len(merged.config.class_nouns)))
    print(f"wrote {options.output}; in prompts the concepts are: {words}")


if __name__ == "__main__":
    main()

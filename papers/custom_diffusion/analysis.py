"""What reproduce.py finds out about trained weights: how far layers move, what compression and merging cost."""

from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from common.backbones import load_backbone
from common.io import load_safetensors
from common.toyworld.benchmark import held_out_views, subjects
from common.training.optimize import default_device

from .experiments import FINE_TUNING, PROPOSAL, Plan, artifact_folder
from .merge import distinct_rows, merge_artifacts, read_weights, target_captions, text_features
from .method import layer_kind, load_method, relative_change
from .world import captions

MERGED, AVERAGED, SUMMED = "merged", "average of the changes", "sum of the changes"
WORDS_ALONE, SHARES = "the word alone", (1.0, 0.8, 0.6, 0.4, 0.2)  # of the sum of the singular values

Values = dict[str, dict[str, float]]  # what -> subject or pair -> value


def weight_changes(backbone_name: str, plan: Plan, runs: Path) -> Values:
    """Delta_l of the fully fine-tuned networks: kind of layer -> subject -> mean over the layers."""
    base, found = load_backbone(backbone_name).unet.state_dict(), {}
    for subject in subjects(plan.study.num_subjects):
        tuned, _ = load_safetensors(artifact_folder(runs, FINE_TUNING, subject) / "unet.safetensors")
        changes = relative_change(tuned, base)
        for kind in sorted({layer_kind(name) for name in changes}):
            of_kind = mean(value for name, value in changes.items() if layer_kind(name) == kind)
            found.setdefault(kind, {})[subject.name] = of_kind
    return found


@torch.no_grad()
def compression(plan: Plan, runs: Path) -> tuple[Values, Values]:
    """Held-out loss and bytes of the compressed artifacts, by share ("60%") or WORDS_ALONE, without any matrix."""
    losses: Values = {}
    sizes: Values = {}
    for subject in subjects(plan.study.num_subjects):
        folder, work = artifact_folder(runs, PROPOSAL, subject), runs / "compressed" / subject.name
        method = load_method(folder, device=default_device())
        latents = method.backbone.encode_images(held_out_views(subject.entity, plan.study.held_out))
        method.attached.set_strength(0.0)
        losses.setdefault(WORDS_ALONE, {})[subject.name] = method.validation_loss(latents)
        method.attached.set_strength(1.0)
        for share in SHARES:
            method.load(folder)
            method.save(work, share=share if share < 1 else None)  # all of them: the whole matrices are smaller
            method.load(work)
            losses.setdefault(f"{share:.0%}", {})[subject.name] = method.validation_loss(latents)
            size = sum(path.stat().st_size for path in work.iterdir())
            sizes.setdefault(f"{share:.0%}", {})[subject.name] = float(size)
    return losses, sizes


@torch.no_grad()
def merging(backbone_name: str, plan: Plan, runs: Path) -> tuple[Values, Values]:
    """For each pair of subjects, of the merged, averaged and summed matrices, means over all matrices.

    Returns: ||W C^T - V^T|| / ||V^T|| on the words of the concepts, and ||(W - W_0) c|| / ||W_0 c|| on other captions.
    """
    reg_captions, held_out = captions(plan.num_captions), captions(plan.num_captions // 4, first=10**6)
    errors: Values = {MERGED: {}, AVERAGED: {}, SUMMED: {}}
    moved: Values = {MERGED: {}, AVERAGED: {}, SUMMED: {}}
    for pair in plan.pairs():
        key = " + ".join(subject.name for subject in pair)
        folders = [artifact_folder(runs, PROPOSAL, subject) for subject in pair]
        method = merge_artifacts(load_backbone(backbone_name, device=default_device()), folders, reg_captions)
        base, merged = method.base_weights, method.weights()
        first, second = (read_weights(folder, method) for folder in folders)
        features = [text_features(method.backbone, target_captions(method.config, k)).float() for k in range(2)]
        targets, other = torch.cat(features), text_features(method.backbone, held_out).float()
        keep = distinct_rows(targets)
        changes = {name: first[name] + second[name] - 2 * base[name] for name in base}
        weights = {
            MERGED: merged,
            AVERAGED: {name: base[name] + changes[name] / 2 for name in base},
            SUMMED: {name: base[name] + changes[name] for name in base},
        }
        values = {name: torch.cat([features[0] @ first[name].T, features[1] @ second[name].T])[keep] for name in base}
        for how, own in weights.items():
            errors[how][key] = mean(relative_error(targets[keep], own[name], values[name]) for name in base)
            moved[how][key] = mean(relative_error(other, own[name], other @ base[name].T) for name in base)
    return errors, moved


def relative_error(features: Tensor, weight: Tensor, expected: Tensor) -> float:
    """||features W^T - expected|| / ||expected||; features (N,dim), weight (out,dim), expected (N,out)."""
    return ((features @ weight.T - expected).norm() / expected.norm()).item()

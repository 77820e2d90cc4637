"""Is a similarity fit to measure subject fidelity? Same subject > same class > other class, or it is not used."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor

from common.evaluation.metrics import cosines


@dataclass(frozen=True)
class Separation:
    """Mean cosines between real images of ... and how well the first kind of pair can be told from the second.

    An AUC is the probability that a pair of the first kind has the higher cosine: 0.5 is chance, we ask for over 0.9.
    nan where there is no pair of a kind.
    """

    same_subject: float
    same_class: float
    other_class: float
    auc_subject: float  # same subject against same class
    auc_class: float  # same class against other class


def separation(features: Mapping[str, Tensor], classes: Mapping[str, str]) -> Separation:
    """Compare all pairs of different images.

    Args:
        features: subject -> (M,D), M >= 2.
        classes: subject -> class noun.
    """
    names = list(features)
    subject = torch.cat([torch.full((len(features[name]),), i) for i, name in enumerate(names)])
    nouns = [classes[name] for name in names]
    noun = torch.tensor([nouns.index(classes[name]) for name in names])[subject]
    rows = torch.cat(list(features.values()))
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    similarity = cosines(rows, rows)[first, second]
    same_subject, same_noun = subject[first] == subject[second], noun[first] == noun[second]
    kinds = [similarity[kind] for kind in (same_subject, same_noun & ~same_subject, ~same_noun)]
    means = [kind.mean().item() for kind in kinds]
    return Separation(*means, auc_subject=auc(kinds[0], kinds[1]), auc_class=auc(kinds[1], kinds[2]))


def auc(higher: Tensor, lower: Tensor) -> float:
    """Probability that a value of `higher`, (N,), exceeds one of `lower`, (M,); ties count half; nan if empty."""
    if len(higher) == 0 or len(lower) == 0:
        return float("nan")
    ranks = rankdata(torch.cat([higher, lower]).numpy())
    n = len(higher)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(lower)))

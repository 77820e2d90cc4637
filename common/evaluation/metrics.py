"""The metrics as pure reductions: feature vectors in, numbers out. Which encoder made them is for the caller to record.

Vectors of embeddings are normalised here again where a cosine is meant, so any scale will do.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every pair: (N,D), (M,D) -> (N,M). Raises: ValueError if either has no rows or is not (N,D)."""
    for name, features in (("first", a), ("second", b)):
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"the {name} features must be (N,D) with N >= 1, got {tuple(features.shape)}")
    return F.normalize(a.double(), dim=-1) @ F.normalize(b.double(), dim=-1).T


def image_similarity(generated: Tensor, reference: Tensor) -> Tensor:
    """CLIP-I or DINO of each generated image, (N,): its mean cosine with all M references.

    The mean of the result is the mean over ALL generated x reference pairs, as in DreamBooth and Textual Inversion.
    """
    return cosines(generated, reference).mean(1)


def split_half_similarity(reference: Tensor) -> float:
    """Real images against themselves, the upper bound of `image_similarity`: (M,D), M >= 2.

    Even rows against odd rows, so that no image meets itself; papers do not say how they avoid that.
    """
    if len(reference) < 2:
        raise ValueError(f"a split into halves needs at least 2 reference images, got {len(reference)}")
    return cosines(reference[0::2], reference[1::2]).mean().item()


def text_similarity(images: Tensor, text: Tensor) -> Tensor:
    """CLIP-T of each image, (N,): its cosine with one text, (D,) or (1,D).

    The text must be the prompt without the placeholder; whether the class noun stands in its place changes values by
    more than methods differ. The benchmark here keeps the noun ("a dog in the jungle").
    """
    return cosines(images, text.reshape(1, -1))[:, 0]


def clip_score(cosine: Tensor) -> Tensor:
    """CLIPScore, 2.5 * max(cos, 0): the scale of Custom Diffusion's "text alignment" (0.61 is a cosine of 0.245)."""
    return 2.5 * cosine.clamp(min=0)


def identity_similarity(generated: Tensor, reference: Tensor, detected: Tensor | None = None) -> tuple[float, float]:
    """Mean cosine with the un-normalised mean of the reference identities, and the share of failed detections.

    Args:
        generated: identity vectors (N,D); rows without a detected face are ignored.
        reference: (M,D), unit vectors of the reference photos.
        detected: (N,) bool, None = all. Images without a face are left out of the mean and counted in the share.
    Returns: (similarity, failed share in [0,1]); the similarity is nan if no face was detected at all.
    """
    detected = torch.ones(len(generated), dtype=torch.bool) if detected is None else detected
    failed = 1 - detected.double().mean().item()
    if not detected.any():
        return float("nan"), failed
    return cosines(generated[detected], reference.mean(0, keepdim=True)).mean().item(), failed


def prior_preservation(class_samples: Tensor, reference: Tensor) -> float:
    """PRES (DreamBooth, Table 3): DINO similarity of "a {class}" samples to the real subject; lower is better."""
    return image_similarity(class_samples, reference).mean().item()


def diversity(samples: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> float:
    """DIV (DreamBooth, Table 3): mean distance between the samples of one prompt; higher is better.

    Args:
        samples: (N,...), N >= 2: images for LPIPS, features for a feature distance.
        distance: (P,...), (P,...) -> (P,). The paper: LPIPS with AlexNet on [-1,1]; toy world: `cosine_distance`.
    """
    if len(samples) < 2:
        raise ValueError(f"diversity needs at least 2 samples of a prompt, got {len(samples)}")
    first, second = torch.triu_indices(len(samples), len(samples), offset=1)
    return distance(samples[first], samples[second]).double().mean().item()


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine, row by row: (P,D), (P,D) -> (P,)."""
    return 1 - F.cosine_similarity(a.double(), b.double(), dim=-1)


def feature_gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D,D) of features (N,D), float64, N >= 2."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs features (N,D) with N >= 2, got {tuple(features.shape)}")
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians: |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    The symmetric form of tr (AB)^1/2: real and stable also for singular covariances. Means (D,), covariances (D,D).
    """
    mean_a, cov_a, mean_b, cov_b = (x.double() for x in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def attributes_right(
    probabilities: Mapping[str, Tensor], labels: Mapping[str, Sequence[str]], expected: Mapping[str, str]
) -> dict[str, Tensor]:
    """Which images show what they should: attribute -> (B,) bool, the judge's most probable label is the expected one.

    Args:
        probabilities: attribute -> (B, number of labels).
        labels: attribute -> names of the labels.
        expected: attribute -> label; attributes that it leaves out are not scored.
    Raises: ValueError for an attribute or label that the judge does not know.
    """
    right = {}
    for attribute, label in expected.items():
        if attribute not in labels or attribute not in probabilities:
            raise ValueError(f"the judge reads no attribute '{attribute}'; it reads {sorted(labels)}")
        if label not in labels[attribute]:
            raise ValueError(f"'{label}' is no {attribute} that the judge knows; it knows {list(labels[attribute])}")
        right[attribute] = probabilities[attribute].argmax(-1) == list(labels[attribute]).index(label)
    return right


def attribute_accuracy(right: Mapping[str, Tensor]) -> Tensor:
    """Share of the expected attributes that each image shows, (B,) in [0,1]."""
    if not right:
        raise ValueError("no attribute is expected, so there is no accuracy")
    return torch.stack([hits.double() for hits in right.values()]).mean(0)

"""Every reduction against values derived by hand or by other means; bootstrap coverage on a known distribution."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from common.evaluation import metrics
from common.evaluation.bootstrap import Interval, bootstrap_mean, paired_difference
from common.evaluation.separation import auc, separation

ROOT_HALF = math.sqrt(0.5)


def test_image_similarity_is_the_mean_over_all_pairs_not_the_best_match():
    """By hand: (1,0) against (1,0), (0,1), (1,1) has cosines 1, 0, sqrt(1/2); (0,-2) has 0, -1, -sqrt(1/2)."""
    generated = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    reference = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    expected = torch.tensor([(1 + ROOT_HALF) / 3, (-1 - ROOT_HALF) / 3], dtype=torch.float64)
    torch.testing.assert_close(metrics.image_similarity(generated, reference), expected, rtol=0, atol=1e-12)


def test_image_similarity_equals_textual_inversions_evaluator():
    """clip_eval.py of rinongal/textual_inversion: (src_features @ gen_features.T).mean() of normalised features."""
    generator = torch.Generator().manual_seed(0)
    real, made = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (5, 64))
    real_unit, made_unit = (x / x.norm(dim=-1, keepdim=True) for x in (real, made))
    expected = (real_unit @ made_unit.T).mean()
    assert metrics.image_similarity(made, real).mean().item() == pytest.approx(expected.item(), abs=1e-12)


def test_split_half_never_pairs_an_image_with_itself():
    """Orthogonal images: any image paired with itself would raise the mean above 0. By hand for the second case."""
    assert metrics.split_half_similarity(torch.eye(4)) == 0
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])  # halves: rows 0 and 2, row 1
    assert metrics.split_half_similarity(rows) == pytest.approx(ROOT_HALF)
    with pytest.raises(ValueError, match="at least 2 reference images, got 1"):
        metrics.split_half_similarity(rows[:1])


def test_text_similarity_and_clip_score():
    """By hand; and Custom Diffusion's .6126 on the CLIPScore scale is a cosine of 0.245."""
    images = torch.tensor([[3.0, 4.0], [0.0, -1.0]])
    expected = torch.tensor([0.8, -1.0], dtype=torch.float64)
    torch.testing.assert_close(metrics.text_similarity(images, torch.tensor([0.0, 2.0])), expected)
    torch.testing.assert_close(metrics.clip_score(expected), torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert metrics.clip_score(torch.tensor(0.245)).item() == pytest.approx(0.6126, abs=1e-3)


def test_identity_leaves_out_undetected_faces_and_counts_them():
    """By hand: the mean reference is (1/2, 1/2); only the first two rows have a face."""
    generated = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]])
    detected = torch.tensor([True, True, False, False])
    similarity, failed = metrics.identity_similarity(generated, torch.eye(2), detected)
    assert (similarity, failed) == (pytest.approx((ROOT_HALF + 1) / 2), 0.5)
    similarity, failed = metrics.identity_similarity(generated, torch.eye(2), torch.zeros(4, dtype=torch.bool))
    assert math.isnan(similarity) and failed == 1
    assert metrics.identity_similarity(generated[:2], torch.eye(2))[1] == 0


def test_prior_preservation_and_diversity():
    """By hand: distances of (1,0), (0,1), (1,1) are 1, 1 - sqrt(1/2), 1 - sqrt(1/2)."""
    samples = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    expected = (3 - 2 * ROOT_HALF) / 3
    assert metrics.diversity(samples, metrics.cosine_distance) == pytest.approx(expected)
    assert metrics.prior_preservation(samples, samples[:1]) == pytest.approx((1 + 0 + ROOT_HALF) / 3)
    images = torch.zeros(3, 3, 2, 2)
    images[1] = 1.0
    assert metrics.diversity(images, lambda a, b: (a - b).abs().flatten(1).mean(1)) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least 2 samples"):
        metrics.diversity(samples[:1], metrics.cosine_distance)


def test_frechet_distance_of_diagonal_gaussians():
    """Closed form for independent dimensions: sum (m - n)^2 + (s - t)^2, also with a zero variance."""
    m, n = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    s, t = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 0.5, 1.5])
    distance = metrics.frechet_distance(m, torch.diag(s**2), n, torch.diag(t**2))
    assert distance == pytest.approx(((m - n) ** 2 + (s - t) ** 2).sum().item())
    assert metrics.frechet_distance(m, torch.diag(s**2), m, torch.diag(s**2)) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_equals_the_matrix_square_root_form():
    """Reference: scipy.linalg.sqrtm(A B), numpy's means and covariances."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 6)), rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    moments = [*metrics.feature_gaussian(torch.from_numpy(a)), *metrics.feature_gaussian(torch.from_numpy(b))]
    assert metrics.frechet_distance(*moments) == pytest.approx(expected, rel=1e-9)


def test_attribute_accuracy_scores_only_what_is_expected():
    labels = {"color": ["red", "blue"], "class": ["dog", "cat", "mug"], "style": ["photo", "sketch"]}
    probabilities = {
        "color": torch.tensor([[0.9, 0.1], [0.2, 0.8]]),
        "class": torch.tensor([[0.1, 0.5, 0.4], [0.2, 0.7, 0.1]]),
        "style": torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
    }
    right = metrics.attributes_right(probabilities, labels, {"color": "red", "class": "cat"})
    assert {name: hits.tolist() for name, hits in right.items()} == {"color": [True, False], "class": [True, True]}
    assert metrics.attribute_accuracy(right).tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match="no attribute 'mood'"):
        metrics.attributes_right(probabilities, labels, {"mood": "sad"})
    with pytest.raises(ValueError, match="'green' is no color"):
        metrics.attributes_right(probabilities, labels, {"color": "green"})


@pytest.mark.parametrize("bad", [torch.zeros(0, 4), torch.zeros(4)])
def test_features_of_a_wrong_shape_are_named(bad):
    with pytest.raises(ValueError, match=r"must be \(N,D\)"):
        metrics.image_similarity(torch.ones(2, 4), bad)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    """Normal data, n = 30, 200 trials: the percentile bootstrap is known to cover slightly less than 95%."""
    rng = np.random.default_rng(0)
    intervals = [bootstrap_mean(rng.normal(2.0, 1.0, 30), seed=trial) for trial in range(200)]
    covered = np.mean([interval.low <= 2.0 <= interval.high for interval in intervals])
    assert 0.89 <= covered <= 0.98
    width = np.mean([interval.high - interval.low for interval in intervals])
    assert width == pytest.approx(2 * 1.96 / math.sqrt(30), rel=0.1)  # of the normal approximation


def test_bootstrap_is_seeded_and_exact_where_it_can_be():
    """Two values a and b: means of resamples are a, (a+b)/2, b with chances 1/4, 1/2, 1/4: the interval is [a, b]."""
    assert bootstrap_mean([1.0, 3.0], seed=5) == Interval(2.0, 1.0, 3.0, 2)
    assert bootstrap_mean([4.0]) == Interval(4.0, 4.0, 4.0, 1)
    values = list(np.random.default_rng(1).normal(size=9))
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite value per subject"):
            bootstrap_mean(bad)


def test_paired_differences_use_the_pairing():
    """Subjects differ far more than methods, but every difference is 0.1, and so is every resample's mean."""
    first = {"a": 1.1, "b": 5.1, "c": 9.1}
    difference = paired_difference(first, {"c": 9.0, "a": 1.0, "b": 5.0})
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match=r"\['c', 'd'\]"):
        paired_difference(first, {"a": 1.0, "b": 5.0, "d": 0.0})


def test_auc_counts_pairs():
    """By hand: of the 6 pairs 4 are in order and 1 is a tie."""
    assert auc(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 1.5])) == pytest.approx(4.5 / 6)
    assert math.isnan(auc(torch.tensor([]), torch.tensor([1.0])))


def test_separation_sorts_pairs_into_kinds():
    """Subjects on axes; two of one class lean towards each other by 30 degrees."""
    half, high = 0.5, math.sqrt(0.75)
    features = {
        "dog1": torch.tensor([[1.0, 0.0, 0.0]] * 2),
        "dog2": torch.tensor([[half, high, 0.0]] * 2),
        "mug1": torch.tensor([[0.0, 0.0, 1.0]] * 3),
    }
    result = separation(features, {"dog1": "dog", "dog2": "dog", "mug1": "mug"})
    assert result.same_subject == pytest.approx(1)
    assert result.same_class == pytest.approx(0.5)
    assert result.other_class == pytest.approx(0)
    assert (result.auc_subject, result.auc_class) == (1.0, 1.0)

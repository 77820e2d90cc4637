"""Guidance rules by hand."""

import numpy as np
import pytest
import torch

from common.sampling.guidance import classifier_free, interval_limited, rescaled

UNCOND, COND = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_classifier_free_at_0_1_and_3():
    assert torch.equal(classifier_free(UNCOND, COND, 500, 0.0), UNCOND)
    torch.testing.assert_close(classifier_free(UNCOND, COND, 500, 1.0), COND)
    torch.testing.assert_close(classifier_free(UNCOND, COND, 500, 3.0), 3 * COND - 2 * UNCOND)


def test_rescaled_is_lin_et_al_eq_14_to_16():
    guided = UNCOND.numpy() + 5 * (COND - UNCOND).numpy()
    expected = np.empty_like(guided)
    for i in range(3):
        matched = guided[i] * COND[i].numpy().std(ddof=1) / guided[i].std(ddof=1)
        expected[i] = 0.3 * matched + 0.7 * guided[i]
    np.testing.assert_allclose(rescaled(0.3)(UNCOND, COND, 500, 5.0).numpy(), expected, rtol=1e-12)
    assert torch.equal(rescaled(0.0)(UNCOND, COND, 500, 5.0), classifier_free(UNCOND, COND, 500, 5.0))


@pytest.mark.parametrize(("timestep", "guided"), [(199, False), (200, True), (700, True), (701, False)])
def test_interval_includes_both_ends(timestep, guided):
    expected = classifier_free(UNCOND, COND, timestep, 4.0) if guided else COND
    assert torch.equal(interval_limited(200, 700)(UNCOND, COND, timestep, 4.0), expected)


def test_bad_values_raise():
    with pytest.raises(ValueError, match="guidance_rescale must be in"):
        rescaled(1.5)
    with pytest.raises(ValueError, match="from_timestep 700"):
        interval_limited(700, 200)

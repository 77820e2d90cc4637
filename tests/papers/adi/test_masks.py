"""The masks: hand-worked, against numpy, with planted channels; and the ablation with shuffled ones."""

import numpy as np
import pytest
import torch

SHARES = (0.2, 0.35, 0.6, 0.8, 1.0)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_masks_by_hand(paper):
    """One layer of five channels; |differences| to the other context 0 5 1 3 2, to the other action 4 0 1 3 2."""
    m = paper.method
    anchor = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0]])
    other_context = torch.tensor([[1.0, -4.0, 2.0, 4.0, -1.0]])
    other_action = torch.tensor([[5.0, 1.0, 0.0, -2.0, 3.0]])
    lowest, highest = [[1, 0, 1, 0, 0]], [[1, 0, 0, 1, 0]]  # two of five: beta = 0.4
    assert m.context_mask(anchor, other_context, 0.4).int().tolist() == lowest
    assert m.action_mask(anchor, other_action, 0.4).int().tolist() == highest

    def merged(rule):
        return m.identifier_masks(anchor, other_context, other_action, 0.4, rule).int().tolist()

    assert merged("union") == [[1, 0, 1, 1, 0]] and merged("intersection") == [[1, 0, 0, 0, 0]]
    assert merged("context") == lowest and merged("action") == highest


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("channels", (5, 32, 768, 1024))
def test_density_is_beta_within_one_channel(paper, share, channels):
    m = paper.method
    for mask in (m.context_mask, m.action_mask):
        found = mask(randn(2, 3, channels), randn(2, 3, channels, seed=1), share)
        assert found.shape == (2, 3, channels) and found.dtype == torch.bool
        assert ((found.double().mean(-1) - share).abs() <= 1 / channels).all()


def test_density_holds_where_differences_are_equal(paper):
    """Ties do not widen a mask, as a threshold would: all differences are 0 here."""
    same = randn(4, 10)
    assert (paper.method.context_mask(same, same, 0.6).sum(-1) == 6).all()
    assert (paper.method.action_mask(same, same, 0.6).sum(-1) == 6).all()


@pytest.mark.parametrize("share", SHARES)
def test_masks_are_those_of_sorted_differences(paper, share):
    """Reference: numpy's ranks within each layer."""
    anchor, other = randn(16, 64, seed=2), randn(16, 64, seed=3)
    ranks = np.abs(anchor.numpy() - other.numpy()).argsort(-1).argsort(-1)
    kept = round(share * 64)
    assert np.array_equal(paper.method.context_mask(anchor, other, share).numpy(), ranks < kept)
    assert np.array_equal(paper.method.action_mask(anchor, other, share).numpy(), ranks >= 64 - kept)


def test_planted_channels_are_found(paper):
    """Action channels: equal in both contexts, other in the other action. Context channels: the reverse."""
    generator = torch.Generator().manual_seed(4)
    is_action = torch.zeros(16, 50, dtype=torch.bool)
    for layer in range(16):
        is_action[layer, torch.randperm(50, generator=generator)[:20]] = True
    anchor = randn(16, 50, seed=5)
    change = 1 + randn(16, 50, seed=6).abs()
    other_context = torch.where(is_action, anchor + 0.01 * randn(16, 50, seed=7), anchor + change)
    other_action = torch.where(is_action, anchor - change, anchor + 0.01 * randn(16, 50, seed=8))
    for rule in paper.config.MERGES:
        found = paper.method.identifier_masks(anchor, other_context, other_action, 0.4, rule)
        assert torch.equal(found, is_action)


def test_layers_are_ranked_apart(paper):
    """Scales that differ by orders of magnitude between layers change no mask."""
    anchor, other_context, other_action = (randn(16, 32, seed=seed) for seed in range(3))
    scales = 10.0 ** torch.arange(-8.0, 8.0)[:, None]
    for rule in paper.config.MERGES:
        plain = paper.method.identifier_masks(anchor, other_context, other_action, 0.5, rule)
        scaled = paper.method.identifier_masks(
            anchor * scales, other_context * scales, other_action * scales, 0.5, rule
        )
        assert torch.equal(plain, scaled)
    assert plain.any(-1).all()  # no layer is left out


def test_a_scalar_can_carry_any_gradient(paper):
    parameter, gradient = torch.nn.Parameter(randn(4, 6)), randn(4, 6, seed=1)
    value = (parameter**2).mean()
    carried = paper.method.with_gradient(value, parameter, gradient)
    carried.backward()
    assert torch.equal(carried, value) and torch.equal(parameter.grad, gradient)


def test_shuffled_masks_keep_their_density(paper):
    masks = paper.method.context_mask(randn(3, 16, 64), randn(3, 16, 64, seed=1), 0.3)
    keys = torch.tensor([4, 5, 6])
    found = paper.variants.shuffled(masks, keys, seed=0)
    assert torch.equal(found.sum(-1), masks.sum(-1)) and not torch.equal(found, masks)
    assert torch.equal(found[1:2], paper.variants.shuffled(masks[1:2], keys[1:2], seed=0))  # of the key alone
    assert not torch.equal(found[0], found[1])
    overlap = (found & masks).double().mean()
    assert abs(overlap - 0.3**2) < 0.02  # as unrelated masks of that density

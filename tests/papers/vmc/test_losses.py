"""Differences of frames, Tweedie's formula for them, the forms of the loss."""

import pytest
import torch
import torch.nn.functional as F


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_residuals_are_differences_of_neighbours(paper):
    frames = randn(2, 3, 5, 4, 6)
    found = paper.method.frame_residuals(frames)
    assert found.shape == (2, 3, 4, 4, 6)
    for n in range(4):
        assert torch.equal(found[:, :, n], frames[:, :, n + 1] - frames[:, :, n])
    assert paper.method.frame_residuals(frames.half()).dtype == torch.float32


def test_aligning_noise_is_aligning_motion(paper, video_backbone):
    """Noisy clips by the backbone's own schedule; the estimate of the clean clip is Tweedie's, frame by frame."""
    clean, noise, noise_pred = (randn(1, 4, 6, 5, 7, seed=seed, dtype=torch.float64) for seed in range(3))
    residuals = paper.method.frame_residuals
    schedule = video_backbone.noise_scheduler.alphas_cumprod.double()
    for t in (1, 300, 900):
        alpha_bar = schedule[t]
        noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
        torch.testing.assert_close(  # diffusers keeps the schedule in float32
            video_backbone.add_noise(clean, noise, torch.tensor([t])), noisy, rtol=1e-5, atol=1e-5
        )
        motion = paper.method.denoised_residuals(residuals(noisy), residuals(noise_pred), alpha_bar)
        denoised = (noisy - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()
        torch.testing.assert_close(motion, denoised[:, :, 1:] - denoised[:, :, :-1])
        of_motion = (residuals(clean) - motion).square().sum()
        of_noise = (residuals(noise) - residuals(noise_pred)).square().sum()
        torch.testing.assert_close(of_motion, (1 - alpha_bar) / alpha_bar * of_noise, rtol=1e-9, atol=0)
        told = paper.method.denoised_residuals(residuals(noisy), residuals(noise), alpha_bar)
        torch.testing.assert_close(told, residuals(clean), rtol=1e-9, atol=1e-9)


def test_signed_loss_by_hand(paper):
    """Two channels, one pixel, three frames: noise goes (1,0) and (0,2), the prediction (3,0) and (4,-3)."""
    noise = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]]).T[None, :, :, None, None]  # (1,2,3,1,1)
    noise_pred = torch.tensor([[5.0, 1.0], [8.0, 1.0], [12.0, -2.0]]).T[None, :, :, None, None]
    found = paper.method.residual_cosine_loss(noise_pred, noise)
    torch.testing.assert_close(found, torch.tensor([1 - (1 + -0.6) / 2]))  # cosines 1 and -6 / (2 * 5)
    torch.testing.assert_close(paper.method.residual_l2_loss(noise_pred, noise), torch.tensor([(4 + 0 + 16 + 25) / 4]))
    # along the frames: channel 0 has |3|, |4| beside |1|, |0|; channel 1 |0|, |3| beside |0|, |2|
    absolute = paper.method.absolute_residual_loss(noise_pred, noise)
    torch.testing.assert_close(absolute, torch.tensor([1 - (0.6 + 1) / 2]))


def test_signed_loss_is_one_cosine_per_step(paper):
    """Against plain loops over clips and steps."""
    noise_pred, noise = randn(3, 4, 5, 6, 6), randn(3, 4, 5, 6, 6, seed=1)
    expected = []
    for b in range(3):
        cosines = []
        for n in range(4):
            x, y = ((clip[b, :, n + 1] - clip[b, :, n]).flatten() for clip in (noise_pred, noise))
            cosines.append((x @ y / (x.norm() * y.norm())).item())
        expected.append(1 - sum(cosines) / 4)
    torch.testing.assert_close(paper.method.residual_cosine_loss(noise_pred, noise), torch.tensor(expected))


def test_absolute_loss_has_the_official_values(paper):
    """HyeonHo99/Video-Motion-Customization 0d8779f, train_inference.py, train: its loss of each clip, seed 0."""
    generator = torch.Generator().manual_seed(0)
    noise_pred, noise = (torch.randn(2, 3, 8, 4, 6, generator=generator) for _ in range(2))
    found = paper.method.absolute_residual_loss(noise_pred, noise)
    torch.testing.assert_close(found, torch.tensor([0.3012728691, 0.2887111306]), rtol=1e-6, atol=0)


def test_only_the_signed_losses_know_the_direction(paper):
    noise = randn(2, 4, 5, 6, 6)
    backwards = -noise
    losses = {name: loss(backwards, noise) for name, loss in paper.method.LOSSES.items()}
    torch.testing.assert_close(losses["paper"], torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(losses["official"], torch.zeros(2), rtol=0, atol=1e-6)
    assert losses["l2"].min() > 4  # 4 times the variance of a difference, 2
    assert all(loss(noise, noise).abs().max() < 1e-6 for loss in paper.method.LOSSES.values())


@pytest.mark.parametrize("name", ["paper", "official", "l2"])
def test_clips_that_stand_still_have_a_gradient(paper, name):
    """A prediction whose frames are all alike: its differences are 0, and the cosine is divided by eps."""
    noise, still = randn(1, 4, 1, 3, 3), randn(1, 4, 1, 3, 3, seed=1).expand(-1, -1, 4, -1, -1).clone().requires_grad_()
    loss = paper.method.LOSSES[name](still, randn(1, 4, 4, 3, 3, seed=2) + noise)
    loss.sum().backward()
    assert loss.isfinite().all() and still.grad.isfinite().all()


def test_losses_of_half_precision_are_computed_in_float32(paper):
    noise_pred, noise = randn(1, 4, 5, 6, 6), randn(1, 4, 5, 6, 6, seed=1)
    for loss in paper.method.LOSSES.values():
        half = loss(noise_pred.half(), noise.half())
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, loss(noise_pred, noise), rtol=2e-3, atol=2e-3)


def test_a_constant_shift_of_all_frames_is_free(paper):
    """Appearance, what all frames share, is invisible to differences; to the denoising loss it is not."""
    noise_pred, noise = randn(1, 4, 5, 6, 6), randn(1, 4, 5, 6, 6, seed=1)
    shifted = noise_pred + randn(1, 4, 1, 6, 6, seed=2)
    for loss in paper.method.LOSSES.values():
        torch.testing.assert_close(loss(shifted, noise), loss(noise_pred, noise), rtol=1e-4, atol=1e-5)
    assert abs(F.mse_loss(shifted, noise) - F.mse_loss(noise_pred, noise)) > 0.1

"""Seeding, data order, noising, losses, optimiser step and averages against values worked out another way."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from linear_run import config
from torch import nn

from common.training import seeding
from common.training.data_order import StepSampler, dataset_index, micro_batches
from common.training.ema import averaged_weights, make_ema
from common.training.losses import (
    denoising_loss,
    fixed_noise_validation,
    masked_mse,
    min_snr_weights,
    per_sample_mse,
)
from common.training.method import Method
from common.training.noising import noise_batch, timesteps_between
from common.training.optimize import make_accelerator, make_train_state, optimizer_step


def scheduler(prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


def alpha_bar() -> np.ndarray:
    """Scaled-linear schedule of Stable Diffusion in float64."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


class TinyBackbone:
    """One convolution as the network; the schedule is the real one."""

    def __init__(self, prediction_type: str = "epsilon"):
        torch.manual_seed(0)
        self.noise_scheduler, self.net = scheduler(prediction_type), nn.Conv2d(4, 4, 3, padding=1)

    def add_noise(self, latents, noise, timesteps):
        return self.noise_scheduler.add_noise(latents, noise, timesteps)

    def training_target(self, latents, noise, timesteps):
        if self.noise_scheduler.config.prediction_type == "epsilon":
            return noise
        return self.noise_scheduler.get_velocity(latents, noise, timesteps)

    def predict(self, noisy_latents, timesteps, conditioning):
        return self.net(noisy_latents) + conditioning.shift


# ---- seeding and data order


def test_what_a_sample_draws_does_not_depend_on_its_batch():
    keys = seeding.keys_of_step(3, 8)
    assert keys.tolist() == list(range(24, 32))
    draws = [
        lambda k: seeding.seeded_randn(k, (4, 5, 5), seed=0),
        lambda k: seeding.seeded_uniform(k, (3,), seed=0),
        lambda k: seeding.seeded_uniform(k, seed=0),
        lambda k: seeding.seeded_timesteps(k, seed=0),
    ]
    for draw in draws:
        whole = draw(keys)
        assert torch.equal(torch.cat([draw(keys[:3]), draw(keys[3:])]), whole)
        assert torch.equal(draw(keys.flip(0)), whole.flip(0))


def test_draws_have_the_right_distribution_and_streams_are_apart():
    keys = torch.arange(4000)
    normal = seeding.seeded_randn(keys, (16,), seed=0)
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert abs(torch.corrcoef(torch.stack([normal[:-1, 0], normal[1:, 0]]))[0, 1]) < 0.06  # neighbours: 4 sigma
    timesteps = seeding.seeded_timesteps(keys, seed=0, low=100, high=300)
    assert timesteps.dtype == torch.int64 and timesteps.min() >= 100 and timesteps.max() == 299
    assert abs(timesteps.float().mean() - 199.5) < 4 * 200 / 12**0.5 / 4000**0.5
    others = [
        seeding.seeded_randn(keys[:2], (16,), seed=s, stream=n) for s, n in [(0, "noise"), (1, "noise"), (0, "b")]
    ]
    assert len({tuple(other.flatten().tolist()) for other in others}) == 3
    with pytest.raises(ValueError, match="low=3, high=3"):
        seeding.seeded_integers(keys, 3, 3, seed=0)


def test_each_epoch_shows_each_item_once_in_its_own_order():
    epochs = [[dataset_index(key, 7, seed=0) for key in range(7 * e, 7 * e + 7)] for e in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [dataset_index(key, 7, seed=1) for key in range(7)] != epochs[0]


@pytest.mark.parametrize(("num_processes", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_processes_and_micro_batches_together_make_up_each_step(num_processes, accumulation):
    settings = {"seed": 0, "batch_size": 8, "micro_batch_size": 8 // num_processes // accumulation}

    def keys(first_step):
        parts = [
            StepSampler(5, first_step=first_step, last_step=4, process_index=r, num_processes=num_processes, **settings)
            for r in range(num_processes)
        ]
        assert all(len(list(part)) == len(part) == (4 - first_step) * accumulation for part in parts)
        return sorted(key for part in parts for micro_batch in part for _, key in micro_batch)

    assert keys(0) == list(range(32))
    assert keys(3) == list(range(24, 32))  # resumed


def test_a_dataset_that_draws_at_random_gets_the_sample_key():
    class Drawing(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def sample(self, index, sample_key):
            return {"index": index, "flip": sample_key % 2}

    sampler = StepSampler(
        3, seed=0, first_step=1, last_step=2, batch_size=4, micro_batch_size=4, process_index=0, num_processes=1
    )
    (batch,) = micro_batches(Drawing(), sampler)
    assert batch["sample_keys"].tolist() == [4, 5, 6, 7] and batch["flip"].tolist() == [0, 1, 0, 1]
    assert batch["index"].tolist() == [dataset_index(key, 3, seed=0) for key in range(4, 8)]


# ---- noising and losses


def test_noise_batch_is_the_forward_process():
    keys, latents = torch.arange(5), torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    noised = noise_batch(TinyBackbone(), latents, keys, seed=3, timestep_sampler=timesteps_between(200, 210))
    assert set(noised["timesteps"].tolist()) <= set(range(200, 210))
    scale = torch.from_numpy(alpha_bar())[noised["timesteps"]].view(-1, 1, 1, 1)
    expected = scale.sqrt() * latents + (1 - scale).sqrt() * noised["noise"]
    torch.testing.assert_close(noised["noisy_latents"], expected.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(noised["target"], noised["noise"])
    velocity = noise_batch(TinyBackbone("v_prediction"), latents, keys, seed=3)
    scale = torch.from_numpy(alpha_bar())[velocity["timesteps"]].view(-1, 1, 1, 1)
    expected = scale.sqrt() * velocity["noise"] - (1 - scale).sqrt() * latents
    torch.testing.assert_close(velocity["target"], expected.float(), rtol=1e-5, atol=1e-5)
    part = noise_batch(TinyBackbone("v_prediction"), latents[2:], keys[2:], seed=3)
    assert torch.equal(part["noisy_latents"], velocity["noisy_latents"][2:])
    with pytest.raises(ValueError, match="3 keys for 5 latents"):
        noise_batch(TinyBackbone(), latents, keys[:3], seed=3)
    with pytest.raises(ValueError, match="high=1001"):
        noise_batch(TinyBackbone(), latents, keys, seed=3, timestep_sampler=timesteps_between(0, 1001))


def test_losses_are_one_value_per_sample():
    prediction, target = torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2)
    target[0, 0, 0, 0], target[1] = 4.0, 3.0
    assert per_sample_mse(prediction, target).tolist() == [16 / 16, 9.0]
    mask = torch.zeros(2, 1, 2, 2)
    mask[0, 0, 0, 0] = mask[1, 0, 1, 1] = 1.0
    assert masked_mse(prediction, target, mask).tolist() == [16 / 4, 9.0]  # over 4 channels of one place
    assert masked_mse(prediction, target, torch.ones_like(mask)).tolist() == [1.0, 9.0]
    larger = mask.repeat_interleave(4, 2).repeat_interleave(4, 3)  # (2, 1, 8, 8)
    assert masked_mse(prediction, target, larger).tolist() == [4.0, 9.0]
    with pytest.raises(ValueError, match="mask of sample 1"):
        masked_mse(prediction, target, mask * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))


def test_denoising_loss_and_fixed_noise_validation():
    backbone, latents = TinyBackbone(), torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    conditioning = SimpleNamespace(shift=0.5, batch_size=3)
    noised = noise_batch(backbone, latents, torch.arange(3), seed=0)
    losses = denoising_loss(backbone, noised, conditioning)
    errors = backbone.net(noised["noisy_latents"]) + 0.5 - noised["noise"]
    torch.testing.assert_close(losses, (errors**2).mean(dim=(1, 2, 3)))
    half = torch.zeros(3, 1, 6, 6)
    half[..., :3] = 1
    masked = denoising_loss(backbone, noised, conditioning, mask=half)
    torch.testing.assert_close(masked, (errors[..., :3] ** 2).mean(dim=(1, 2, 3)))
    first = fixed_noise_validation(backbone, latents, conditioning)
    torch.randn(100)
    assert first == fixed_noise_validation(backbone, latents, conditioning)
    assert first == fixed_noise_validation(backbone, latents, lambda t: conditioning)
    assert first != fixed_noise_validation(backbone, latents, conditioning, seed=1)
    with torch.no_grad():  # the exact noise predictor of pure noise: x = 0, so z_t = sqrt(1 - alpha_bar) * noise
        backbone.net.weight.zero_(), backbone.net.bias.zero_()
        for channel in range(4):
            backbone.net.weight[channel, channel, 1, 1] = 1 / math.sqrt(1 - alpha_bar()[500])
    exact = fixed_noise_validation(
        backbone, torch.zeros_like(latents), SimpleNamespace(shift=0.0, batch_size=3), timesteps=(500,)
    )
    assert exact == pytest.approx(0, abs=1e-8)


def test_min_snr_weights():
    timesteps = torch.tensor([0, 50, 200, 500, 999])
    snr = (alpha_bar() / (1 - alpha_bar()))[timesteps.numpy()]
    assert snr[0] > 5 > snr[-1]
    weights = min_snr_weights(scheduler(), timesteps)
    np.testing.assert_allclose(weights.numpy(), np.minimum(snr, 5) / snr, rtol=2e-3)
    weights = min_snr_weights(scheduler("v_prediction"), timesteps, gamma=2.0)
    np.testing.assert_allclose(weights.numpy(), np.minimum(snr, 2) / (snr + 1), rtol=2e-3)
    with pytest.raises(ValueError, match="'sample'"):
        min_snr_weights(scheduler("sample"), timesteps)


# ---- optimiser step, schedule, average


def test_optimizer_step_is_adamw_with_decay_clipping_and_warmup():
    """Two steps of AdamW (Loshchilov and Hutter, Alg. 2) by hand, in float64 arithmetic."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    settings = config(
        learning_rate=0.1,
        weight_decay=0.5,
        adam_betas=(0.8, 0.9),
        lr_schedule="constant_with_warmup",
        lr_warmup_steps=2,
    )
    state = make_train_state([parameter], settings)
    assert list(state.parameters) == ["0000"]
    accelerator = make_accelerator(torch.device("cpu"))
    x, m, v = np.array([1.0, -2.0]), 0.0, 0.0
    for step, gradient in enumerate([np.array([3.0, 4.0]), np.array([0.1, -0.2])], start=1):
        accelerator.backward((parameter * torch.tensor(gradient, dtype=torch.float32)).sum())
        norm = optimizer_step(accelerator, state, max_grad_norm=1.0)
        assert norm == pytest.approx(np.linalg.norm(gradient))
        gradient = gradient / max(1.0, np.linalg.norm(gradient))
        lr = 0.1 * (step - 1) / 2
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        x = x - lr * 0.5 * x - lr * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.9**step)) + 1e-8)
        np.testing.assert_allclose(parameter.detach().numpy(), x, rtol=1e-5)
        assert parameter.grad is None
    assert state.lr_scheduler.get_last_lr() == [pytest.approx(0.1)]
    with pytest.raises(RuntimeError, match="no trainable parameter received a gradient"):
        optimizer_step(accelerator, state)


def test_cosine_schedule():
    parameter = nn.Parameter(torch.ones(1))
    state = make_train_state([parameter], config(train_steps=10, learning_rate=2.0, lr_schedule="cosine"))
    accelerator = make_accelerator(torch.device("cpu"))
    for step in range(10):
        assert state.lr_scheduler.get_last_lr()[0] == pytest.approx(1 + math.cos(math.pi * step / 10))
        parameter.grad = torch.ones(1)
        optimizer_step(accelerator, state)


def test_average_by_hand_and_what_it_leaves_alone():
    parameter = nn.Parameter(torch.tensor([0.0]))
    ema, expected, seen = make_ema([parameter], decay=0.25), None, [1.0, 5.0, 2.0, 8.0]
    for n, value in enumerate(seen):
        parameter.data.fill_(value)
        ema.step([parameter])
        decay = min(0.25, (1 + n) / (10 + n))  # 2/11, 3/12, then 0.25
        expected = value if n == 0 else decay * expected + (1 - decay) * value
        assert ema.shadow_params[0].item() == pytest.approx(expected)
    with averaged_weights(ema, [parameter]):
        assert parameter.item() == pytest.approx(expected)
    assert parameter.item() == 8.0
    with pytest.raises(KeyError), averaged_weights(ema, [parameter]):
        raise KeyError
    assert parameter.item() == 8.0
    with averaged_weights(None, [parameter]):
        assert parameter.item() == 8.0


def test_names_must_differ():
    one, two = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="share a name"):
        make_train_state([{"params": [("a", one)]}, {"params": [("a", two)]}], config())


def test_any_class_with_the_five_verbs_is_a_method():
    verbs = ("parameters", "training_loss", "generate", "save", "load")
    assert isinstance(type("Plain", (), {verb: lambda self: None for verb in verbs})(), Method)
    assert not isinstance(type("Less", (), {verb: lambda self: None for verb in verbs[:-1]})(), Method)

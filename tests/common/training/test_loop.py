"""What `fit` computes, in one process."""

import json
import math
import os
import signal

import pytest
import torch
from linear_run import LinearConfig, LinearData, LinearMethod, config, values

from common.training.config import FitConfig
from common.training.data_order import dataset_index
from common.training.loop import fit
from common.training.optimize import TrainingDiverged


def train(folder, method=None, data=None, **settings):
    method = LinearMethod() if method is None else method
    return method, fit(method, LinearData() if data is None else data, config(**settings), folder)


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_plain_run_equals_the_textbook_loop(tmp_path):
    """Reference: torch's own AdamW and clipping in a loop over hand-made batches."""
    method, result = train(tmp_path / "run", train_steps=8, batch_size=5, max_grad_norm=0.5, weight_decay=0.1)
    reference, data = LinearMethod(), LinearData()
    parameters = [p for _, p in reference.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, foreach=False, fused=False)
    losses = []
    for step in range(8):
        keys = range(5 * step, 5 * step + 5)
        rows = [dataset_index(key, 10, seed=0) for key in keys]
        batch = {"x": data.x[rows], "y": data.y[rows], "sample_keys": torch.tensor(list(keys)), "step": step}
        loss = reference.training_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(values(method), values(reference), rtol=1e-5, atol=1e-6)


def test_accumulated_micro_batches_equal_one_big_batch(tmp_path):
    whole, big = train(tmp_path / "a", batch_size=8)
    parts, small = train(tmp_path / "b", batch_size=8, gradient_accumulation_steps=4)
    assert small.losses == pytest.approx(big.losses, rel=1e-5)
    torch.testing.assert_close(values(parts), values(whole), rtol=1e-4, atol=1e-6)


def test_data_workers_change_nothing(tmp_path):
    without, _ = train(tmp_path / "a", train_steps=5)
    with_workers, _ = train(tmp_path / "b", train_steps=5, num_workers=2)
    assert_equal(values(with_workers), values(without))


def test_validation_and_pictures_see_the_average_and_change_nothing(tmp_path):
    plain, result = train(tmp_path / "a", ema_decay=0.9, train_steps=12)
    method, seen = LinearMethod(LinearConfig()), []

    def validate():
        torch.manual_seed(123)  # even somebody who meddles with the generators does not change the run
        seen.append(values(method))
        return 0.25

    watched = fit(
        method, LinearData(), config(ema_decay=0.9, train_steps=12, validate_every=4, sample_every=6), tmp_path / "b",
        validate=validate, sample_grid=lambda: torch.zeros(6, 3, 8, 8),
    )  # fmt: skip
    assert watched.validation == {4: 0.25, 8: 0.25, 12: 0.25}
    assert watched.losses == result.losses
    assert_equal(values(method), values(plain))
    assert_equal(seen[-1], values(method))  # the average is what fit leaves behind
    assert sorted(p.name for p in (tmp_path / "b/samples").iterdir()) == ["step-00000006.png", "step-00000012.png"]
    assert list((tmp_path / "b/tensorboard").glob("events*"))


def test_dropout_is_drawn_anew_each_step_and_the_same_in_each_run(tmp_path):
    results = [train(tmp_path / name, LinearMethod(LinearConfig(dropout=0.5)))[1] for name in "ab"]
    assert results[0].losses == results[1].losses
    still = LinearMethod(LinearConfig(dropout=0.5, noise=0))
    _, one_item = train(tmp_path / "c", still, LinearData(1), learning_rate=1e-9)
    assert len(set(one_item.losses)) > 20


def test_log_has_mean_loss_speed_gradient_norm_and_rate(tmp_path):
    _, result = train(tmp_path / "run", train_steps=12, lr_schedule="linear", lr_warmup_steps=4)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert lines[1]["loss"] == pytest.approx(sum(result.losses[5:10]) / 5)
    assert lines[1]["lr"] == pytest.approx(0.01 * (12 - 10) / (12 - 4))  # decays to 0 over the steps after warm-up
    assert all(line["samples_per_second"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_bf16_trains_float32_parameters(tmp_path):
    method, result = train(tmp_path / "run", mixed_precision="bf16")
    exact = train(tmp_path / "exact")[1]  # another precision in the same Python process
    assert {p.dtype for p in values(method).values()} == {torch.float32}
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.losses[0] == pytest.approx(exact.losses[0], rel=0.02) and result.losses != exact.losses


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(tmp_path, bad):
    method, data = LinearMethod(), LinearData()

    def poison(step):
        if step == 7:
            data.y.fill_(bad)
            before.update(values(method))

    before, method.before_loss = {}, poison
    with pytest.raises(TrainingDiverged, match=f"step 9: the loss is {bad}.*step-00000006.*learning_rate"):
        train(tmp_path / "run", method, data, checkpoint_every=3)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()].count("step-00000006") == 1
    fresh = LinearMethod()
    fit(fresh, LinearData(), config(checkpoint_every=3), tmp_path / "run", resume=True)
    assert_equal(values(fresh), values(train(tmp_path / "b")[0]))


def test_a_gradient_that_is_not_finite_changes_no_parameter(tmp_path):
    method = LinearMethod()
    before = values(method)
    method.net[3].weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingDiverged, match=r"step 1: the gradient norm is nan \(not finite in 3.weight\)"):
        train(tmp_path / "run", method)
    assert_equal(values(method), before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_writes_a_checkpoint_and_says_how_to_resume(tmp_path, capfd, number):
    handler = signal.getsignal(number)
    method = LinearMethod(LinearConfig(dropout=0.3), lambda step: step == 11 and os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", method, ema_decay=0.9)
    assert stopped.value.code == 128 + number
    assert "stopped after step 12" in (message := capfd.readouterr().err) and "--resume" in message
    assert str(tmp_path / "run") in message
    assert signal.getsignal(number) is handler
    resumed = LinearMethod(LinearConfig(dropout=0.3))
    result = fit(resumed, LinearData(), config(ema_decay=0.9), tmp_path / "run", resume=True)
    whole, _ = train(tmp_path / "whole", LinearMethod(LinearConfig(dropout=0.3)), ema_decay=0.9)
    assert result.first_step == 12 and result.steps == 30
    assert_equal(values(resumed), values(whole))


def test_a_finished_run_can_be_reopened(tmp_path):
    method, _ = train(tmp_path / "run", ema_decay=0.9)
    again = LinearMethod()
    result = fit(again, LinearData(), config(ema_decay=0.9), tmp_path / "run", resume=True)
    assert (result.first_step, result.steps, result.losses) == (30, 30, [])
    assert_equal(values(again), values(method))


def test_parameter_groups_have_their_own_rates(tmp_path):
    method = LinearMethod()
    first, second = list(method.net[0].named_parameters()), list(method.net[3].named_parameters())
    second = [(f"last.{name}", parameter) for name, parameter in second]
    method.parameters = lambda: [{"params": first, "lr": 0.0}, {"params": second}]
    before = method.net[0].weight.detach().clone()
    fit(method, LinearData(), config(train_steps=5), tmp_path / "run")
    assert_equal(method.net[0].weight.detach(), before)
    assert not torch.equal(method.net[3].weight, LinearMethod().net[3].weight)


def test_what_cannot_be_trained_is_refused(tmp_path):
    half, frozen, empty = LinearMethod(), LinearMethod(), LinearMethod()
    half.net.to(torch.float16)
    frozen.net[0].weight.requires_grad_(False)
    empty.parameters = lambda: []
    for method, message in [(half, "0.weight is torch.float16; it must be float32"), (frozen, "requires_grad=False")]:
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", method)
    with pytest.raises(ValueError, match="no trainable parameters"):
        train(tmp_path / "run", empty)
    with pytest.raises(ValueError, match="dataset is empty"):
        train(tmp_path / "run", data=LinearData(0))
    vector = LinearMethod()
    vector.training_loss = lambda batch: vector.net(batch["x"]).mean(1)
    with pytest.raises(ValueError, match=r"must return a scalar, got shape \(4,\)"):
        train(tmp_path / "vector", vector)
    with pytest.raises(ValueError, match="fp16.*needs a GPU"):
        train(tmp_path / "run", mixed_precision="fp16")
    with pytest.raises(ValueError, match="has none"):
        train(tmp_path / "run", gradient_checkpointing=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [{"train_steps": 0}, {"learning_rate": math.nan}, {"learning_rate": 0.0}, {"batch_size": 0}, {"ema_decay": 1.0},
     {"weight_decay": -1.0}, {"max_grad_norm": 0.0}, {"checkpoint_every": -1}, {"keep_checkpoints": 0}],
)  # fmt: skip
def test_bad_settings_are_named(settings):
    (name, value), = settings.items()  # fmt: skip
    with pytest.raises(ValueError, match=f"{name} must .*{value}"):
        config(**settings)


def test_batch_size_must_divide():
    with pytest.raises(ValueError, match="batch_size=6.*multiple of 2 processes x 2"):
        FitConfig(train_steps=1, learning_rate=1.0, batch_size=6, gradient_accumulation_steps=2).micro_batch_size(2)


def test_overhead_of_a_step_is_small(tmp_path):
    """The loop adds less than 2 ms to loss and backward; ten times that is allowed here, for busy machines."""
    _, result = train(tmp_path / "run", train_steps=200, log_every=10, ema_decay=0.99)
    assert result.seconds / 200 < 0.02

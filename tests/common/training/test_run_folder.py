"""Run folders, checkpoints and full disks."""

import json
import resource
import shutil

import pytest
import torch
from linear_run import LinearData, LinearMethod, config, values

from common.training.checkpoint import CheckpointError, checkpoint_folders, load_latest_checkpoint, save_checkpoint
from common.training.config import config_differences, flat_config
from common.training.loop import fit
from common.training.optimize import TrainState, make_accelerator, make_train_state, optimizer_step
from common.training.run_folder import RunFolderError, open_run_folder


def trained_state(steps: int = 3, **settings) -> TrainState:
    method = LinearMethod()
    state = make_train_state(method.parameters(), config(ema_decay=0.5, **settings))
    accelerator, data = make_accelerator(torch.device("cpu")), LinearData()
    for step in range(steps):
        batch = {"x": data.x, "y": data.y, "sample_keys": torch.arange(10), "step": step}
        accelerator.backward(method.training_loss(batch))
        optimizer_step(accelerator, state)
    return state


def test_a_folder_with_files_needs_resume_and_only_a_run_resumes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match="is not empty.*thesis.tex.*--resume"):
        open_run_folder(tmp_path / "a", config={})
    with pytest.raises(RunFolderError, match="holds files, but no run"):
        open_run_folder(tmp_path / "a", resume=True, config={})
    assert (tmp_path / "a/thesis.tex").read_text() == "precious"
    with pytest.raises(RunFolderError, match="is a file"):
        open_run_folder(tmp_path / "a/thesis.tex", config={})
    open_run_folder(tmp_path / "new/deep", resume=True, config={}).close()  # killed before it wrote anything
    open_run_folder(tmp_path / "new/deep", resume=True, config={}).close()


def test_the_folder_is_locked_while_it_is_open(tmp_path):
    with open_run_folder(tmp_path, config={}):
        with pytest.raises(RunFolderError, match="in use by another run .pid"):
            open_run_folder(tmp_path, resume=True, config={})
    open_run_folder(tmp_path, resume=True, config={}).close()


def test_resuming_with_other_settings_names_the_fields(tmp_path):
    fit(LinearMethod(), LinearData(), config(train_steps=4), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(RunFolderError) as refused:
        other = config(train_steps=4, learning_rate=0.02, batch_size=2, log_every=1)
        fit(LinearMethod(), LinearData(9), other, tmp_path, resume=True)
    message = str(refused.value)
    assert "fit.learning_rate: 0.01 -> 0.02" in message and "fit.batch_size: 4 -> 2" in message
    assert "dataset.length: 10 -> 9" in message and "log_every" not in message
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(RunFolderError, match="is not empty"):
        fit(LinearMethod(), LinearData(), config(train_steps=4), tmp_path)


def test_a_run_may_be_prolonged_if_its_rate_does_not_depend_on_its_length(tmp_path):
    fit(LinearMethod(), LinearData(), config(train_steps=12), tmp_path / "a")
    longer, whole = LinearMethod(), LinearMethod()
    fit(longer, LinearData(), config(), tmp_path / "a", resume=True)
    fit(whole, LinearData(), config(), tmp_path / "b")
    torch.testing.assert_close(values(longer), values(whole), rtol=0, atol=0)
    fit(LinearMethod(), LinearData(), config(train_steps=4, lr_schedule="cosine"), tmp_path / "c")
    with pytest.raises(RunFolderError, match="fit.train_steps: 4 -> 8"):
        fit(LinearMethod(), LinearData(), config(train_steps=8, lr_schedule="cosine"), tmp_path / "c", resume=True)


def test_flat_config_is_json_and_names_functions(tmp_path):
    flat = flat_config(fit=config(), method={"sampler": torch.nn.Linear, "layers": (1, 2), "path": tmp_path})
    assert json.loads(json.dumps(flat)) == flat
    assert flat["fit.adam_betas"] == [0.9, 0.999]
    assert flat["method.sampler"] == "torch.nn.modules.linear.Linear" and flat["method.layers"] == [1, 2]
    assert config_differences(flat, flat) == []
    assert config_differences({"method.a": 1}, {}) == ["method.a: 1 -> '(absent)'"]


def test_a_checkpoint_restores_everything_and_old_ones_go(tmp_path):
    state = trained_state()
    for step in (3, 20, 100):
        save_checkpoint(tmp_path, step, {"method": state}, keep=2)
    assert [p.name for p in checkpoint_folders(tmp_path)] == ["step-00000020", "step-00000100"]
    fresh = make_train_state(LinearMethod().parameters(), config(ema_decay=0.5))
    assert load_latest_checkpoint(tmp_path, {"method": fresh}) == 100
    torch.testing.assert_close(fresh.parameters, state.parameters, rtol=0, atol=0)
    assert fresh.optimizer.state_dict()["param_groups"] == state.optimizer.state_dict()["param_groups"]
    saved, loaded = state.optimizer.state_dict()["state"], fresh.optimizer.state_dict()["state"]
    assert saved.keys() == loaded.keys() and set(saved[0]) == {"step", "exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
    torch.testing.assert_close(fresh.ema.shadow_params, state.ema.shadow_params, rtol=0, atol=0)
    assert fresh.ema.optimization_step == 3 and fresh.lr_scheduler.last_epoch == 3


def test_without_a_checkpoint_nothing_changes(tmp_path):
    state = trained_state()
    before = {name: p.detach().clone() for name, p in state.parameters.items()}
    assert load_latest_checkpoint(tmp_path, {"method": state}) == 0
    torch.testing.assert_close({n: p.detach() for n, p in state.parameters.items()}, before, rtol=0, atol=0)


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path):
    folder = save_checkpoint(tmp_path, 5, {"method": trained_state()})
    other = torch.nn.Linear(2, 2)
    foreign = make_train_state(list(other.named_parameters()), config(ema_decay=0.5))
    with pytest.raises(CheckpointError, match=r"other parameters.*0.weight: \(24, 6\) -> absent"):
        load_latest_checkpoint(tmp_path, {"method": foreign})
    file = folder / "method.optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="step-00000005.*method.optimizer.safetensors.*truncated.*Remove"):
        load_latest_checkpoint(tmp_path, {"method": trained_state(0)})


def test_a_disk_that_refuses_to_write_stops_the_run_and_keeps_the_good_checkpoint(tmp_path):
    """A file size limit of the kernel stands in for the full disk: the write itself fails, in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def shrink_disk(step):
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # bytes: parameters fit, optimiser state does not

    try:
        with pytest.raises(OSError, match="checkpoint of step 9.*File too large.*step-00000006.*Make room and resume"):
            fit(
                LinearMethod(None, shrink_disk), LinearData(), config(checkpoint_every=3, log_every=100), tmp_path / "a"
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in (tmp_path / "a/checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    resumed, whole = LinearMethod(), LinearMethod()
    assert (
        fit(resumed, LinearData(), config(checkpoint_every=3, log_every=100), tmp_path / "a", resume=True).first_step
        == 6
    )
    fit(whole, LinearData(), config(), tmp_path / "b")
    torch.testing.assert_close(values(resumed), values(whole), rtol=0, atol=0)


def test_a_disk_that_refuses_the_log_stops_the_run_with_a_clear_error(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def shrink_disk(step):
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

    try:
        with pytest.raises(OSError, match="cannot write the log of step 8 .*File too large.*Make room and resume"):
            fit(LinearMethod(None, shrink_disk), LinearData(), config(checkpoint_every=3, log_every=1), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fit(LinearMethod(), LinearData(), config(checkpoint_every=3), tmp_path, resume=True).first_step == 6
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 10, 15, 20, 25, 30]


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path):
    fit(LinearMethod(), LinearData(), config(), tmp_path)
    half = tmp_path / "checkpoints/.step-00000040.99.tmp"
    shutil.copytree(tmp_path / "checkpoints/step-00000030", half)
    (tmp_path / ".run.json.99.tmp").write_text("{")
    fit(LinearMethod(), LinearData(), config(), tmp_path, resume=True)
    assert not list(tmp_path.rglob("*.tmp"))

"""Files are whole or absent."""

import errno
import os

import pytest
import torch

from common import io
from common.io import atomic_save_safetensors, atomic_write_bytes, atomic_write_text, load_safetensors


def test_text_and_bytes_are_written_and_replaced(tmp_path):
    path = tmp_path / "new" / "näme.txt"
    atomic_write_text(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["näme.txt"]


def test_safetensors_keep_tensors_and_metadata_exactly(tmp_path):
    table = torch.randn(6, 3)
    tensors = {
        "half": torch.randn(2, 3).half(),
        "whole": torch.arange(4),
        "scalar": torch.tensor(3.0),
        "transposed": table.T,
        "rows": table[2:4],  # shares memory with the one above
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    atomic_save_safetensors(tensors, tmp_path / "a.safetensors", {"slug": "x"})
    loaded, metadata = load_safetensors(tmp_path / "a.safetensors")
    assert metadata == {"slug": "x"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.detach())
    atomic_save_safetensors({"a": table}, tmp_path / "b.safetensors")
    assert load_safetensors(tmp_path / "b.safetensors")[1] == {}
    with pytest.raises(TypeError, match="step"):
        atomic_save_safetensors(tensors, tmp_path / "a.safetensors", {"step": 3})


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_failure_at_any_stage_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, stage):
    path = tmp_path / "a.safetensors"
    atomic_save_safetensors({"a": torch.ones(3)}, path)
    before = path.read_bytes()

    def full(*_, **__):
        if stage == "write":  # the text in which safetensors reports the system's error
            raise io.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*{"write": (io, "save_file"), "fsync": (os, "fsync"), "replace": (os, "replace")}[stage], full)
    with pytest.raises(OSError, match="cannot write .*a.safetensors: No space left") as caught:
        atomic_save_safetensors({"a": torch.zeros(3)}, path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="a.safetensors"):
        load_safetensors(path)
    atomic_save_safetensors({"a": torch.ones(100)}, path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:5], b"", b"x" * 500):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a.safetensors \({len(damaged)} bytes\) is truncated or not"):
            load_safetensors(path)

"""Files that are either whole or absent: every write goes to a temporary neighbour, is synced, and then renamed."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`; a kill or a full disk at any moment leaves the old file or none, never half a file."""
    with _temporary_neighbour(Path(path)) as temporary:
        with open(temporary, "wb") as file:
            file.write(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, as atomically as `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_save_safetensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and a text header to one safetensors file, atomically.

    Args:
        tensors: name -> tensor of any shape, dtype and device; tensors that share memory are stored separately.
        path: the file; its folder is created.
        metadata: string keys and string values for the header.
    Raises: TypeError for a metadata value that is not a string; OSError naming the file when the disk refuses.
    """
    not_text = [key for key, value in (metadata or {}).items() if not isinstance(value, str)]
    if not_text:
        raise TypeError(f"safetensors metadata must be strings; not so for {not_text} (use json.dumps)")
    with _temporary_neighbour(Path(path)) as temporary:
        try:
            save_file(_separate_cpu_tensors(tensors), temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # carries the system's error only as text
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def load_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: (tensors on the CPU, metadata).

    Raises: FileNotFoundError, or ValueError naming the file if it is truncated or not a safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such safetensors file", str(path))
    try:
        with safe_open(path, framework="pt") as file:
            # clones, because what safe_open hands out may still be mapped to the file
            return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file ({error}); "
            "delete it and write or download it again"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder (files created, renamed or removed) survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _temporary_neighbour(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; sync and rename it on success, remove it on any failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _separate_cpu_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen, separate = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate

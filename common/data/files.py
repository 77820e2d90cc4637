"""Folders and the files in them, in an order that no file system or locale changes."""

import os
import unicodedata
from pathlib import Path

_SYSTEM_FILES = {"thumbs.db", "desktop.ini"}  # and every name that starts with a dot


def existing_folder(path: str | Path) -> Path:
    """The path. Raises: NotADirectoryError or FileNotFoundError naming it."""
    path = Path(path)
    if path.is_file():
        raise NotADirectoryError(f"{str(path)!r} is a file; pass the folder that holds it")
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path)!r}")
    return path


def list_files(root: Path) -> list[Path]:
    """All files below a folder that are not hidden, sorted by their path in it."""
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            Path(folder, name) for name in names if not name.startswith(".") and name.lower() not in _SYSTEM_FILES
        ]
    return sorted(found, key=lambda path: (name_key(path.relative_to(root)), str(path)))


def _raise(error: OSError) -> None:
    raise error


def name_key(path: Path) -> str:
    """A path as it compares: composed Unicode (macOS stores names decomposed), forward slashes."""
    return unicodedata.normalize("NFC", path.as_posix())

"""Captions of pictures: NAME.txt beside NAME.jpg, or a table for the whole folder."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.data.files import name_key

CAPTION_TABLES = ("metadata.jsonl", "captions.json")


def read_captions(folder: Path, root: Path, paths: Sequence[Path]) -> list[str] | None:
    """One caption for each picture, or None where there is no caption at all.

    Args:
        folder: holds the caption files, laid out as the pictures in root are.
        root: folder of the pictures.
        paths: the pictures, inside root. NAME.txt goes before the tables.
    Raises: ValueError naming the pictures without caption if only some have one, or the file that cannot be read.
    """
    table: dict[str, str] = {}
    for name in CAPTION_TABLES:
        if (folder / name).is_file():
            table.update(_read_table(folder / name))
    relative = [path.relative_to(root) for path in paths]
    captions = []
    for path in relative:
        text = folder / path.with_suffix(".txt")
        captions.append(_read_text(text).strip() if text.is_file() else table.get(name_key(path)))
    if all(caption is None for caption in captions):
        if table:
            raise ValueError(
                f"the captions in {str(folder)!r} are of {_some(table)}, "
                f"but the pictures are {_some(map(name_key, relative))}"
            )
        return None
    without = [str(path) for path, caption in zip(relative, captions, strict=True) if not caption]
    if without:
        raise ValueError(
            f"{len(without)} of {len(captions)} pictures in {str(root)!r} have no caption: {_some(without)}; "
            "write NAME.txt for each, or remove all captions"
        )
    return captions


def _read_table(path: Path) -> dict[str, str]:
    """metadata.jsonl: {"file_name": ..., "text" or "caption": ...} a line. captions.json: {file name: caption}."""
    try:
        if path.suffix == ".json":
            table = json.loads(_read_text(path))
            pairs = list(table.items())
        else:
            rows = [json.loads(line) for line in _read_text(path).split("\n") if line.strip()]
            pairs = [(row["file_name"], row["text"] if "text" in row else row["caption"]) for row in rows]
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not a caption table ({type(error).__name__}: {error}); expected "
            '{"file_name": "a.jpg", "text": "..."} on each line of metadata.jsonl, {"a.jpg": "..."} in captions.json'
        ) from error
    if not all(isinstance(name, str) and isinstance(caption, str) for name, caption in pairs):
        raise ValueError(f"{str(path)!r}: every file name and caption must be a string")
    return {name_key(Path(name)): caption.strip() for name, caption in pairs}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 ({error}); save it as UTF-8") from error


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(repr(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

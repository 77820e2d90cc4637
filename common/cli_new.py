"""`pcs new`: a copy of a paper's folder, tests and notebook under a new name, to start a new method from.

Python files are copied untouched: imports inside a folder are relative and the slug is the folder's name. In the card
and the notebook, paths and commands that name the old slug are made to name the new one.
"""

import keyword
import os
import re
import shutil
import tempfile
from pathlib import Path

from common import papers_index
from common.papers_index import find_paper, list_slugs

TEXT_SUFFIXES = {".md", ".ipynb"}


def copy_paper(name: str, source: str, repository: Path) -> list[Path]:
    """Copy papers/SOURCE, tests/papers/SOURCE and notebooks/SOURCE.ipynb (where there are such) to a new slug.

    Either everything is there in the end or nothing is: copies are made in a temporary folder and then renamed.

    Returns: the new paths, the paper's folder first.
    Raises: ValueError for a bad name, an unknown source, or a source whose Python files name themselves by their slug;
        FileExistsError if any new path exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"'{name}' cannot be a slug: use lower-case letters, digits and _, a letter first")
    find_paper(source, repository / "papers")
    moves = [(old, new) for old, new in zip(_paths(source), _paths(name), strict=True) if (repository / old).exists()]
    for _, new in moves:
        if (repository / new).exists():
            taken = ", ".join(list_slugs(repository / "papers"))
            raise FileExistsError(f"{new} exists already; choose a name other than {taken}")

    with tempfile.TemporaryDirectory(prefix=".new-", dir=repository) as temporary:
        for old, _ in moves:
            staged = Path(temporary) / old
            _copy(repository / old, staged)
            for path in [staged] if staged.is_file() else sorted(staged.rglob("*")):
                _rename_inside(path, source, name)
        return _move_all([(Path(temporary) / old, repository / new) for old, new in moves])


def print_new_paper(name: str, source: str) -> int:
    """Copy a paper and say what to do next."""
    for path in copy_paper(name, source, papers_index.REPOSITORY):
        print(f"made {path.relative_to(papers_index.REPOSITORY)}")
    print(f"next: write the idea into papers/{name}/method.py, then\n  pcs train {name} --help\n  pcs reproduce {name}")
    return 0


def _paths(slug: str) -> list[Path]:
    return [Path("papers", slug), Path("tests", "papers", slug), Path("notebooks", f"{slug}.ipynb")]


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _rename_inside(path: Path, source: str, name: str) -> None:
    """Make paths and commands in a card or notebook name the new slug; refuse Python that names the old one."""
    if path.suffix == ".py":
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if re.search(rf"^\s*(from|import)\s+papers\.{source}\b", line):
                raise ValueError(f"{path.name} of {source}, line {number}, imports 'papers.{source}'; make it relative")
    elif path.suffix in TEXT_SUFFIXES:
        text = path.read_text(encoding="utf-8")
        named = rf"(papers[./]|notebooks/|PAPER=|pcs (?:train|reproduce|show) |--from ){source}\b"
        path.write_text(re.sub(named, rf"\g<1>{name}", text), encoding="utf-8")


def _move_all(moves: list[tuple[Path, Path]]) -> list[Path]:
    """Rename every pair, or undo those done and raise."""
    done: list[Path] = []
    try:
        for staged, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(staged, target)
            done.append(target)
    except OSError:
        for target in done:
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        raise
    return done

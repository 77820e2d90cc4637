"""Promises of the repository as a whole: sizes, versions, import rules, complete paper folders, README."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from common.doctor import LOCKS, normalised, read_lock
from common.papers_index import (
    BEGIN_MARKER,
    PAPER_FILES,
    PAPERS,
    REPOSITORY,
    list_slugs,
    markdown_table,
    read_papers,
    replace_table,
)

MAX_FILE_BYTES = 16 * 2**20
TEXT_SUFFIXES = {".py", ".md", ".json", ".ipynb", ".toml", ".yml", ".lock", ".html", ".j2", ".txt", ".cfg", ""}


def tracked_files() -> list[Path]:
    """Files that git has or would take; needs a git checkout."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode()
    return [path for name in listed.split("\0") if name and (path := REPOSITORY / name).is_file()]


def environment_pins() -> dict[str, str]:
    """Package -> exact version in environment.yml."""
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text(encoding="utf-8"))
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    return {normalised(name): version for name, _, version in (line.partition("==") for line in pip) if version}


def run_import_linter(folder: Path) -> subprocess.CompletedProcess:
    linter = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([linter, "--no-cache"], cwd=folder, capture_output=True, text=True)


def test_environment_and_lock_agree():
    lock, environment = read_lock(), environment_pins()
    both = lock.keys() & environment.keys()
    assert {"torch", "diffusers", "transformers", "accelerate", "peft", "decord", "jupyterlab"} <= both
    assert {name: environment[name] for name in both} == {name: lock[name] for name in both}
    assert "nerfstudio" in both
    assert "threestudio @ git+" in (REPOSITORY / "environment.yml").read_text(encoding="utf-8")


def test_lock_is_exact_and_has_no_torchvision():
    lines = [line for path in LOCKS for line in path.read_text(encoding="utf-8").splitlines()]
    bad = [line for line in lines if not re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)]
    assert bad == []  # no ranges, addresses, options, editable lines or local versions such as +cpu
    assert "torchvision" not in read_lock()


def test_lock_covers_every_dependency():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = {normalised(re.match(r"[A-Za-z0-9._-]+", line)[0]) for group in groups for line in group}
    assert asked - read_lock().keys() == set()


def test_files_are_small():
    large = {path.name: path.stat().st_size for path in tracked_files() if path.stat().st_size > MAX_FILE_BYTES}
    assert large == {}


def test_no_file_names_somebodys_machine():
    home = re.compile(r"/(?:home|Users|root|work|tmp/[a-z_]+)/[A-Za-z0-9_.-]+/")
    named = [
        f"{path.relative_to(REPOSITORY)}: {found[0]}"
        for path in tracked_files()
        if path.suffix in TEXT_SUFFIXES and (found := home.search(path.read_text(encoding="utf-8", errors="ignore")))
    ]
    assert named == []


def test_import_rules_hold():
    result = run_import_linter(REPOSITORY)
    assert result.returncode == 0, result.stdout


def test_import_rules_catch_papers_added_later(tmp_path):
    """Two new papers and nothing edited: the contracts of pyproject.toml must see both kinds of breach."""
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    modules = {
        "common/bad.py": "import papers.first.method\n",
        "papers/first/method.py": "",
        "papers/second/method.py": "from ..first import method\n",
    }
    for name, text in modules.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in ("common", "papers", "papers/first", "papers/second"):
        (tmp_path / folder / "__init__.py").touch()
    output = run_import_linter(tmp_path).stdout
    assert "common.bad -> papers.first.method" in output
    assert "papers.second is not allowed to import papers.first" in output


def test_every_python_folder_is_a_package():
    """import-linter and the installed package see only folders with __init__.py."""
    folders = {path.parent for root in ("common", "papers") for path in (REPOSITORY / root).rglob("*.py")}
    without = [str(path.relative_to(REPOSITORY)) for path in folders if not (path / "__init__.py").exists()]
    assert sorted(without) == []


@pytest.mark.parametrize("slug", list_slugs(PAPERS))
def test_paper_folder_is_complete(slug):
    wanted = {*PAPER_FILES, "__init__.py", "results.json"}
    assert wanted - {path.name for path in (PAPERS / slug).iterdir()} == set()
    assert (REPOSITORY / "tests" / "papers" / slug).is_dir()
    assert (REPOSITORY / "notebooks" / f"{slug}.ipynb").is_file()


def test_readme_table_is_up_to_date():
    page = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    if BEGIN_MARKER not in page:
        pytest.skip("README.md has no table of papers")
    renewed = replace_table(page, markdown_table(read_papers(PAPERS)))
    assert page == renewed, "run: python -m common.papers_index --write README.md"

"""What papers the repository has, read from their folders: no list to keep, and no import of torch or of a paper.

`python -m common.papers_index --write README.md` renews the table between the markers of a page.
"""

import argparse
import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAPERS = REPOSITORY / "papers"
PAPER_FILES = ("README.md", "method.py", "config.py", "train.py", "reproduce.py")
BEGIN_MARKER, END_MARKER = "<!-- papers:begin -->", "<!-- papers:end -->"


@dataclass(frozen=True)
class Paper:
    """One folder under papers/, as `pcs list` shows it."""

    slug: str  # the folder's name
    title: str  # the card's first heading; the slug while there is no card
    task: str  # the card's line "Task: ..."; empty if it has none
    claims_held: int  # measured claims whose verdict is "yes"
    claims_measured: int  # all claims of results.json but those "not run"

    @property
    def claims(self) -> str:
        """Held and measured claims as "5/6", or "-" before the first reproduction."""
        return f"{self.claims_held}/{self.claims_measured}" if self.claims_measured else "-"


def list_slugs(papers: Path) -> list[str]:
    """Names of the folders that hold Python files, sorted; a name that starts with "_" or "." is not a paper."""
    return sorted(
        folder.name
        for folder in papers.iterdir()
        if folder.is_dir() and folder.name.isidentifier() and folder.name[0] != "_" and any(folder.glob("*.py"))
    )


def find_paper(slug: str, papers: Path) -> Path:
    """The folder of a paper.

    Raises: ValueError naming the closest slugs if there is no such paper.
    """
    slugs = list_slugs(papers)
    if slug in slugs:
        return papers / slug
    near = difflib.get_close_matches(slug.lower().replace("-", "_"), slugs, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`pcs list` names all papers"
    raise ValueError(f"there is no paper '{slug}'; {hint}")


def read_paper(slug: str, papers: Path) -> Paper:
    """Read a paper's card and results. Raises: ValueError naming a results.json that is not what reproduce writes."""
    folder = find_paper(slug, papers)
    card_path = folder / "README.md"
    card = card_path.read_text(encoding="utf-8") if card_path.is_file() else ""
    title = re.search(r"^# +(.+?) *$", card, re.MULTILINE)
    task = re.search(r"^\W*Task\W*:\W* *(.+?)[ .*]*$", card, re.MULTILINE)
    verdicts = _read_verdicts(folder / "results.json")
    measured = [verdict for verdict in verdicts if verdict != "not run"]
    return Paper(
        slug=slug,
        title=title[1] if title else slug,
        task=task[1] if task else "",
        claims_held=sum(verdict == "yes" for verdict in measured),
        claims_measured=len(measured),
    )


def read_papers(papers: Path) -> list[Paper]:
    """All papers, sorted by slug."""
    return [read_paper(slug, papers) for slug in list_slugs(papers)]


def markdown_table(papers: list[Paper]) -> str:
    """The README's table of papers: linked title, task, claims that hold of those measured, command."""
    rows = ["| paper | task | claims that hold | command |", "|---|---|---|---|"]
    for paper in papers:
        title = paper.title.replace("|", "\\|")
        command = f"`make reproduce PAPER={paper.slug}`"
        rows.append(f"| [{title}](papers/{paper.slug}/README.md) | {paper.task} | {paper.claims} | {command} |")
    return "\n".join(rows)


def replace_table(page: str, table: str) -> str:
    """The page with the text between its markers replaced by the table.

    Raises: ValueError unless the page has each marker once, in order.
    """
    begin, end = page.find(BEGIN_MARKER), page.find(END_MARKER)
    if page.count(BEGIN_MARKER) != 1 or page.count(END_MARKER) != 1 or end < begin:
        raise ValueError(f"the page needs one line {BEGIN_MARKER} and, below it, one line {END_MARKER}")
    return f"{page[: begin + len(BEGIN_MARKER)]}\n{table}\n{page[end:]}"


def _read_verdicts(path: Path) -> list[str]:
    """The "holds" entry of every claim of a results.json: yes, no, direction only, or not run."""
    if not path.is_file():
        return []
    try:
        return [str(claim["holds"]) for claim in json.loads(path.read_text(encoding="utf-8"))["claims"]]
    except (ValueError, KeyError, TypeError) as error:
        slug = path.parent.name
        raise ValueError(
            f'{path} is not {{"claims": [{{"holds": ...}}, ...]}} ({error!r}); `pcs reproduce {slug}` writes it anew'
        ) from error


def main(argv: list[str] | None = None) -> None:
    """Print the table of papers, or write it into a page."""
    parser = argparse.ArgumentParser(prog="python -m common.papers_index", description=main.__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help=f"page with {BEGIN_MARKER} and {END_MARKER}")
    page_path = parser.parse_args(argv).write
    table = markdown_table(read_papers(PAPERS))
    if page_path is None:
        print(table)
        return
    from common.io import atomic_write_text  # imports torch, which the rest of this module does without

    atomic_write_text(page_path, replace_table(page_path.read_text(encoding="utf-8"), table))


if __name__ == "__main__":
    main()

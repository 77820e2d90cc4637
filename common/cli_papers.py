"""`pcs list` and `pcs show`: the papers as tables and cards in the terminal."""

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from common import papers_index


def terminal() -> Console:
    """A console as wide as the terminal, but at most 80 columns."""
    console = Console(highlight=False)
    console.width = min(console.width, 80)
    return console


def print_papers() -> int:
    """A table of all papers: slug, title, task, and how many of the measured claims hold."""
    papers = papers_index.read_papers(papers_index.PAPERS)
    if not papers:
        raise ValueError(f"no papers in {papers_index.PAPERS}; run pcs in a checkout of the repository")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("SLUG", no_wrap=True)
    table.add_column("TITLE")
    table.add_column("TASK")
    table.add_column("CLAIMS", justify="right", no_wrap=True)
    for paper in papers:
        table.add_row(paper.slug, paper.title, paper.task, paper.claims)
    console = terminal()
    console.print(table)
    console.print("\nCLAIMS: those that hold / those measured in the toy world.  More: pcs show SLUG", style="dim")
    return 0


def print_paper(slug: str) -> int:
    """One paper's card, its folder, its results and its commands."""
    folder = papers_index.find_paper(slug, papers_index.PAPERS)
    paper = papers_index.read_paper(slug, papers_index.PAPERS)
    card_path = folder / "README.md"
    console = terminal()
    if card_path.is_file():
        console.print(Markdown(card_path.read_text(encoding="utf-8"), hyperlinks=False))
    table = Table.grid(padding=(0, 2))
    table.add_row("folder", f"papers/{slug}")
    table.add_row("claims", f"{paper.claims} (hold / measured)")
    table.add_row("train", f"pcs train {slug} --help")
    table.add_row("reproduce", f"make reproduce PAPER={slug}")
    table.add_row("start from it", f"pcs new my_method --from {slug}")
    console.rule(style="dim")
    console.print(table)
    return 0

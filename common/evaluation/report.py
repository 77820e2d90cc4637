"""`pcs report`: one HTML file with everything that the reproductions found; it opens without network or server.

Reads papers/SLUG/results.json, the figures named there, the idea from the card, and benchmark records where there are
any. It imports no paper.
"""

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure
from PIL import Image

from common import papers_index
from common.evaluation import claims, figures, records
from common.evaluation.bootstrap import Interval
from common.evaluation.claims import BenchmarkRow, Claim, Results
from common.io import atomic_write_text

TEMPLATES = Path(__file__).parent / "templates"
RESULTS_FILE, RECORDS_FILE = "results.json", "records.jsonl"
MARKS = {"yes": "✔", "direction only": "◐", "no": "✘", "not run": "○"}  # with the colours: also told apart in print
_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Picture:
    """A figure in the report."""

    uri: str
    caption: str
    width_px: int | None  # on the page: 96 pixels an inch, for files that state their resolution


@dataclass(frozen=True)
class Section:
    """One paper in the report."""

    title: str
    idea: str
    results: Results
    pictures: list[Picture]

    @property
    def short_title(self) -> str:
        """The method's name, for a legend: "LoRA" of "LoRA: low-rank adaptation"."""
        return self.title.split(":")[0]

    def count(self, verdict: str) -> int:
        """Number of claims with this verdict."""
        return sum(claim.holds == verdict for claim in self.results.claims)


@dataclass(frozen=True)
class Comparison:
    """Methods of several papers that ran the same study."""

    setting: str
    study: str  # its hash
    methods: dict[str, tuple[str, BenchmarkRow]]  # slug -> name, values
    scatter: str  # data URI


@dataclass(frozen=True)
class Benchmark:
    """One file of benchmark records, aggregated."""

    name: str
    metrics: list[str]
    rows: dict[str, dict[str, Interval]]  # method -> metric -> interval
    scatter: str  # data URI; "" without the metrics that it shows
    source: str


def write_report(paper_folders: list[Path], record_files: list[Path], output: Path) -> None:
    """Write the report of some papers and benchmark records.

    Raises: ValueError if there is nothing to report, or naming a file that cannot be read.
    """
    sections = [read_section(folder) for folder in paper_folders]
    benchmarks = [read_benchmark(path) for path in record_files]
    if not sections and not benchmarks:
        raise ValueError("there is nothing to report: no paper has a results.json; `pcs reproduce SLUG` writes one")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        sections=sections,
        comparisons=compare_methods(sections),
        benchmarks=benchmarks,
        marks=MARKS,
        claim_title=claims.claim_title,
        duration=claims.duration,
        file_size=_file_size,
        verdict_class=_verdict_class,
        metric_title=_metric_title,
        git_commit=records.git_commit(),
        versions=records.package_versions(),
    )
    atomic_write_text(output, page)


def read_section(folder: Path) -> Section:
    """The results, figures and card of one paper's folder."""
    results = claims.load_results(folder / RESULTS_FILE)
    card = folder / "README.md"
    title, idea = _card_title_and_idea(card.read_text(encoding="utf-8") if card.is_file() else "")
    pictures = [read_picture(folder / figure.file, figure.caption) for figure in results.figures]
    return Section(title or results.slug, idea, results, pictures)


def compare_methods(sections: list[Section]) -> list[Comparison]:
    """The papers that have a benchmark row, those of the same study together, the largest group first."""
    studies: dict[str, list[Section]] = {}
    for section in sections:
        if section.results.benchmark is not None:
            studies.setdefault(section.results.benchmark.study, []).append(section)
    comparisons = []
    for group in sorted(studies.values(), key=len, reverse=True):
        titles = [section.short_title for section in group]
        named = {
            title if titles.count(title) == 1 else f"{title} ({section.results.slug})": section.results.benchmark
            for title, section in zip(titles, group, strict=True)
        }
        points = {name: (row.compliance, row.identity) for name, row in named.items()}
        drawn = figures.scatter_methods(points, "prompt fidelity", "subject fidelity")
        first = group[0].results.benchmark
        slugs = [section.results.slug for section in group]
        methods = dict(zip(slugs, named.items(), strict=True))
        comparisons.append(Comparison(first.setting, first.study, methods, _svg(drawn)))
    return comparisons


def read_benchmark(path: Path) -> Benchmark:
    """Aggregate the records of one file, method by method."""
    rows = records.read_records(path)
    if not rows:
        raise ValueError(f"{path} has no records; run the benchmark again or leave the file out")
    methods = {
        method: records.aggregate(records.subject_means(row for row in rows if row.method == method))
        for method in sorted({row.method for row in rows})
    }
    metrics = sorted({row.metric for row in rows if not row.metric.startswith("attribute/")})
    points = {name: (m["clip_t"], m["dino"]) for name, m in methods.items() if {"clip_t", "dino"} <= m.keys()}
    scatter = ""
    if points:
        drawn = figures.scatter_methods(points, "prompt fidelity, CLIP-T", "subject fidelity, DINO")
        scatter = _svg(drawn)
    encoders = sorted({f"{row.metric}: {row.backbone}, {row.preprocessing}" for row in rows if row.metric in metrics})
    commits = ", ".join(sorted({row.git_commit for row in rows}))
    return Benchmark(path.parent.name, metrics, methods, scatter, "; ".join([*encoders, f"commit {commits}"]))


def read_picture(path: Path, caption: str) -> Picture:
    """A picture file as text that a page can hold. Raises: FileNotFoundError or ValueError naming the file."""
    if path.suffix.lower() not in _MIME:
        raise ValueError(f"{path} cannot be shown in a report; figures must be {', '.join(_MIME)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is named in results.json but is not there; run pcs reproduce again")
    width_px = None
    if path.suffix.lower() != ".svg":
        with Image.open(path) as image:
            dots_per_inch = image.info.get("dpi", (None, None))[0]
            width_px = round(image.width * 96 / dots_per_inch) if dots_per_inch else None
    return Picture(_uri(path.read_bytes(), path.suffix.lower()), caption, width_px)


def _svg(figure: Figure) -> str:
    return _uri(figures.figure_bytes(figure, "svg"), ".svg")


def _uri(data: bytes, suffix: str) -> str:
    return f"data:{_MIME[suffix]};base64,{base64.b64encode(data).decode()}"


def _card_title_and_idea(card: str) -> tuple[str, str]:
    """First heading and first paragraph of a card, as plain text."""
    card = re.sub(r"<!--.*?-->", "", card, flags=re.DOTALL)
    title = re.search(r"^# +(.+)$", card, re.MULTILINE)
    paragraphs = [block.strip() for block in re.split(r"\n\s*\n", card)]
    prose = [text for text in paragraphs if re.match(r"[\w*_\[`\"]", text)]
    ideas = [text for text in prose if not re.match(r"\W*(Task|Paper)\W*:", text)]
    return _plain(title[1]) if title else "", _plain(ideas[0]) if ideas else ""


def _plain(markdown: str) -> str:
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    text = re.sub(r"\*\*(.+?)\*\*|`([^`]+)`", lambda match: match[1] or match[2], text, flags=re.DOTALL)
    text = re.sub(r"(?<![\w*])\*(\S[^*]*?)(?<=\S)\*(?![\w*])", r"\1", text)  # *emphasis*, but not the star of v*
    return " ".join(text.split())


def _file_size(num_bytes: int) -> str:
    """Bytes for people, in powers of 1000: "840 B", "3.1 kB", "72 MB"."""
    size, units = float(num_bytes), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.1f} {unit}" if unit != "B" and size < 9.95 else f"{size:.0f} {unit}"


def _verdict_class(claim: Claim) -> str:
    return claim.holds.replace(" ", "-")


def _metric_title(metric: str) -> str:
    known = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO"}
    return known.get(metric, metric.replace("_", " "))


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one self-contained HTML file of the reproduced papers."""

    slugs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Papers; none = all that have results."""
    output: Annotated[Path, tyro.conf.arg(metavar="HTML")] = Path("report.html")
    """The file to write."""
    records: tuple[Path, ...] = ()
    """More benchmark records (records.jsonl), beside those in the papers' folders."""


def main(argv: list[str] | None = None) -> None:
    """`pcs report`."""
    options = tyro.cli(ReportOptions, args=argv)
    papers = papers_index.PAPERS
    if options.slugs:
        folders = [papers_index.find_paper(slug, papers) for slug in options.slugs]
    else:
        every = [papers / slug for slug in papers_index.list_slugs(papers)]
        folders = [folder for folder in every if (folder / RESULTS_FILE).is_file()]
    own = [folder / RECORDS_FILE for folder in folders if (folder / RECORDS_FILE).is_file()]
    write_report(folders, [*own, *options.records], options.output)
    print(options.output)


if __name__ == "__main__":
    main()

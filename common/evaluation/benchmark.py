"""The DreamBooth benchmark: every method on every subject and prompt, with the same seeds, scored the same way.

`pcs evaluate` scores a folder of images against a folder of references without running a method.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from common.data.image_folder import ImageFolder
from common.data.images import load_image, to_pixel_values
from common.evaluation import records as recording
from common.evaluation.bootstrap import Interval
from common.evaluation.encoders import Encoders, load_encoders
from common.evaluation.feature_cache import FeatureCache, picture_hash
from common.evaluation.records import Record
from common.evaluation.scoring import Judge, Score, judge_name, score_images, score_prompt
from common.evaluation.subjects import BenchmarkSubject
from common.sampling.images import save_png, to_pil

RECORDS_FILE = "records.jsonl"


class Generator(Protocol):
    """The part of a method that the benchmark needs."""

    def generate(self, prompt: str, *, seeds: list[int]) -> Tensor:
        """Pictures for a prompt, one per seed, pixel_values (B,3,H,W) in [-1,1]."""
        ...


@dataclass(frozen=True)
class BenchmarkResult:
    """metrics: mean over prompts, then over subjects, with interval.   by_subject: metric -> subject -> mean."""

    metrics: dict[str, Interval]
    by_subject: dict[str, dict[str, float]]
    records_path: Path


def run_benchmark(
    make_method: Callable[[BenchmarkSubject], Generator],
    subjects: Sequence[BenchmarkSubject],
    encoders: Encoders,
    judge: Judge | None,
    *,
    method: str,
    subject_words: str,
    settings: Mapping[str, object],
    seeds: Sequence[int],
    output_dir: str | Path,
) -> BenchmarkResult:
    """Train (through make_method), generate and score each subject; what is finished in output_dir is not done again.

    output_dir holds images/SUBJECT/PROMPT-SEED.png, records.jsonl and features/. Subjects with records are skipped;
    subjects whose pictures are complete are only scored.

    Args:
        make_method: trains a method on a subject, ready to generate.
        judge: reads attributes and identity; None for photographs.
        method: name in the records.
        subject_words: what stands for the subject in the method's prompts: "sks {class}", "<toy>".
        settings: everything else that the pictures depend on (config of the method, backbone), JSON-like.
        seeds: one picture per prompt and seed; the same for all methods that are compared.
    Raises: ValueError if output_dir was made with other settings, seeds, words or encoders.
    """
    output_dir, seeds = Path(output_dir), list(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different and at least one, got {seeds}")
    names = [subject.name for subject in subjects]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"subjects must have different names and be at least one, got {names}")
    run = recording.config_hash(
        {"method": method, "subject_words": subject_words, "settings": dict(settings), "seeds": seeds}
    )
    path = output_dir / RECORDS_FILE
    finished = _finished_subjects(path, run, encoders, judge)
    cache = FeatureCache(output_dir / "features")
    bar = tqdm(subjects, desc=method, unit="subject", disable=not sys.stderr.isatty())
    for subject in bar:
        bar.set_postfix_str(subject.name)
        if subject.name in finished:
            continue
        folder = output_dir / "images" / subject.name
        _generate_missing(make_method, subject, subject_words, seeds, folder, run)
        rows = []
        for index in range(len(subject.prompts)):
            images = torch.stack([to_pixel_values(load_image(_picture_path(folder, index, seed))) for seed in seeds])
            scores = score_prompt(images, subject, index, encoders, judge, cache)
            prompt = subject.prompt(index, subject_words)
            rows += [_record(score, method, subject.name, prompt, seeds, run) for score in scores]
        recording.append_records(path, rows)
    return read_result(path, names)


def read_result(path: str | Path, subjects: Sequence[str] | None = None) -> BenchmarkResult:
    """Aggregate a records.jsonl, optionally of some subjects only."""
    rows = recording.read_records(path)
    means = recording.subject_means(row for row in rows if subjects is None or row.subject in subjects)
    return BenchmarkResult(recording.aggregate(means), means, Path(path))


def _finished_subjects(path: Path, run: str, encoders: Encoders, judge: Judge | None) -> set[str]:
    """Subjects in the records; each subject's records are written at once. Raises: ValueError if made otherwise."""
    rows = recording.read_records(path) if path.is_file() else []
    scored_with = {"clip_i": encoders.clip.name, "dino": encoders.dino.name}
    if judge is not None:
        scored_with["identity"] = judge_name(judge)
    for row in rows:
        if row.config_hash != run or row.backbone != scored_with.get(row.metric, row.backbone):
            raise ValueError(
                f"{path} was made with other settings, seeds or encoders ({row.config_hash}, {row.backbone}); "
                "choose another output folder, or delete this file to score its pictures anew"
            )
    return {row.subject for row in rows}


def _generate_missing(
    make_method: Callable[[BenchmarkSubject], Generator],
    subject: BenchmarkSubject,
    subject_words: str,
    seeds: list[int],
    folder: Path,
    run: str,
) -> None:
    """Write all pictures of a subject, unless all are there and were made by the same run."""
    indices = range(len(subject.prompts))
    if all(
        _made_by(_picture_path(folder, i, seed), run, subject.prompt(i, subject_words))
        for i in indices
        for seed in seeds
    ):
        return
    method = make_method(subject)
    for i in indices:
        prompt = subject.prompt(i, subject_words)
        images = method.generate(prompt, seeds=seeds)
        if len(images) != len(seeds):
            raise ValueError(f"generate returned {len(images)} images for {len(seeds)} seeds")
        for seed, image in zip(seeds, to_pil(images), strict=True):
            save_png(image, _picture_path(folder, i, seed), {"prompt": prompt, "seed": seed, "run": run})


def _picture_path(folder: Path, index: int, seed: int) -> Path:
    return folder / f"{index:02d}-{seed}.png"


def _made_by(path: Path, run: str, prompt: str) -> bool:
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return image.text.get("run") == run and image.text.get("prompt") == prompt


def _record(score: Score, method: str, subject: str, prompt: str, seeds: list[int], run: str) -> Record:
    return Record(
        metric=score.metric,
        value=score.value,
        values=score.values,
        method=method,
        subject=subject,
        prompt=prompt,
        seeds=seeds,
        n_images=score.n_images,
        backbone=score.backbone,
        preprocessing=score.preprocessing,
        config_hash=run,
        git_commit=recording.git_commit(),
        versions=recording.package_versions(),
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Score a folder of generated images against a folder of reference photos."""

    images: Path
    """Folder of generated images."""
    reference: Path
    """Folder of photos of the real subject."""
    prompt: str = ""
    """What the images should show, with the class noun but no placeholder: "a dog in the snow". Empty: no CLIP-T."""
    clip: str = "toy"
    """"toy", or a local folder or hub id of CLIP (papers: openai/clip-vit-base-patch32)."""
    dino: str = "toy"
    """"toy", or a local folder or hub id of DINO (papers: facebook/dino-vits16)."""
    device: str = "cpu"
    """Where CLIP and DINO run."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="JSONL")] = None
    """Records are added to this file."""


def main(argv: list[str] | None = None) -> None:
    """`pcs evaluate`."""
    options = tyro.cli(EvaluateOptions, args=argv)
    generated, reference = (_all_pictures(folder) for folder in (options.images, options.reference))
    encoders = load_encoders(options.clip, options.dino, options.device)
    scores = score_images(generated, reference, options.prompt, encoders, FeatureCache())
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("metric", "value", "images", "encoder"):
        table.add_column(column)
    for score in scores:
        table.add_row(score.metric, f"{score.value:.4f}", str(score.n_images), score.backbone)
    Console(highlight=False).print(table)
    if options.output is not None:
        run = recording.config_hash([sorted(map(picture_hash, pictures)) for pictures in (generated, reference)])
        rows = [
            _record(score, options.images.name, options.reference.name, options.prompt, [], run) for score in scores
        ]
        recording.append_records(options.output, rows)


def _all_pictures(folder: Path) -> list[Tensor]:
    """Every picture of a folder in its own size, (3,H,W) in [-1,1]."""
    return [to_pixel_values(load_image(path)) for path in ImageFolder(folder, resolution_px=8).paths]


if __name__ == "__main__":
    main()

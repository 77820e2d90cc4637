"""Prompt templates, and the DreamBooth benchmark as a folder of photographs."""

import re
from dataclasses import dataclass
from pathlib import Path

# The neutral templates of Textual Inversion (Gal et al., arXiv 2208.01618), the 27 "photo/rendition" lines that its
# diffusers example and most later papers use.
OBJECT_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)

# The style templates of the same source: 19 lines, 17 distinct, so two of them weigh double.
STYLE_TEMPLATES = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)

PROMPTS_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = frozenset({"cat", "dog"})  # whose subjects take the "Live Subject Prompts"; 9 of the 30 subjects
_PROMPT_LINE = re.compile(r"""^(['"])(?P<template>.+)\1\.format\(unique_token, class_token\),?$""")


@dataclass(frozen=True)
class Subject:
    """One subject of the benchmark.

    name: of its folder.   class_noun: "dog", "stuffed animal", ...   images_dir: the photographs.
    templates: prompts with {0} for the identifier and {1} for the class noun, 25 in the published file.
    """

    name: str
    class_noun: str
    images_dir: Path
    templates: tuple[str, ...]

    @property
    def is_live(self) -> bool:
        """Whether the subject is an animal."""
        return self.class_noun in LIVE_CLASSES

    def prompts(self, identifier: str) -> list[str]:
        """The prompts with an identifier ("sks"); "" gives the plain ones ("a dog in the snow") that CLIP-T scores."""
        return [" ".join(template.format(identifier, self.class_noun).split()) for template in self.templates]


def fill_templates(templates: tuple[str, ...], name: str) -> list[str]:
    """Each template with `name` (a placeholder token, or identifier and class noun) in its gap."""
    return [template.format(name) for template in templates]


def read_dreambooth(root: str | Path) -> list[Subject]:
    """The subjects of a folder in the layout of google/dreambooth, sorted by name.

    Args:
        root: the repository or its `dataset` folder: prompts_and_classes.txt beside one folder for each subject.
            Subjects of the table that have no folder are left out, so a part of the set will do.
    Raises: FileNotFoundError without the prompts file; ValueError naming what in it, or which folder, does not fit.
    """
    root = Path(root)
    folder = root / "dataset" if (root / "dataset" / PROMPTS_FILE).is_file() else root
    if not (folder / PROMPTS_FILE).is_file():
        raise FileNotFoundError(f"no {PROMPTS_FILE} in {str(root)!r}; pass the folder that holds it and the subjects")
    classes, object_templates, live_templates = read_prompts_and_classes(folder / PROMPTS_FILE)
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise ValueError(f"{folder / PROMPTS_FILE} names no class for the folders {unknown}; add a line 'NAME,CLASS'")
    if not names:
        raise ValueError(f"{str(folder)!r} holds {PROMPTS_FILE} but no subject folder")
    return [
        Subject(
            name=name,
            class_noun=classes[name],
            images_dir=folder / name,
            templates=live_templates if classes[name] in LIVE_CLASSES else object_templates,
        )
        for name in names
    ]


def read_prompts_and_classes(path: str | Path) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Parse the benchmark's text file: (subject -> class noun, object prompt templates, live prompt templates)."""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    headings = ("subject_name,class", "Object Prompts", "Live Subject Prompts")
    missing = [heading for heading in headings if heading not in lines]
    if missing:
        raise ValueError(f"{str(path)!r} has no line {missing[0]!r}; expected the file of google/dreambooth")
    table, objects, live = (lines.index(heading) for heading in headings)
    rows = [line.split(",") for line in lines[table + 1 : objects] if line.count(",") == 1]
    classes = {name.strip(): class_noun.strip() for name, class_noun in rows}
    object_templates, live_templates = _templates(lines[objects:live]), _templates(lines[live:])
    if not (classes and object_templates and live_templates):
        raise ValueError(
            f"{str(path)!r}: read {len(classes)} classes, {len(object_templates)} object and {len(live_templates)} "
            "live prompts; expected the three sections of the file of google/dreambooth, in its order"
        )
    return classes, object_templates, live_templates


def _templates(lines: list[str]) -> tuple[str, ...]:
    matches = [_PROMPT_LINE.match(line) for line in lines]
    return tuple(match["template"] for match in matches if match)

"""The official release's folder of exemplars: pictures, and text.json with templates for each of them."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, tensor
from torch.utils.data import Dataset

from common.backbones import Backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.training.seeding import derive_seed, seeded_randn

TEMPLATES = "text.json"


def read_templates(folder: Path) -> dict[str, list[str]]:
    """{file name: ["cat {} stone", ...]} of a folder.

    Raises: FileNotFoundError, or ValueError naming the file and the entry that does not fit.
    """
    path = Path(folder) / TEMPLATES
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing; write {{"a.jpg": ["cat {{}} stone", ...], ...}}, {{}} for <R>')
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON in UTF-8: {error}") from error
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path} must hold {{file name: [template, ...]}}, with at least one file")
    for name, templates in table.items():
        fits = isinstance(templates, list) and templates and all(isinstance(text, str) for text in templates)
        if not fits or any(text.count("{}") != 1 for text in templates):
            raise ValueError(f"{path}: {name!r} needs a list of texts that hold {{}} once each, got {templates!r}")
    return table


class RelationDataset(Dataset):
    """Latents of the exemplars, each with one of its own templates, <R> in the gap. Never mirrored: that breaks "left".

    Items: {"latents": (4,h,w) float32, "prompt": str, "image_index": int}; `sample(index, sample_key)` draws template
    and posterior sample, `dataset[index]` takes the first template and the posterior's mean.

    Raises: ValueError naming the pictures without templates, or templates without picture.
    """

    def __init__(self, folder: Path, backbone: Backbone, placeholder: str, *, seed: int, cache_dir: Path | None = None):
        pictures = ImageFolder(folder, resolution_px=backbone.resolution_px, other_files=(TEMPLATES,))
        templates = read_templates(folder)
        names = [path.relative_to(pictures.root).as_posix() for path in pictures.paths]
        if set(names) != set(templates):
            differing = sorted(set(names) ^ set(templates))
            raise ValueError(f"{folder / TEMPLATES} and the pictures beside it differ in {differing[:5]}")
        self._prompts = [[text.format(placeholder) for text in templates[name]] for name in names]
        self._latents, self.seed = LatentCache(pictures, backbone, cache_dir=cache_dir), seed

    def __len__(self) -> int:
        """Number of exemplars."""
        return len(self._latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._item(index, 0, None)

    def sample(self, index: int, sample_key: int) -> dict[str, Any]:
        """Exemplar `index` as sample `sample_key` of a run shows it: a pure function of (seed, index, sample_key)."""
        chosen = derive_seed(self.seed, "prompt", sample_key) % len(self._prompts[index])
        noise = seeded_randn(tensor([sample_key]), self._latents.latent_shape, seed=self.seed, stream="posterior")[0]
        return self._item(index, chosen, noise)

    def _item(self, index: int, chosen: int, noise: Tensor | None) -> dict[str, Any]:
        latents = self._latents.latents(index, 0, noise)
        return {"latents": latents, "prompt": self._prompts[index][chosen], "image_index": index}

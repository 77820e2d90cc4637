"""Regularisation images (Sec. 3.1): pictures of the class with their own captions, found by caption or generated.

Either kind is a folder of pictures with captions, which train.py reads; real pictures go there by hand.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from common.backbones import Backbone
from common.fingerprint import weights_hash
from common.io import atomic_write_text
from common.sampling import sample_images
from common.sampling.images import save_png, to_pil
from common.training.seeding import derive_seed

from .config import CustomDiffusionConfig

MIN_SIMILARITY = 0.85  # cosine of CLIP's text features
ORIGIN = "origin.json"


def retrieve(target: Tensor, captions: Tensor, count: int, min_similarity: float = MIN_SIMILARITY) -> list[int]:
    """Sec. 3.1: the captions that are most like the target prompt in CLIP's text space, best first.

    Args:
        target: text features of "photo of a cat", (D,) or (1,D).
        captions: those of N captions, (N,D).
        count: at most so many; 200 in the paper.
        min_similarity: only cosines above it.
    Raises: ValueError if there is none.
    """
    cosines = F.normalize(captions, dim=-1) @ F.normalize(target.flatten(), dim=-1)  # (N,)
    order = cosines.argsort(descending=True, stable=True)[:count]
    found = [int(i) for i in order if cosines[i] > min_similarity]
    if not found:
        raise ValueError(
            f"none of {len(captions)} captions has a similarity above {min_similarity} with the target; "
            f"the best has {cosines.max():.2f}"
        )
    return found


def generated_set(backbone: Backbone, config: CustomDiffusionConfig, concept: int, folder: Path) -> Path:
    """Samples of the class prompt by the model itself, made before it is tuned; made once.

    Returns: FOLDER/images, with the class prompt as caption of each.
    Raises: ValueError naming what differs if the folder holds images of another origin, such as other weights.
    """
    prompt, count = config.class_prompt(concept), config.num_regularisation_images
    settings = {name: getattr(config, name) for name in ("num_inference_steps", "guidance_scale", "eta", "seed")}
    origin = {"prompt": prompt, "count": count, **settings, "unet": weights_hash(backbone.unet)}
    if (folder / ORIGIN).is_file():
        found = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        different = [f"{k}: {found.get(k)} -> {value}" for k, value in origin.items() if found.get(k) != value]
        if different:
            raise ValueError(f"the images in {folder} were made otherwise ({'; '.join(different)}): delete the folder")
        return folder / "images"
    seeds = [derive_seed(config.seed, "generated regularisation", concept, i) for i in range(count)]
    settings.pop("seed")
    images = sample_images(backbone, prompt, seeds=seeds, progress=True, **settings)
    write_set(images, [prompt] * count, folder / "images")
    atomic_write_text(folder / ORIGIN, json.dumps(origin, indent=2) + "\n")
    return folder / "images"


def write_set(images: Tensor, captions: Sequence[str], folder: Path, notes: Mapping[str, object] | None = None) -> None:
    """Write pictures (N,3,H,W) in [-1,1] as PNG files, and metadata.jsonl with their captions.

    Args: notes: more that each PNG says of its origin.
    """
    rows = []
    for i, (image, caption) in enumerate(zip(to_pil(images), captions, strict=True)):
        save_png(image, folder / f"{i:05d}.png", {"caption": caption, **(notes or {})})
        rows.append(json.dumps({"file_name": f"{i:05d}.png", "text": caption}))
    atomic_write_text(folder / "metadata.jsonl", "\n".join(rows) + "\n")

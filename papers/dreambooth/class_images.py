"""Class images x_pr (Sec. 3.3): samples of the model before it is tuned, made once and kept with their origin.

FOLDER/origin.json            prompt, sampler and weights that they were made with
       images/00000.png ...   one per seed, so that a stopped run goes on where it was
       latents/               of these images, see LatentCache
"""

import json
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from common.backbones import Backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.fingerprint import weights_hash
from common.io import atomic_write_text
from common.sampling import sample_images
from common.sampling.images import save_png, to_pil
from common.training.optimize import on_main_process
from common.training.seeding import derive_seed

from .config import DreamBoothConfig
from .method import CLASS_STREAM, class_prompt

ORIGIN, IMAGES, LATENTS = "origin.json", "images", "latents"
BATCH = 8  # images made at a time


def class_image_latents(
    backbone: Backbone, config: DreamBoothConfig, folder: Path, accelerator: Accelerator
) -> LatentCache:
    """Latents of the class images in `folder`, which are made first where they are missing; processes share the work.

    The ancestral sampler of the paper is DDIM with eta = 1.

    Args:
        backbone: not tuned yet.
        folder: may be shared by all runs on this class that start from the same weights.
    Raises: ValueError naming what differs if the folder holds images of another origin, such as other weights.
    """
    on_main_process(accelerator, partial(_claim_folder, folder, _origin(backbone, config)))
    missing = [i for i in range(config.num_class_images) if not _path(folder, i).is_file()]
    accelerator.wait_for_everyone()  # all have looked before anybody writes
    own = missing[accelerator.process_index :: accelerator.num_processes]
    starts = range(0, len(own), BATCH)
    for start in tqdm(starts, desc="class images", disable=None if accelerator.is_main_process else True):
        _make(backbone, config, folder, own[start : start + BATCH])
    accelerator.wait_for_everyone()
    images = ImageFolder(folder / IMAGES, resolution_px=backbone.resolution_px)
    return LatentCache(images, backbone, cache_dir=folder / LATENTS)


def _make(backbone: Backbone, config: DreamBoothConfig, folder: Path, indices: list[int]) -> None:
    prompt, seeds = class_prompt(config), [derive_seed(config.seed, CLASS_STREAM, i) for i in indices]
    images = sample_images(
        backbone,
        prompt,
        seeds=seeds,
        batch_size=BATCH,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        eta=1.0,
    )
    for index, seed, image in zip(indices, seeds, to_pil(images), strict=True):
        save_png(image, _path(folder, index), {"prompt": prompt, "seed": seed})


def _path(folder: Path, index: int) -> Path:
    return folder / IMAGES / f"{index:05d}.png"


def _origin(backbone: Backbone, config: DreamBoothConfig) -> dict[str, object]:
    return {
        "prompt": class_prompt(config),
        "num_class_images": config.num_class_images,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "seed": config.seed,
        "weights": [weights_hash(module) for module in backbone.modules],
    }


def _claim_folder(folder: Path, origin: dict[str, object]) -> None:
    """Write the origin, or compare it with the one that is there."""
    path = folder / ORIGIN
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} holds files but no {ORIGIN}, so nothing says that they are samples of the untuned model; "
                "choose another folder for the class images"
            )
        atomic_write_text(path, json.dumps(origin, indent=2) + "\n")
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {folder} to make the class images again") from error
    different = [f"{name}: {found.get(name)} -> {value}" for name, value in origin.items() if found.get(name) != value]
    if different:
        raise ValueError(
            f"the class images in {folder} were made otherwise (theirs -> now): {'; '.join(different)}. They must be "
            "samples of the model that is tuned, before it is tuned: choose another folder for them, or delete this one"
        )

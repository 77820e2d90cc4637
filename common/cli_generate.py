"""`pcs generate`: images or clips from a trained artifact, which says whose code loads it."""

import argparse
import importlib
import json
from pathlib import Path

from common import papers_index

PICTURES, CLIPS = (".png",), (".mp4", ".gif")
FPS = 8.0  # of clips


def artifact_slug(path: Path) -> str:
    """Which paper an artifact belongs to: "slug" in a safetensors header, or in artifact.json of a folder.

    Raises: FileNotFoundError if it does not exist, ValueError naming the file if it does not say its slug.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; --artifact is what `pcs train` wrote")
    header_path = path / "artifact.json" if path.is_dir() else path
    try:
        if path.is_dir():
            header = json.loads(header_path.read_text(encoding="utf-8"))
        else:
            with safe_open(path, framework="np") as file:
                header = file.metadata() or {}
    except FileNotFoundError as error:
        raise ValueError(f"{path} has no artifact.json; name the .safetensors file that `pcs train` wrote") from error
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{header_path} is damaged or not an artifact ({error}); train again") from error
    if not isinstance(header, dict) or "slug" not in header:
        raise ValueError(f"{header_path} does not say which paper made it (no 'slug'); load it with diffusers instead")
    return header["slug"]


def output_paths(output: Path, seeds: list[int]) -> list[Path]:
    """One file per seed: the output itself for a single seed, else out-0.png, out-1.png, ... beside it."""
    if output.suffix.lower() not in PICTURES + CLIPS:
        raise ValueError(f"--output must end in .png, or in .mp4 or .gif for clips, got {output}")
    return [output] if len(seeds) == 1 else [output.with_name(f"{output.stem}-{seed}{output.suffix}") for seed in seeds]


def generate(args: argparse.Namespace) -> int:
    """Make one image or clip per seed; each PNG says how it was made."""
    artifact = Path(args.artifact)
    slug = papers_index.find_paper(artifact_slug(artifact), papers_index.PAPERS).name
    paths = output_paths(Path(args.output), args.seed)

    import torch

    from common.backbones.video import VideoBackbone
    from common.sampling.clips import save_gif, save_mp4
    from common.sampling.images import save_png, to_pil

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    given = {name: value for name, value in settings.items() if value is not None}
    method = importlib.import_module(f"papers.{slug}.method").load_method(artifact, args.backbone, device)
    makes_clips = isinstance(method.backbone, VideoBackbone)
    if (paths[0].suffix.lower() in CLIPS) != makes_clips:
        what, endings = ("clips", CLIPS) if makes_clips else ("pictures", PICTURES)
        raise ValueError(f"{slug} makes {what}: --output must end in {' or '.join(endings)}, got {args.output}")
    made = method.generate(args.prompt, seeds=args.seed, **given)
    for one, seed, path in zip(made, args.seed, paths, strict=True):
        if makes_clips:
            (save_gif if path.suffix.lower() == ".gif" else save_mp4)(one, path, FPS)
        else:
            header = {"prompt": args.prompt, "seed": seed, "slug": slug, "artifact": artifact.name, **given}
            save_png(to_pil(one[None])[0], path, header)
        print(path)
    return 0

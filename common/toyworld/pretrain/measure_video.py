"""Export tiny-video from a run, and measure it: clips of held-out prompts, read by the judge of clips."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm

from common.backbones.loading import WORDS, extended_backbone
from common.backbones.presets import VIDEO_EXTENSIONS
from common.evaluation.motion import neighbour_consistency
from common.io import atomic_save_safetensors, atomic_write_text, load_safetensors
from common.sampling.guidance import interval_limited
from common.sampling.images import image_grid, save_png
from common.sampling.video import sample_clips
from common.toyworld.captions import motion_words
from common.toyworld.clip_shards import ALL_MOTIONS, render_clips
from common.toyworld.judge import Judge
from common.toyworld.motion_judge import ClipReading, MotionJudge
from common.toyworld.pretrain.data import HELD_OUT_FIRST_SEED
from common.toyworld.pretrain.export import MAX_SHARD, MEASUREMENTS, folder_bytes, validation_curve
from common.toyworld.pretrain.motion_judge import to_clips
from common.toyworld.pretrain.video import EARLIER, TRAINING, cache_of
from common.training.optimize import default_device

TINY_VIDEO = VIDEO_EXTENSIONS["tiny-video"].inflated
GOALS = {"motion": 0.75, "class": 0.85}
GRID_CLIPS = 8
CONSISTENCY_MARGIN = 0.02  # below that of renders


@dataclass(frozen=True, kw_only=True)
class ExportVideoConfig:
    """Write tiny-video's weights from a finished or running training run."""

    run: Path = Path("runs/video")  # the average in its last checkpoint is taken
    output: Path = TINY_VIDEO  # folder


@dataclass(frozen=True, kw_only=True)
class MeasureVideoConfig:
    """What the card states."""

    weights: Path = TINY_VIDEO  # folder; the card is written into it
    num_clips: int = 80
    first_seed: int = HELD_OUT_FIRST_SEED  # of the prompts
    num_inference_steps: int = 30
    scheduler: str = "euler"  # ends without noise; what ddim leaves flickers: neighbouring frames 0.890, not 0.891
    guidance_scale: float = 7.5  # s of uncond + s * (cond - uncond); best of 3 to 12 on other prompts
    guidance_from: int = 600  # lowest timestep with guidance, 0 = everywhere: at low noise it makes details flicker
    grid: Path | None = None  # PNG of the first clips, a row each


def export_video(config: ExportVideoConfig) -> None:
    """Write the shards of config.output, training.json and the card."""
    tensors, header = load_safetensors(config.run / "checkpoint.safetensors")
    average = {name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")}
    words = dict(zip(motion_words(), average.pop("words.rows"), strict=True))
    halves = {name.removeprefix("unet."): tensor.half().contiguous() for name, tensor in average.items()}
    shards = split_torch_state_dict_into_shards(
        halves, filename_pattern="video{suffix}.safetensors", max_shard_size=MAX_SHARD
    )
    for name, keys in shards.filename_to_tensors.items():
        part = {key: halves[key] for key in keys}
        atomic_save_safetensors(part, config.output / name, {"inflated": VIDEO_EXTENSIONS["tiny-video"].base})
    atomic_save_safetensors({word: row.clone() for word, row in words.items()}, config.output / WORDS, {})
    training = json.loads(header["progress"]) | {"validation_loss": validation_curve(config.run / "log.jsonl")}
    earlier = cache_of(config.run) / EARLIER
    if earlier.is_file():
        training["earlier"] = json.loads(earlier.read_text("utf-8"))
    atomic_write_text(config.output / TRAINING, json.dumps(training, indent=2) + "\n")
    (config.output / MEASUREMENTS).unlink(missing_ok=True)  # of earlier weights
    write_video_card(config.output)
    print(f"written to {config.output}")


@torch.no_grad()
def measure_video(config: MeasureVideoConfig) -> dict:
    """Write measurements.json and the card beside the weights; returns the numbers."""
    device = default_device()
    judge, pictures = MotionJudge.load(device=device), Judge.load(device=device)
    renders = render_clips(list(range(config.first_seed, config.first_seed + config.num_clips)))
    extension = replace(VIDEO_EXTENSIONS["tiny-video"], inflated=config.weights)
    backbone = extended_backbone("tiny-video", extension).to(device).eval().freeze()
    prompts = [captions[0] for captions in renders.captions]
    sampling = {name: getattr(config, name) for name in ("num_inference_steps", "scheduler", "guidance_scale")}
    guidance = interval_limited(config.guidance_from, 999)
    made = torch.cat(
        [
            sample_clips(backbone, prompt, seeds=[seed], guidance=guidance, **sampling)
            for seed, prompt in enumerate(tqdm(prompts, desc="sampling", unit="clip"))
        ]
    )
    truth = to_clips(renders.frames)
    if config.grid is not None:
        rows = made[:GRID_CLIPS].transpose(1, 2).flatten(0, 1)
        labels = [prompt if k == 0 else "" for prompt in prompts[:GRID_CLIPS] for k in range(made.shape[2])]
        save_png(image_grid(rows, columns=made.shape[2], labels=labels, upscale=2), config.grid)
    found, own = judge.read(made.to(device)), judge.read(truth.to(device))
    settings = {name: getattr(config, name) for name in ("num_clips", "first_seed", "guidance_from")} | sampling
    result = {
        "settings": settings | {"noise_share": backbone.noise_share},
        "generated": shares_right(found, renders.motions, renders.classes)
        | {"consistency": frame_consistency(pictures, made.to(device))},
        "renders": shares_right(own, renders.motions, renders.classes)
        | {"consistency": frame_consistency(pictures, truth.to(device))},
    }
    for index in sorted(set(renders.motions.tolist())):
        chosen = renders.motions == index
        share = (found.motions.argmax(-1).cpu()[chosen] == index).float().mean().item()
        result.setdefault("motions", {})[ALL_MOTIONS[index]] = {"right": share, "clips": int(chosen.sum())}
    atomic_write_text(config.weights / MEASUREMENTS, json.dumps(result, indent=2) + "\n")
    write_video_card(config.weights)
    print("\n".join(video_table(result)))
    return result


def shares_right(found: ClipReading, motions: Tensor, classes: Tensor) -> dict[str, float]:
    """Share of clips whose motion, and whose class, are read as they should be."""
    return {
        "motion": (found.motions.argmax(-1).cpu() == motions).float().mean().item(),
        "class": (found.classes.argmax(-1).cpu() == classes).float().mean().item(),
    }


def frame_consistency(judge: Judge, clips: Tensor) -> float:
    """Mean cosine of the picture judge's features of neighbouring frames; clips (B,3,F,H,W) in [-1,1]."""
    features = torch.stack([judge.features(clip.transpose(0, 1)) for clip in clips])
    return neighbour_consistency(features).mean().item()


def write_video_card(folder: Path) -> None:
    """Write README.md of the weights folder from its training.json and measurements.json."""
    training = json.loads((folder / TRAINING).read_text("utf-8"))
    runs = [training]
    while "earlier" in runs[0]:
        runs.insert(0, runs[0]["earlier"])
    steps, samples, seconds = (sum(run[name] for run in runs) for name in ("step", "samples", "seconds"))
    curve = ", ".join(f"{int(step):,}: {loss:.4f}" for step, loss in training["validation_loss"].items())
    lines = [
        "# tiny-video",
        "",
        "tiny-sd as a video network: diffusers' UNet3DConditionModel with tiny-sd's spatial weights, and layers across",
        "frames that were trained on clips of the toy world (8 frames, 64x64 px, ten named motions).",
        f"The safetensors ({folder_bytes(folder) / 2**20:.1f} MiB with this card) hold these layers, the",
        "cross-attention and the embeddings of words of motion that were trained with them; `load_backbone` takes the",
        "rest from tiny-sd.",
        "",
        f"{steps:,} steps, {samples:,} clips, {seconds / 60:.0f} minutes in {len(runs)} "
        f"{'run' if len(runs) == 1 else 'runs'}; the averaged weights are stored.",
        f"Fixed-noise validation loss after steps of the last run: {curve}.",
        "To train on: `python -m common.toyworld.pretrain video --data CLIPS --output RUN --minutes N --start-from`",
        "this folder.",
    ]
    measured = folder / MEASUREMENTS
    if measured.exists():
        lines += ["", *video_table(json.loads(measured.read_text("utf-8")))]
    else:
        lines += ["", "Not measured yet: `python -m common.toyworld.pretrain measure-video`."]
    atomic_write_text(folder / "README.md", "\n".join(lines) + "\n")


def video_table(measured: dict) -> list[str]:
    """Markdown lines of what `measure_video` wrote."""
    settings, made, truth = (measured[name] for name in ("settings", "generated", "renders"))
    goals = {name: f"{goal:.0%}" for name, goal in GOALS.items()}
    goals["consistency"] = f"{truth['consistency'] - CONSISTENCY_MARGIN:.3f}"
    lines = [
        f"Measured on {settings['num_clips']} held-out prompts (seeds from {settings['first_seed']}), clips of "
        f"`sample_clips` in {settings['num_inference_steps']} steps with",
        f'`guidance_scale={settings["guidance_scale"]}, scheduler="{settings["scheduler"]}", '
        f"guidance=interval_limited({settings['guidance_from']}, 999)`;",
        f"{settings['noise_share']:.0%} of the initial noise is common to all frames.",
        "The judges' own accuracy is on the renders of the prompts.",
        "",
        "| | generated | goal | renders |",
        "|---|---|---|---|",
        *(f"| {name} right | {made[name]:.1%} | {goals[name]} | {truth[name]:.1%} |" for name in GOALS),
        f"| cosine of neighbouring frames | {made['consistency']:.3f} | {goals['consistency']} | "
        f"{truth['consistency']:.3f} |",
        "",
        "| motion | right | clips |",
        "|---|---|---|",
    ]
    return lines + [f"| {name} | {row['right']:.0%} | {row['clips']} |" for name, row in measured["motions"].items()]

"""Speed and memory on this machine, as JSON: python -m tests.benchmarks.speed [--only NAME ...] [--output FILE]."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch.optim.optimizer import register_optimizer_step_post_hook

from common.backbones import PRESETS, load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.data.subject_dataset import SubjectDataset, ZipDataset
from common.evaluation.records import describe_machine, git_commit, package_versions
from common.io import atomic_write_text
from common.papers_index import REPOSITORY
from common.sampling import sample_images
from common.sampling.images import save_png, to_pil
from common.toyworld.benchmark import held_out_views, subjects
from common.training.loop import fit
from papers.dreambooth import method as dreambooth
from papers.dreambooth import train as dreambooth_train
from papers.dreambooth.config import DreamBoothConfig
from papers.textual_inversion import method as textual_inversion
from papers.textual_inversion import train as textual_inversion_train
from papers.textual_inversion.config import TextualInversionConfig
from tests.benchmarks import three_d_speed, video_speed
from tests.benchmarks.reference_loop import train_plainly

WARM_UP = 3  # first steps of a loop that are not counted
HELP = """
import sys
from common.cli import main
try:
    main(["--help"])
finally:
    status = open("/proc/self/status").read()
    print(status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """Measure speed and memory."""

    only: tuple[str, ...] = ()
    """Names of measurements; default all."""
    quick: bool = False
    """A twentieth of the steps, to see that everything runs."""
    backbone: str = "tiny-sd"
    """tiny-sd, or a diffusers folder of the same architecture."""
    peer: Path | None = None
    """A local copy of diffusers' examples/dreambooth/train_dreambooth.py, to be timed too."""
    peer_steps: int = 20
    """Steps of the peer, of ours and of the reference, in the comparison of steps."""
    output: Path | None = None
    """Also write the JSON to this file."""


@contextmanager
def optimizer_steps() -> Iterator[list[float]]:
    """Times at which any optimiser of this process stepped."""
    times: list[float] = []
    handle = register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    try:
        yield times
    finally:
        handle.remove()


def seconds_per_step(times: list[float]) -> float:
    """Median time between two steps, after the warm-up."""
    later = times[WARM_UP:]
    return statistics.median(b - a for a, b in zip(later, later[1:], strict=False))


class Bench:
    """The pictures of one toy subject, and the measurements; each returns {"value", "unit", "goal"} and details."""

    def __init__(self, options: SpeedOptions, folder: Path):
        self.options, self.folder = options, folder
        (self.subject,) = subjects(1)
        self.photos, self.class_images = folder / "photos", folder / "class_images"
        pictures = {self.photos: self.subject.images, self.class_images: held_out_views(self.subject.entity, 16)}
        for place, images in pictures.items():
            for i, image in enumerate(to_pil(images)):
                save_png(image, place / f"{i:02d}.png")

    def steps(self, count: int) -> int:
        return max(WARM_UP + 3, count // 20) if self.options.quick else count

    def latents(self, backbone, folder: Path) -> LatentCache:
        return LatentCache(ImageFolder(folder, resolution_px=backbone.resolution_px), backbone)

    def textual_inversion(self) -> dict:
        """400 steps at batch 4."""
        config = TextualInversionConfig.tiny()
        config = replace(config, train_steps=self.steps(400), batch_size=4, initializer_token=self.subject.class_noun)
        backbone = load_backbone(self.options.backbone)
        dataset = SubjectDataset(self.latents(backbone, self.photos), config.training_prompts(), seed=0)
        method = textual_inversion.TextualInversion(backbone, config)
        result = fit(method, dataset, textual_inversion_train.fit_config(config), self.folder / "inversion")
        return {"value": result.seconds, "unit": "s", "goal": 60, "steps": result.steps}

    def dreambooth(self) -> dict:
        """200 steps at batch 2 + 2, class images at hand."""
        result, _ = self._fit_dreambooth(self.steps(200), "dreambooth")
        return {"value": result.seconds, "unit": "s", "goal": 60, "steps": result.steps}

    def _fit_dreambooth(self, steps: int, name: str):
        config = replace(DreamBoothConfig.tiny(self.subject.class_noun), train_steps=steps, batch_size=2)
        backbone = load_backbone(self.options.backbone)
        instance = SubjectDataset(
            self.latents(backbone, self.photos), [dreambooth.instance_prompt(config)], seed=config.seed
        )
        of_class = SubjectDataset(self.latents(backbone, self.class_images), [dreambooth.class_prompt(config)], seed=1)
        method, settings = dreambooth.DreamBooth(backbone, config), dreambooth_train.fit_config(config)
        with optimizer_steps() as times:
            result = fit(method, ZipDataset(instance=instance, class_=of_class), settings, self.folder / name)
        return result, times

    def sampling(self) -> dict:
        """4 images, 30 DDIM steps, with guidance."""
        backbone, steps = load_backbone(self.options.backbone).freeze(), self.steps(30)
        arguments = {"seeds": [0, 1, 2, 3], "guidance_scale": 5.0}
        sample_images(backbone, "a photo of a dog", num_inference_steps=2, **arguments)
        started = time.perf_counter()
        sample_images(backbone, "a photo of a dog", num_inference_steps=steps, **arguments)
        return {"value": time.perf_counter() - started, "unit": "s", "goal": 6, "steps": steps}

    def help_time(self) -> dict:
        """pcs --help, process start to end; the best of five."""
        command, seconds = [sys.executable, "-m", "common.cli", "--help"], []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started)
        return {"value": min(seconds), "unit": "s", "goal": 0.3}

    def help_memory(self) -> dict:
        """Peak resident memory of pcs --help, from its own /proc/self/status."""
        command = [sys.executable, "-c", HELP]
        done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
        return {"value": int(done.stderr.split()[-1]) / 1024, "unit": "MB", "goal": 60}

    def training_step(self) -> dict:
        """A step of ours against one of the reference loop, in turns; DreamBooth at batch 2 + 2."""
        steps, config = self.options.peer_steps, DreamBoothConfig.tiny(self.subject.class_noun)
        prompts = (dreambooth.instance_prompt(config), dreambooth.class_prompt(config))
        ours, reference = [], []
        for turn in range(3):
            _, times = self._fit_dreambooth(steps, f"step_{turn}")
            ours.append(seconds_per_step(times))
            with optimizer_steps() as times:
                train_plainly(
                    load_backbone(self.options.backbone),
                    (self.photos, self.class_images),
                    prompts,
                    steps=steps,
                    batch_size=2,
                    learning_rate=config.learning_rate,
                )
            reference.append(seconds_per_step(times))
        ratios = [a / b for a, b in zip(ours, reference, strict=True)]
        found = {"value": statistics.median(ratios), "unit": "ours / reference", "goal": 0.8, "ratios": ratios}
        found |= {"seconds_ours": ours, "seconds_reference": reference}
        if self.options.peer is not None:
            peer = self._peer(prompts)
            found |= {"seconds_peer": peer, "ours_over_peer": statistics.median(ours) / peer}
        return found

    def clip_loading(self) -> dict:
        """A 320x240 mp4 of 3 s at 30 fps, to a tensor of 256 px; seconds per second of video."""
        return video_speed.clip_loading(self.folder)

    def clip_sampling(self) -> dict:
        """One clip of 8 frames on tiny-video, 30 DDIM steps, with guidance."""
        return video_speed.clip_sampling(self.steps(30))

    def clip_tuning(self) -> dict:
        """One clip learned by MotionDirector, and by VMC, with their tiny presets; the slower one."""
        return video_speed.clip_tuning(self.folder, 0.05 if self.options.quick else 1.0)

    def rendering(self) -> dict:
        """A voxel field's rendering, forward and backward, against nerfstudio's torch hash grid."""
        return three_d_speed.rendering(2 if self.options.quick else 10)

    def distillation_step(self) -> dict:
        """One step of DreamFusion on tiny-sd."""
        return three_d_speed.distillation_step(self.options.backbone, self.steps(40))

    def _peer(self, prompts: tuple[str, str]) -> float:
        """Seconds per step of the script at `--peer`."""
        source = PRESETS["tiny-sd"].weights if self.options.backbone == "tiny-sd" else self.options.backbone
        flags = {
            "pretrained_model_name_or_path": source, "instance_data_dir": self.photos, "instance_prompt": prompts[0],
            "class_data_dir": self.class_images, "class_prompt": prompts[1], "num_class_images": 16,
            "output_dir": self.folder / "peer", "resolution": 64, "train_batch_size": 2, "learning_rate": 1e-4,
            "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": self.options.peer_steps,
        }  # fmt: skip
        arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "tests.benchmarks.peer", str(self.options.peer.resolve()), *arguments]
        done = subprocess.run([*command, "--with_prior_preservation"], cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.options.peer} stopped with code {done.returncode}:\n{done.stderr[-3000:]}")
        return seconds_per_step(json.loads(done.stdout.strip().splitlines()[-1]))


MEASUREMENTS: dict[str, Callable[[Bench], dict]] = {
    "help_time": Bench.help_time,
    "help_memory": Bench.help_memory,
    "training_step": Bench.training_step,
    "sampling": Bench.sampling,
    "dreambooth": Bench.dreambooth,
    "textual_inversion": Bench.textual_inversion,
    "clip_loading": Bench.clip_loading,
    "clip_sampling": Bench.clip_sampling,
    "clip_tuning": Bench.clip_tuning,
    "rendering": Bench.rendering,
    "distillation_step": Bench.distillation_step,
}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    options = tyro.cli(SpeedOptions, args=argv)
    unknown = set(options.only) - MEASUREMENTS.keys()
    if unknown:
        raise ValueError(f"there is no measurement {sorted(unknown)}; there are {list(MEASUREMENTS)}")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for name in options.only or MEASUREMENTS:
            measured = MEASUREMENTS[name](bench)
            results[name] = {
                "what": MEASUREMENTS[name].__doc__,
                **measured,
                "met": measured["value"] <= measured["goal"],
            }
            print(f"{name}: {measured['value']:.3g} {measured['unit']} (goal {measured['goal']})", file=sys.stderr)
    machine = f"{describe_machine()}, {torch.get_num_threads()} threads"
    report = {"machine": machine, "commit": git_commit(), "versions": package_versions(), "quick": options.quick}
    text = json.dumps(report | {"results": results}, indent=2) + "\n"
    print(text, end="")
    if options.output is not None:
        atomic_write_text(options.output, text)


if __name__ == "__main__":
    main()

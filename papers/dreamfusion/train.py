"""Make an object from a prompt: `python -m papers.dreamfusion.train --help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from common.backbones import load_backbone
from common.three_d.views import save_object
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.optimize import default_device

from .config import DreamFusionConfig
from .method import ARTIFACT, OCCUPANCY_EVERY, DreamFusion


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Make an object from a prompt."""

    prompt: str
    """What it is, without a view: "a bear"."""
    output: Path
    """Gets field.safetensors, turntable.mp4, *.gif, mesh.glb and viewer.html; training/ in it is the run folder."""
    backbone: str = "tiny-sd"
    """A preset (tiny-sd, sd15, sd21), hub id, or folder. It decides the defaults."""
    config: tyro.conf.OmitArgPrefixes[DreamFusionConfig] = field(default_factory=DreamFusionConfig.tiny)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the forward pass; field and background stay float32."""
    checkpoint_every: int = 160
    """Steps."""
    sample_every: int = 160
    """Steps between pictures from four sides."""
    resume: bool = False
    """Continue the run in the output folder."""


def learn(method: DreamFusion, run: Path, **options: Any) -> None:
    """Optimise the field.   options: `resume` of `fit`, and fields of FitConfig."""
    config = method.config
    resume = options.pop("resume", False)
    fit(
        method,
        [{"view": 0}],  # a step needs no data but its number
        FitConfig(
            train_steps=config.train_steps, learning_rate=config.learning_rate, batch_size=config.views_per_step,
            adam_betas=(0.9, 0.99), max_grad_norm=None, seed=config.seed, **options,
        ),
        run,
        sample_grid=lambda: method.views(4).images(),
        scalars=lambda: method.losses,
        resume=resume,
    )  # fmt: skip


def train(options: TrainOptions) -> DreamFusion:
    """Everything in plain sight: backbone, field, loop, outputs."""
    backbone = load_backbone(options.backbone, device=default_device())
    method = DreamFusion(backbone, options.config, options.prompt)
    for group in method.parameters():
        for name, parameter in group["params"]:
            print(f"training {name}: {tuple(parameter.shape)}, {parameter.numel():,} numbers, lr {group['lr']:g}")

    learn(
        method,
        options.output / "training",
        resume=options.resume,
        mixed_precision=options.mixed_precision,
        checkpoint_every=options.checkpoint_every - options.checkpoint_every % OCCUPANCY_EVERY,
        sample_every=options.sample_every,
    )
    method.save(options.output)
    save_object(method.field, method.background, options.output)
    print(f"wrote {ARTIFACT}, turntable.mp4 and more to {options.output}")
    return method


@dataclass(frozen=True)
class _Backbone:
    backbone: str = "tiny-sd"


def main(argv: list[str] | None = None) -> None:
    """Defaults are the paper's, or those of tiny() for tiny-sd; every field is a flag."""
    chosen, _ = tyro.cli(_Backbone, args=argv, return_unknown_args=True, add_help=False)
    config = DreamFusionConfig.tiny() if chosen.backbone == "tiny-sd" else DreamFusionConfig()
    train(
        tyro.cli(TrainOptions, args=argv, default=TrainOptions(prompt=tyro.MISSING, output=tyro.MISSING, config=config))
    )


if __name__ == "__main__":
    main()

"""Learn one relation from a folder of exemplars: `python -m papers.reversion.train --help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import PartialState

from common.backbones import load_backbone
from common.training.config import FitConfig
from common.training.loop import fit
from common.training.optimize import default_device

from .config import ReVersionConfig
from .exemplars import RelationDataset
from .method import ARTIFACT, ReVersion

SAMPLE_SEEDS = [0, 1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Learn one relation from pictures that share it."""

    images: Path
    """Folder of 4-10 pictures that share a relation, and text.json: {"a.jpg": ["cat {} stone", ...], ...}."""
    output: Path
    """Run folder; the artifact learned_embeds.safetensors is written into it."""
    backbone: str = "tiny-sd"
    """A preset (tiny-sd, sd14, sd15, sd21), a hub id, or a diffusers folder. It decides the defaults below."""
    config: tyro.conf.OmitArgPrefixes[ReVersionConfig] = field(default_factory=ReVersionConfig.tiny)
    latent_cache: Path | None = None
    """Folder that keeps encoded pictures between runs."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the forward pass; the word stays float32."""
    gradient_accumulation_steps: int = 1
    """Parts of a batch that are computed one after another, to save memory. The steering loss is then that of each
    part; with 1 it is that of the whole batch."""
    gradient_checkpointing: bool = False
    """Less memory, about 30% slower."""
    checkpoint_every: int = 250
    """Steps."""
    validate_every: int = 100
    """Steps between fixed-noise losses on the exemplars; 0 = only at the end."""
    sample_every: int = 0
    """Steps between sample grids; 0 = only at the end."""
    resume: bool = False
    """Continue the run in the output folder."""


def fit_config(config: ReVersionConfig, **options: object) -> FitConfig:
    """Settings of the loop. Gradients are not clipped.   options: more fields of FitConfig."""
    return FitConfig(
        train_steps=config.train_steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        max_grad_norm=None,
        seed=config.seed,
        **options,
    )


def train(options: TrainOptions) -> ReVersion:
    """Everything in plain sight: backbone, data, method, loop, save."""
    config = options.config
    backbone = load_backbone(options.backbone, device=default_device())
    method = ReVersion(backbone, config)
    dataset = RelationDataset(
        options.images, backbone, config.placeholder_token, seed=config.seed, cache_dir=options.latent_cache
    )
    plain = [dataset[i] for i in range(len(dataset))]
    latents = torch.stack([item["latents"] for item in plain]).to(backbone.device)
    prompts = [item["prompt"] for item in plain]

    is_main = PartialState(cpu=backbone.device.type == "cpu").is_main_process
    if is_main:
        print(f"training {config.placeholder_token}, {method.relation.numel():,} numbers")

    fit(
        method,
        dataset,
        fit_config(
            config,
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            gradient_checkpointing=options.gradient_checkpointing,
            checkpoint_every=options.checkpoint_every,
            validate_every=options.validate_every,
            sample_every=options.sample_every,
        ),
        options.output,
        validate=lambda: method.validation_loss(latents, prompts),
        sample_grid=lambda: method.generate(prompts[0], seeds=SAMPLE_SEEDS),
        resume=options.resume,
    )
    if is_main:
        method.save(options.output)
        print(f"wrote {options.output / ARTIFACT}; use {config.placeholder_token} in prompts")
    return method


@dataclass(frozen=True)
class _Backbone:
    backbone: str = "tiny-sd"


def main(argv: list[str] | None = None) -> None:
    """Defaults are the paper's, or those of tiny() for tiny-sd; every field is a flag."""
    chosen, _ = tyro.cli(_Backbone, args=argv, return_unknown_args=True, add_help=False)
    preset = ReVersionConfig.tiny if chosen.backbone == "tiny-sd" else ReVersionConfig
    defaults = TrainOptions(images=tyro.MISSING, output=tyro.MISSING, config=preset())
    train(tyro.cli(TrainOptions, args=argv, default=defaults))


if __name__ == "__main__":
    main()

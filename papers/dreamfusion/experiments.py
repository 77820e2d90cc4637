"""What reproduce.py measures: toy objects made from their names, seen from all sides by the judge."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.backbones import load_backbone
from common.distillation.sds import picture_latents, sds_weights
from common.evaluation import metrics
from common.evaluation.objects_3d import janus_rate, saturation
from common.evaluation.trials import Scores, backbone_hashes, folder_name, keep_settings
from common.io import atomic_write_text
from common.toyworld.judge import Judge
from common.training.config import flat_config
from common.training.optimize import default_device
from common.training.seeding import seeded_generator

from .config import DreamFusionConfig
from .method import ARTIFACT, DreamFusion, load_method
from .train import learn
from .variants import albedo_only, fixed_prompt, with_omega

PROPOSAL, FIXED, ALBEDO = "DreamFusion", "one prompt for all views", "albedo only"
WEAK, STRONG = "omega 7.5", "omega 100"
SDS, WITHOUT_NOISE = "w (eps_hat - eps)", "w eps_hat"
JANUS, CLASS, SIDES, TEXTURELESS = "janus", "class", "class right sides", "textureless class"
SATURATION, DIVERSITY, SECONDS = "saturation", "diversity", "seconds"
VARIANCE, AGREEMENT = "gradient variance", "gradient agreement"
NOUNS = ("dog", "car", "duck", "robot", "house", "cat")  # "bear" is what the settings were chosen with
VIEWS, TURNTABLE = 8, 24


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    config: DreamFusionConfig
    num_objects: int = 4
    seeds: tuple[int, ...] = (0, 1)  # of the two guidance weights; the other candidates have the first one
    num_draws: int = 400  # of timestep and noise, for the variance

    @classmethod
    def full(cls) -> "Plan":
        return cls(DreamFusionConfig.tiny())

    @classmethod
    def quick(cls) -> "Plan":
        return cls(replace(DreamFusionConfig.tiny(), train_steps=3, num_samples=12), num_objects=1, num_draws=8)

    @property
    def nouns(self) -> tuple[str, ...]:
        return NOUNS[: self.num_objects]

    def candidates(self) -> dict[str, DreamFusionConfig]:
        """The proposal first."""
        return {
            PROPOSAL: self.config,
            FIXED: fixed_prompt(self.config),
            ALBEDO: albedo_only(self.config),
            WEAK: with_omega(self.config, 7.5),
            STRONG: with_omega(self.config, 100.0),
        }

    def seeds_of(self, name: str) -> tuple[int, ...]:
        return self.seeds if name in (WEAK, STRONG) else self.seeds[:1]


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """Scores of all candidates; of each object, a mean over seeds."""
    judge = Judge.load()
    scores: Scores = {}
    for name, config in plan.candidates().items():
        for noun in plan.nouns:
            made = [trained(backbone_name, replace(config, seed=s), noun, runs / folder_name(name))
                    for s in plan.seeds_of(name)]  # fmt: skip
            rows = [look_at(method, judge, noun) | {SECONDS: seconds} for method, seconds in made]
            for score in rows[0]:
                mean = sum(row[score] for row in rows) / len(rows)
                scores.setdefault(score, {}).setdefault(name, {})[noun] = mean
            if len(made) > 1:
                pictures = [method.views(VIEWS).images() for method, _ in made]
                scores.setdefault(DIVERSITY, {}).setdefault(name, {})[noun] = diversity(pictures, judge)
            if name == PROPOSAL:
                of_both = gradient_variances(made[0][0], plan.num_draws)
                for score, values in of_both.items():
                    for way, value in values.items():
                        scores.setdefault(score, {}).setdefault(way, {})[noun] = value
    return scores


def trained(backbone_name: str, config: DreamFusionConfig, noun: str, folder: Path) -> tuple[DreamFusion, float]:
    """An object, made or found again, and the seconds that it took, over all interruptions."""
    artifact = artifact_folder(folder, noun, config.seed)
    weights = backbone_hashes(load_backbone(backbone_name))
    keep_settings(artifact / "settings.json", flat_config(config=config, weights=weights))
    times = artifact / "seconds.json"
    before = json.loads(times.read_text(encoding="utf-8")) if times.is_file() else 0.0
    if not (artifact / ARTIFACT).is_file():
        started = time.perf_counter()
        method = DreamFusion(load_backbone(backbone_name, device=default_device()), config, f"a {noun}")
        try:
            learn(method, artifact / "training", resume=True)
        finally:
            before += time.perf_counter() - started
            atomic_write_text(times, json.dumps(before))
        method.save(artifact)
    return load_method(artifact, backbone_name, default_device()), before


def artifact_folder(folder: Path, noun: str, seed: int) -> Path:
    """Where an object of a candidate is kept."""
    return folder / f"{noun}-{seed}"


@torch.no_grad()
def look_at(method: DreamFusion, judge: Judge, noun: str) -> dict[str, float]:
    """What the judge reads from VIEWS sides."""
    plain, bare = method.views(VIEWS), method.views(VIEWS, light="textureless")
    read, of_bare = judge.read(plain.images()), judge.read(bare.images())
    kind = judge.labels["class"].index(noun)
    sides = [k * VIEWS // 4 for k in range(4)]
    return {
        JANUS: janus_rate(judge, method.views(TURNTABLE).images()),
        CLASS: read["class"][:, kind].mean().item(),
        SIDES: (read["class"].argmax(-1)[sides] == kind).double().sum().item(),
        TEXTURELESS: of_bare["class"][:, kind].mean().item(),
        SATURATION: saturation(plain.rgb, plain.opacity[..., 0] > 0.5),
    }


@torch.no_grad()
def diversity(pictures: list[Tensor], judge: Judge) -> float:
    """1 - cosine of the judge's features of two seeds, side by side; a mean over sides and pairs."""
    features = torch.stack([judge.features(views) for views in pictures])  # (seeds, views, D)
    per_side = [metrics.diversity(side, metrics.cosine_distance) for side in features.unbind(1)]
    return sum(per_side) / len(per_side)


@torch.no_grad()
def gradient_variances(method: DreamFusion, num_draws: int) -> Mapping[str, dict[str, float]]:
    """With the same picture and many timesteps and noises: the variance of both forms of the gradient, a sum over the
    latents' numbers; and how far their means are apart, in standard errors of that difference (about 1 if they agree).
    """
    latents, told = picture_latents(method.backbone, method.views(1).images()), method.prompts.of(["front"])
    generator = seeded_generator(0, "variance")
    predict, scheduler = method.predictor(told), method.backbone.noise_scheduler
    subtracted, plain = [], []
    for _ in range(num_draws):
        timesteps = torch.randint(20, 981, (1,), generator=generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        weight = sds_weights(scheduler.alphas_cumprod, timesteps, method.config.weighting)
        found = predict(method.backbone.add_noise(latents, noise, timesteps), timesteps)
        subtracted.append(weight * (found - noise))
        plain.append(weight * found)
    of_both = {SDS: torch.cat(subtracted).double(), WITHOUT_NOISE: torch.cat(plain).double()}
    variances = {name: draws.var(0).sum().item() for name, draws in of_both.items()}
    difference = of_both[SDS] - of_both[WITHOUT_NOISE]
    errors = (difference.var(0) / num_draws).sqrt()
    apart = F.mse_loss(difference.mean(0) / errors, torch.zeros_like(errors)).sqrt().item()
    return {VARIANCE: variances, AGREEMENT: {SDS: apart}}

"""Two subjects in one image: plain joint training, Cut-Mix-Unmix, and Cut-Mix-Unmix with the attention loss.

Each subject is paired with the next one. Pictures are asked for in words that training does not use, and tiny-sd's
pictures of "a A next to a B" have one object in each half, so the halves are judged apart.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.backbones import load_backbone
from common.backbones.attention import install
from common.backbones.attention_hooks import RecordProbabilities
from common.evaluation.class_samples import save_samples
from common.evaluation.records import config_hash
from common.evaluation.study import Scores, folder_name
from common.fingerprint import weights_hash
from common.io import atomic_write_text
from common.toyworld import relations
from common.toyworld.benchmark import Subject
from common.toyworld.judge import Judge
from common.toyworld.render import render
from common.toyworld.sampling import compose
from common.training.config import flat_config
from common.training.optimize import default_device
from common.training.seeding import seeded_randn

from .config import SVDiffConfig
from .cutmix import token_positions
from .experiments import Plan
from .method import ARTIFACT, SVDiff, load_method
from .train import TrainOptions, train

PLAIN, CUT_MIX, UNMIX = "plain joint", "Cut-Mix-Unmix", "attention loss"
UNMIX_WEIGHT = 100.0  # at which the attention loss is about as large as the denoising loss on tiny-sd
VARIANTS = {
    PLAIN: {"cut_mix_probability": 0.0},
    CUT_MIX: {},
    UNMIX: {"unmix_loss_weight": UNMIX_WEIGHT},
}
TOGETHER = "{} next to a {}"
SWAPPABLE = ("color", "pattern", "material")  # the class says which of the two an object is
BACKGROUNDS, TIMESTEPS = ("meadow", "snow", "room", "desert"), (200, 400, 600)  # of the attention that is measured


def pair_config(plan: Plan, subject: Subject, variant: str) -> SVDiffConfig:
    """Prior loss is on: class pairs are collaged as subjects are."""
    nouns = (subject.class_noun, plan.next_to(subject).class_noun)
    return replace(
        plan.config, class_nouns=nouns, train_steps=plan.pair_steps, prior_loss_weight=1.0, **VARIANTS[variant]
    )


def together(config: SVDiffConfig) -> str:
    """ "a photo of a sks bear next to a zwx robot"."""
    return config.prompt_template.format(TOGETHER.format(*config.words))


def measure_pairs(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """ "swap rate", see `swap_rate`; "foreign attention" and "foreign share", see `attention_masses`; by variant and
    first subject."""
    judge, scores = Judge.load(), {"swap rate": {}, "foreign attention": {}, "foreign share": {}}
    unet = weights_hash(load_backbone(backbone_name).unet)
    for subject in plan.subjects():
        other = plan.next_to(subject)
        for variant in VARIANTS:
            method = learn_pair(backbone_name, unet, plan, subject, variant, runs)
            pictures = method.generate(together(method.config), seeds=list(plan.pair_seeds))
            save_samples(pictures, pair_folder(runs, variant, subject) / "samples")
            own, foreign = attention_masses(method, subject, other)
            found = {
                "swap rate": swap_rate(judge, pictures, subject.attributes, other.attributes),
                "foreign attention": foreign,
                "foreign share": foreign / (own + foreign),
            }
            for score, value in found.items():
                scores[score].setdefault(variant, {})[subject.name] = value
    return scores


def learn_pair(backbone_name: str, unet: str, plan: Plan, subject: Subject, variant: str, runs: Path) -> SVDiff:
    """Train on both subjects, unless that is done with the same settings and weights. Class images are shared.

    Args: unet: hash of the backbone's weights.
    """
    folder, config = pair_folder(runs, variant, subject), pair_config(plan, subject, variant)
    made_with, origin = folder / "made_with.txt", config_hash([flat_config(config=config), unet])
    if made_with.is_file() and made_with.read_text() == origin and (folder / ARTIFACT).is_file():
        return load_method(folder, device=default_device())
    shutil.rmtree(folder, ignore_errors=True)
    photos = tuple(folder / "photos" / each.name for each in (subject, plan.next_to(subject)))
    for path, each in zip(photos, (subject, plan.next_to(subject)), strict=True):
        save_samples(each.images, path)
    options = TrainOptions(
        images=photos, output=folder, backbone=backbone_name, config=config, num_samples=0,
        class_images=runs / "class_images" / unet,
    )  # fmt: skip
    method = train(options)
    atomic_write_text(made_with, origin)
    return method


def pair_folder(runs: Path, variant: str, subject: Subject) -> Path:
    return runs / "pairs" / folder_name(variant) / subject.name


@torch.no_grad()
def swap_rate(judge: Judge, pictures: Tensor, first: dict[str, str], second: dict[str, str]) -> float:
    """Share of attributes for which an object looks more like the other subject's than like its own.

    The object in each half is cut out; which of the two it is, the judge's reading of the classes says. Attributes
    that both subjects share are left out.

    Args:
        pictures: (N,3,64,64) in [-1,1], an object in each half.
        first, second: the subjects' attributes.
    """
    halves = pictures.unfold(3, 32, 32)[:, :, 16:48].permute(3, 0, 1, 2, 4)  # (2, N, 3, 32, 32), left and right
    crops = F.interpolate(halves.flatten(0, 1), size=(64, 64), mode="bilinear", align_corners=False)
    read = {name: p.clamp(min=1e-9).log().unflatten(0, (2, -1)) for name, p in judge.read(crops).items()}

    def evidence(attribute: str) -> Tensor:
        """log p(first's label) - log p(second's label), (2, N)."""
        labels = judge.labels[attribute]
        ours, theirs = labels.index(first[attribute]), labels.index(second[attribute])
        return read[attribute][..., ours] - read[attribute][..., theirs]

    first_is_left = evidence("class")[0] >= evidence("class")[1]  # (N,)
    sign = torch.where(first_is_left, 1.0, -1.0)
    differing = [name for name in SWAPPABLE if first[name] != second[name]]
    wrong = [torch.stack([sign * evidence(name)[0] < 0, sign * evidence(name)[1] > 0]) for name in differing]
    return torch.stack(wrong).double().mean().item()


@torch.no_grad()
def attention_masses(method: SVDiff, first: Subject, second: Subject) -> tuple[float, float]:
    """Mean probability of a special token inside its own object's mask, and inside the other's; over both tokens.

    On renders of both side by side, whose masks are known, noised to `TIMESTEPS`.
    """
    backbone, config = method.backbone, method.config
    rng = np.random.default_rng(95)
    scenes = [
        compose(
            rng, relations.place("next to", first.entity, second.entity), background=place, relation="next to",
            fill=0.86, spread_deg=8.0,
        )
        for place in BACKGROUNDS
    ]  # fmt: skip
    rendered = render(scenes)
    latents = backbone.encode_images(rendered.images * 2 - 1)
    masks = torch.stack([rendered.masks == 1, rendered.masks == 2], 1).float()  # (N, 2, 64, 64)
    prompt, own, foreign = together(config), [], []
    positions = [token_positions(backbone.tokenizer, prompt, word) for word in config.identifiers[:2]]
    grids = {(size, size) for size in config.unmix_resolutions}
    recorder = RecordProbabilities(lambda layer: layer.kind == "cross" and layer.resolution in grids)
    for timestep in TIMESTEPS:
        noise = seeded_randn(torch.arange(len(latents)), tuple(latents.shape[1:]), seed=timestep).to(latents)
        steps = torch.full((len(latents),), timestep, device=latents.device)
        with method.merged(), install(backbone.unet, [recorder]):
            conditioning = backbone.encode_prompt(prompt).repeat(len(latents))
            backbone.predict(backbone.add_noise(latents, noise, steps), steps, conditioning)
        for layer, probabilities in recorder.by_layer.items():
            areas = F.interpolate(masks, size=layer.resolution, mode="area").flatten(2).to(probabilities)  # (N, 2, Q)
            for subject, at in enumerate(positions):
                inside = torch.einsum("nq,nkq->nk", probabilities[..., at].mean(-1), areas) / areas.sum(2)
                own.append(inside[:, subject])
                foreign.append(inside[:, 1 - subject])
    return torch.stack(own).mean().item(), torch.stack(foreign).mean().item()

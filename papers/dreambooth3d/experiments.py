"""What reproduce.py measures: toy objects from five photos, against renderings of them that no method has seen."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.backbones import load_backbone
from common.distillation import view_of
from common.evaluation.motion import neighbour_consistency
from common.evaluation.objects_3d import (
    color_histogram,
    depth_error,
    frame_views,
    histogram_distance,
    janus_rate,
    psnr,
    saturation,
    view_entropy,
)
from common.evaluation.trials import Scores, backbone_hashes, keep_settings
from common.three_d.cameras import angles_of, orbit_cameras, to_toyworld
from common.three_d.render import Rendering, render
from common.toyworld.benchmark import PosedObject, objects_3d
from common.toyworld.judge import Judge
from common.toyworld.render import Render
from common.toyworld.render import render as render_scenes
from common.toyworld.scene import Placed, Scene
from common.training.config import flat_config
from common.training.optimize import default_device

from .config import DreamBooth3DConfig
from .method import FULL, PARTIAL, DreamBooth3D
from .pseudo_views import PseudoViews
from .subject_field import SubjectField
from .tuning import SubjectTuning, instance_prompt
from .variants import naive, without_reconstruction

PROPOSAL, NAIVE, SDS_ONLY = "DreamBooth3D", "DreamBooth+Fusion", "without reconstruction"
FIRST_FIELD, UNTUNED, RENDERS, PSEUDO = "first field", "untuned", "renderings", "pseudo views"
PSNR, DEPTH, JANUS, CONSISTENCY = "held-out PSNR", "depth error", "janus", "view consistency"
SATURATION, COLOR, CLASS = "saturation", "colour distance", "class"
ENTROPY, SIMILARITY, POSE = "view entropy", "similarity to photos", "view right"
TURNS_DEG = (-30.0, -15.0, 0.0, 15.0, 30.0)  # of the object; the best one counts, for all candidates
TURNTABLE = 24
FIRST_OBJECT = 1  # the settings were chosen with object 0, a bear


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    config: DreamBooth3DConfig
    num_objects: int = 4
    num_samples: int = 6  # of each tuned model and view

    @classmethod
    def full(cls) -> "Plan":
        return cls(DreamBooth3DConfig.tiny("object"))

    @classmethod
    def quick(cls) -> "Plan":
        config = DreamBooth3DConfig.tiny("object")
        tuning = replace(config.tuning, partial_steps=1, full_steps=2, multi_steps=1)
        field = replace(config.field, num_samples=12)
        config = replace(
            config, first_steps=2, final_steps=2, num_pseudo_views=3, num_inference_steps=4, tuning=tuning, field=field
        )
        return cls(config, num_objects=1, num_samples=2)

    def objects(self) -> list[PosedObject]:
        return objects_3d(FIRST_OBJECT + self.num_objects)[FIRST_OBJECT:]

    def config_of(self, item: PosedObject) -> DreamBooth3DConfig:
        return replace(self.config, class_noun=item.entity.noun)


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """Scores of all candidates, object by object."""
    judge, scores = Judge.load(), {}

    def put(score: str, name: str, noun: str, value: float) -> None:
        scores.setdefault(score, {}).setdefault(name, {})[noun] = value

    for item in plan.objects():
        noun, method = item.entity.noun, method_of(backbone_name, plan, item, runs)
        weights = backbone_hashes(load_backbone(backbone_name))
        keep_settings(method.folder / "settings.json", flat_config(config=method.config, weights=weights))
        for name, made in fields(method).items():
            for score, value in look_at(made, item, judge).items():
                put(score, name, noun, value)
        views = method.pseudo_views(method.first_field())
        for score, values in look_at_pseudo_views(views, item, judge, method.config).items():
            for name, value in values.items():
                put(score, name, noun, value)
        for name, pictures in samples(method, plan.num_samples).items():
            put(ENTROPY, name, noun, view_entropy(judge, pictures))
            put(SIMILARITY, name, noun, similarity(judge, pictures, method.photos))
    return scores


def photos_on_white(item: PosedObject) -> Tensor:
    """(K,3,64,64) in [-1,1]."""
    return torch.where((item.photos.masks > 0)[:, None], item.photos.images * 2 - 1, 1.0)


def method_of(backbone_name: str, plan: Plan, item: PosedObject, runs: Path) -> DreamBooth3D:
    """The proposal for an object, in its folder."""
    return DreamBooth3D(
        partial(load_backbone, backbone_name, device=default_device()), plan.config_of(item), photos_on_white(item),
        runs / item.entity.noun,
    )  # fmt: skip


def fields(method: DreamBooth3D) -> dict[str, SubjectField]:
    """All candidates' fields, made or found again; baselines share what they have in common with the proposal."""
    config = method.config
    final = method.run()
    first = method.first_field()
    views = method.pseudo_views(first)
    plain = DreamBooth3D(
        method.make_backbone, without_reconstruction(config), method.photos, method.folder, **method.options
    )
    return {
        PROPOSAL: final,
        NAIVE: naive(method),
        SDS_ONLY: sds_only(plain, views),
        FIRST_FIELD: first,
    }


def sds_only(method: DreamBooth3D, views: PseudoViews) -> SubjectField:
    """The final stage of a method without reconstruction, beside the proposal's."""
    return method.distil("without_reconstruction", method.tune_multi(views), method.config.final_steps, views)


@torch.no_grad()
def look_at(made: SubjectField, item: PosedObject, judge: Judge) -> dict[str, float]:
    """A field against the object's held-out views, which all candidates are compared with at the size they have."""
    truth = item.held_out
    found = [of_turn(made, turn, len(truth.cameras)) for turn in TURNS_DEG]
    errors = [psnr(*framed(rendering, truth)) for rendering in found]
    best = found[errors.index(max(errors))]
    around = of_turn(made, 0.0, TURNTABLE)
    pictures, sides = around.images(), found[TURNS_DEG.index(0.0)].images()
    histograms = [color_histogram(best.rgb, opaque(best)), photo_histogram(item)]
    return {
        PSNR: max(errors),
        DEPTH: framed_depth_error(best, truth),
        JANUS: janus_rate(judge, pictures),
        CLASS: judge.read(sides)["class"][:, judge.labels["class"].index(item.entity.noun)].mean().item(),
        CONSISTENCY: neighbour_consistency(judge.features(pictures)[None])[0].item(),
        SATURATION: saturation(best.rgb, opaque(best)),
        COLOR: histogram_distance(*histograms),
    }


def of_turn(made: SubjectField, turn_deg: float, count: int) -> Rendering:
    """A field from evenly spaced sides, with its front turned away by some degrees."""
    azimuths = torch.arange(count) * 360 / count + turn_deg
    cameras = orbit_cameras(azimuths, 15.0, 2.5, resolution=64).to(made.field.aabb.device)
    return render(made.field, cameras, background=made.background, num_samples=made.config.field.num_samples)


def opaque(rendering: Rendering) -> Tensor:
    """(N,H,W)."""
    return rendering.opacity[..., 0] > 0.5


def photo_histogram(item: PosedObject) -> Tensor:
    """Of the object's colours in its photos."""
    return color_histogram(item.photos.images.permute(0, 2, 3, 1), item.photos.masks > 0)


def framed(rendering: Rendering, truth: Render) -> tuple[Tensor, Tensor]:
    """Both on white, cut out alike."""
    masks = truth.masks > 0
    pictures = torch.where(masks[:, None], truth.images * 2 - 1, 1.0)
    return frame_views(rendering.images(), opaque(rendering)), frame_views(pictures, masks)


def framed_depth_error(rendering: Rendering, truth: Render) -> float:
    """Depths of both where both are, cut out alike."""
    masks = truth.masks > 0
    parts = []
    for depth, seen in ((rendering.depth[..., 0], opaque(rendering)), (truth.depth.clamp(max=100.0), masks)):
        both = torch.stack([torch.where(seen, depth, 0.0), seen.float()], 1)
        cut = frame_views(both, seen)
        parts += [cut[:, 0] / cut[:, 1].clamp(min=1e-6), cut[:, 1] > 0.99]
    return depth_error(*parts)


@torch.no_grad()
def look_at_pseudo_views(
    views: PseudoViews, item: PosedObject, judge: Judge, config: DreamBooth3DConfig
) -> dict[str, dict[str, float]]:
    """Renderings and pseudo views against the object seen by the same cameras, and the view that the judge names."""
    cameras = views.cameras(views.pictures.shape[-1])
    shown = render_scenes([Scene((Placed(item.entity),), "snow", camera=camera) for camera in to_toyworld(cameras)])
    masks = shown.masks > 0
    truth = torch.where(masks[:, None], shown.images * 2 - 1, 1.0)
    azimuths, elevations, _ = angles_of(cameras)
    names = [judge.labels["view"].index(view) for view in view_of(azimuths, elevations)]
    side = truth.shape[-1]
    found: dict[str, dict[str, float]] = {PSNR: {}, POSE: {}}
    for name, pictures in ((RENDERS, views.renderings), (PSEUDO, views.pictures)):
        pictures = F.interpolate(pictures, (side, side), mode="area")
        found[PSNR][name] = psnr(pictures, truth)
        right = judge.read(pictures)["view"].argmax(-1) == torch.tensor(names)
        found[POSE][name] = right.double().mean().item()
    return found


def samples(method: DreamBooth3D, count: int) -> dict[str, Tensor]:
    """Pictures by the untuned, the partially and the fully tuned model, of prompts that name front, side and back."""
    made = {}
    for name, tune in ((UNTUNED, method.make_backbone), (PARTIAL, method.tune_partial), (FULL, method.tune_full)):
        tuned = SubjectTuning(tune(), method.config, 0)
        prompts = [f"{instance_prompt(method.config)}, {view} view" for view in ("front", "side", "back")]
        made[name] = torch.cat([tuned.generate(prompt, seeds=list(range(count))) for prompt in prompts]).cpu()
    return made


def similarity(judge: Judge, pictures: Tensor, photos: Tensor) -> float:
    """Mean cosine of the judge's features of samples and photos."""
    a, b = (F.normalize(judge.features(images), dim=-1) for images in (pictures, photos))
    return (a @ b.T).mean().item()

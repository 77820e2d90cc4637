"""Pictures and their ground truth belong together, and depend on the scene alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.toyworld import relations, styles
from common.toyworld.poses import POSES
from common.toyworld.render import render
from common.toyworld.sampling import compose, sample_object, sample_person
from common.toyworld.scene import Camera, Entity, Placed, Scene
from common.toyworld.vocabulary import (
    BACKGROUNDS,
    HELD_OUT_ACTIONS,
    HELD_OUT_RELATIONS,
    HELD_OUT_STATES,
    HELD_OUT_STYLES,
    OBJECT_CLASSES,
    RELATIONS,
    STATES,
    STYLES,
    VIEWS,
)
from common.toyworld.vocabulary import (
    POSES as POSE_NAMES,
)


def scene_of(entity: Entity, seed: int = 0, **settings) -> Scene:
    return compose(np.random.default_rng(seed), (Placed(entity),), **{"background": "meadow"} | settings)


def test_every_class_is_well_seen_from_every_side():
    rng = np.random.default_rng(0)
    scenes = [scene_of(sample_object(rng, noun), view=view) for noun in OBJECT_CLASSES for view in VIEWS]
    for scene, mask in zip(scenes, render(scenes).masks > 0, strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        extent = max(rows.max() - rows.min(), columns.max() - columns.min()).item() / 64
        assert 1 / 3 <= extent <= 0.95, (scene.placed[0].entity.noun, scene.view, extent)


def test_all_states_poses_relations_styles_and_backgrounds_look_different():
    rng = np.random.default_rng(1)
    bear, mug, person = sample_object(rng, "bear"), sample_object(rng, "mug"), sample_person(rng, portrait=False)
    for variants in (
        [scene_of(replace(bear, state=state)) for state in (*STATES, *HELD_OUT_STATES)],
        [scene_of(replace(person, pose=pose)) for pose in (*POSE_NAMES, *HELD_OUT_ACTIONS)],
        [scene_of(bear, style=style) for style in (*STYLES, *HELD_OUT_STYLES)],
        [scene_of(bear, background=background) for background in BACKGROUNDS],
        [
            compose(np.random.default_rng(0), relations.place(r, bear, mug), background="meadow", relation=r)
            for r in (*RELATIONS, *HELD_OUT_RELATIONS)
        ],
    ):
        images = render(variants).images.flatten(1)
        distances = torch.cdist(images, images) + torch.eye(len(images)) * 1e3
        assert distances.min() > 1.0


def test_ground_truth_agrees_with_itself():
    rng = np.random.default_rng(2)
    placed = relations.place("next to", sample_object(rng, "dog"), sample_object(rng, "car"))
    result = render([compose(rng, placed, background="snow", relation="next to")])
    entity = result.masks[0] > 0
    assert set(result.masks.unique().tolist()) == {0, 1, 2}
    assert torch.equal(result.parts[0] > 0, entity)
    of_part = [k for k, _ in result.part_names[0]]
    for part in result.parts[0].unique().tolist():
        if part:
            assert set(result.masks[0][result.parts[0] == part].tolist()) == {of_part[part - 1] + 1}
    lengths = result.normals[0].norm(dim=0)
    assert torch.allclose(lengths[entity], torch.ones(int(entity.sum())), atol=1e-5) and not lengths[~entity].any()
    camera = result.cameras[0]
    nearest = np.linalg.norm(camera.position()) - 3
    assert result.depth[0][entity].min() > max(0.1, nearest) and result.depth[0][entity].max() < 20


def test_a_known_camera_sees_a_known_place():
    """A camera straight ahead at distance d with 90 degrees: a point x to the right lies at 32 (1 + x / d) pixels."""
    camera = Camera((0, 0.5, 0), azimuth_deg=0, elevation_deg=0, distance=4.0, fov_deg=90.0)
    assert camera.position() == pytest.approx([0, 0.5, 4])
    mug = sample_object(np.random.default_rng(0), "mug")
    for x in (-1.0, 0.0, 2.0):
        result = render([Scene((Placed(mug, (x, 0, 0)),), camera=camera)])
        body = result.part_names[0].index((0, "body"))
        assert result.keypoints[0][body][0] == pytest.approx(32 * (1 + x / 4), abs=0.01)
    wide = render([Scene((Placed(mug, (2.0, 0, 0)),), camera=camera)], resolution=128)
    assert wide.keypoints[0][body][0] == pytest.approx(96, abs=0.02)


def test_a_picture_depends_on_its_scene_alone():
    rng = np.random.default_rng(3)
    scenes = [scene_of(sample_object(rng), seed) for seed in range(4)]
    together = render(scenes).images
    alone = torch.cat([render([scene]).images for scene in scenes])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    assert torch.equal(together, render(scenes).images)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_agree():
    scenes = [scene_of(sample_object(np.random.default_rng(i)), i) for i in range(8)]
    difference = (render(scenes, device="cuda").images.cpu() - render(scenes).images).abs()
    assert difference.mean() < 1e-3


def test_names_that_do_not_exist_raise():
    rng = np.random.default_rng(0)
    bear, duck = sample_object(rng, "bear"), sample_object(rng, "duck")
    with pytest.raises(ValueError, match="unknown style 'oil'"):
        styles.stylize(
            torch.zeros(1, 3, 64, 64), ["oil"], lines=torch.zeros(1, 1, 64, 64), masks=torch.zeros(1, 64, 64)
        )
    with pytest.raises(ValueError, match="unknown relation"):
        relations.place("eats", bear, duck)
    with pytest.raises(ValueError, match="carry"):
        relations.place("carrying", duck, bear)
    with pytest.raises(ValueError, match="inside"):
        relations.place("inside", bear, duck)
    with pytest.raises(ValueError, match="unknown state"):
        replace(bear, state="angry").parts()
    with pytest.raises(ValueError, match="at least one scene"):
        render([])


def test_poses_are_unit_free_directions():
    assert set(POSE_NAMES) | set(HELD_OUT_ACTIONS) <= POSES.keys()

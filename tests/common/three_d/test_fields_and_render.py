"""Fields and renderer: nerfstudio's own renderers, a ball whose picture is known, gradients, empty space."""

import math

import pytest
import torch
import torch.nn.functional as F
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.model_components import losses as nerfstudio_losses
from nerfstudio.model_components.renderers import AccumulationRenderer, DepthRenderer, RGBRenderer

from common.three_d.background import LearnedBackground, SolidBackground
from common.three_d.cameras import CENTER, from_toyworld, orbit_cameras
from common.three_d.fields import HashField, TriplaneField, VoxelField
from common.three_d.losses import distortion_loss, opacity_loss, orientation_loss
from common.three_d.occupancy import Occupancy
from common.three_d.render import render
from common.three_d.shading import Light, sample_light_positions, sample_shading_mode, shade
from common.toyworld.benchmark import objects_3d
from common.training.seeding import seeded_generator


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_hash():
    return HashField(levels=4, log2_size=10, max_resolution=64)


@pytest.mark.parametrize("make", (lambda: VoxelField(16), lambda: TriplaneField(16), small_hash))
def test_a_rendering_is_what_nerfstudio_makes_of_the_field(make):
    """The field asked through nerfstudio's `forward`, composed by nerfstudio's renderers."""
    torch.manual_seed(0)
    field = make()
    camera = orbit_cameras([30.0], 10.0, 2.5, resolution=12)
    made = render(field, camera, background=SolidBackground((1.0, 1.0, 1.0)), num_samples=20)
    outputs = field(made.samples)
    weights = made.samples.get_weights(outputs[FieldHeadNames.DENSITY])
    torch.testing.assert_close(made.weights, weights, rtol=0, atol=1e-6)
    rgb = RGBRenderer.combine_rgb(outputs[FieldHeadNames.RGB], weights, background_color=torch.ones(3))
    torch.testing.assert_close(made.rgb.view(-1, 3), rgb, rtol=0, atol=1e-5)
    torch.testing.assert_close(made.opacity.view(-1, 1), AccumulationRenderer()(weights), rtol=0, atol=1e-5)
    seen = made.opacity.view(-1) > 0.1
    depth = DepthRenderer("expected")(weights, made.samples)
    torch.testing.assert_close(made.depth.view(-1, 1)[seen], depth[seen], rtol=0, atol=1e-3)


def test_the_picture_of_a_ball(ball):
    """Radius 0.4, seen from 3 away: size of the disc, distance of its nearest point, normals, left and right."""
    camera = orbit_cameras([0.0], 0.0, 3.0, 36.0, resolution=64)
    made = render(ball, camera, background=SolidBackground(), num_samples=200, with_normals=True)
    radius_px = 32 / math.tan(math.radians(18)) * math.tan(math.asin(0.4 / 3))
    assert (made.opacity > 0.5).sum().item() == pytest.approx(math.pi * radius_px**2, rel=0.03)
    assert made.depth[0, 32, 32].item() == pytest.approx(2.6, abs=0.03)
    left, right, corner = made.rgb[0, 32, 27], made.rgb[0, 32, 36], made.rgb[0, 0, 0]
    assert left[2] > 0.9 > 0.2 > left[0] and right[0] > 0.9 > 0.2 > right[2]  # +x is right of who looks at the front
    assert corner.tolist() == [1, 1, 1]
    assert made.normals[0, 32, 32].tolist() == pytest.approx([0, 0, 1], abs=0.1)
    assert made.normals[0, 24, 32, 1] > 0.5  # rows go down, y goes up
    assert orientation_loss(made) < 0.01


def test_normals_of_the_grid_are_those_of_autograd():
    """A smooth field on a fine grid; and they carry gradients to the grid, which nerfstudio's do not."""
    field = VoxelField(64)
    points = (0.3 * randn(200, 3)).clamp(-0.6, 0.6) + torch.tensor(CENTER)
    points = points[((points - torch.tensor(CENTER)).norm(dim=-1) > 0.15)].requires_grad_()
    (slope,) = torch.autograd.grad(field.density_at(points).sum(), points)
    normals = field.normals_at(points.detach())
    assert (normals * -F.normalize(slope, dim=-1)).sum(-1).min() > 0.97
    (normals * randn(*normals.shape)).sum().backward()
    assert field.grid.grad[:, :1].abs().max() > 0 and field.grid.grad[:, 1:].abs().max() == 0


def test_central_differences_of_a_ball(ball):
    points = torch.tensor(CENTER) + 0.4 * F.normalize(randn(50, 3), dim=-1)
    torch.testing.assert_close(
        ball.normals_at(points), F.normalize(points - torch.tensor(CENTER), dim=-1), rtol=0, atol=1e-3
    )


def test_gradients_of_a_lit_picture():
    """By finite differences along a random direction, in double precision."""
    field = VoxelField(6).double()
    field.aabb = field.aabb.double()
    camera = orbit_cameras([20.0], 15.0, 2.5, resolution=6)
    camera.camera_to_worlds = camera.camera_to_worlds.double()
    light = Light(torch.tensor([[1.0, 2.0, 2.0]]).double(), "lit")

    def brightness():
        made = render(field, camera, background=SolidBackground().double(), num_samples=9, light=light)
        return (made.rgb * randn(1, 6, 6, 3)).sum() + orientation_loss(made) * 0

    field.grid.data += 0.1 * randn(*field.grid.shape).double()
    brightness().backward()
    direction = randn(*field.grid.shape, seed=1).double()
    expected = (field.grid.grad * direction).sum().item()
    with torch.no_grad():
        field.grid += 1e-4 * direction
        above = brightness().item()
        field.grid -= 2e-4 * direction
        below = brightness().item()
    assert (above - below) / 2e-4 == pytest.approx(expected, rel=1e-2)


def test_what_is_empty_is_left_out_and_nothing_changes(ball):
    camera = orbit_cameras([0.0, 100.0], 10.0, 2.8, resolution=24)
    occupancy = Occupancy(ball, resolution=16)
    assert occupancy.cells.all()
    occupancy.update(ball)
    assert 0.1 < occupancy.cells.float().mean() < 0.5
    pictures = [
        render(ball, camera, background=SolidBackground(), num_samples=64, occupancy=o) for o in (None, occupancy)
    ]
    torch.testing.assert_close(pictures[1].rgb, pictures[0].rgb, rtol=0, atol=2e-3)
    points = torch.tensor([[0.0, 0.0, 0.0], [0.95, 0.95, 0.95], [0.0, 0.0, 1.2]])
    assert occupancy(points).tolist() == [True, False, False]


def test_fields_are_empty_outside_of_their_box():
    field = VoxelField(8)
    points = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.5, 0.86], [0.9, 0.5, 0.0]])
    density = field.density_at(points)
    assert density[0] > 1 and density[1:].tolist() == [0, 0]


def test_upsampling_keeps_the_values():
    field = VoxelField(9)
    points = torch.tensor(CENTER) + 0.2 * randn(30, 3)
    before = field.density_at(points)
    field.upsample(33)  # the corners of the old grid are corners of the new one
    torch.testing.assert_close(field.density_at(points), before, rtol=1e-4, atol=1e-4)


def test_shading_by_hand():
    """n = z, light straight ahead, at 60 degrees, and behind: brightness 0.9 cos + 0.1."""
    albedo = torch.tensor([[0.5, 0.2, 1.0]] * 3)
    normals, points = torch.tensor([[0.0, 0.0, 1.0]] * 3), torch.zeros(3, 3)
    lights = torch.tensor([[0.0, 0.0, 2.0], [3**0.5, 0.0, 1.0], [0.0, 0.0, -1.0]])
    brightness = torch.tensor([1.0, 0.55, 0.1])[:, None]
    torch.testing.assert_close(shade(albedo, normals, points, lights, "lit"), albedo * brightness)
    torch.testing.assert_close(shade(albedo, normals, points, lights, "textureless"), brightness.expand(3, 3))
    assert torch.equal(shade(albedo, normals, points, lights, "albedo"), albedo)


def test_how_often_each_shading_is_drawn():
    generator = torch.Generator().manual_seed(0)
    modes = [sample_shading_mode(100, generator, albedo_steps=100) for _ in range(4000)]
    shares = {mode: modes.count(mode) / 4000 for mode in ("albedo", "lit", "textureless")}
    assert shares == pytest.approx({"albedo": 0.25, "lit": 0.375, "textureless": 0.375}, abs=0.03)
    assert {sample_shading_mode(99, generator, albedo_steps=100) for _ in range(50)} == {"albedo"}


def test_lights_stand_around_the_target():
    target = torch.tensor(CENTER)
    cameras = torch.tensor([[0.0, 0.5, 3.0]]).expand(500, 3)
    lights = sample_light_positions(cameras, target, torch.Generator().manual_seed(0)) - target
    lengths = lights.norm(dim=-1)
    assert lengths.min() >= 0.8 and lengths.max() <= 1.5
    assert (lights[:, 2] > 0).float().mean() > 0.95  # mostly on the camera's side


def test_backgrounds():
    directions = F.normalize(randn(7, 3), dim=-1)
    assert SolidBackground((0.1, 0.2, 0.3))(directions).shape == (7, 3)
    learned = LearnedBackground()
    assert sum(p.numel() for p in learned.parameters()) == 448  # threestudio's count
    assert ((learned(directions) > 0) & (learned(directions) < 1)).all()


def test_regularisers(ball):
    camera = orbit_cameras([0.0], 0.0, 3.0, resolution=16)
    made = render(ball, camera, background=SolidBackground())
    expected = (made.opacity.square() + 0.01).sqrt().mean()
    torch.testing.assert_close(opacity_loss(made), expected)
    with pytest.raises(ValueError, match="with_normals"):
        orientation_loss(made)


def test_distortion_is_nerfstudios():
    field = VoxelField(16)
    camera = orbit_cameras([20.0], 10.0, 3.0, resolution=16)
    made = render(field, camera, background=SolidBackground(), num_samples=24, generator=seeded_generator(0, "jitter"))
    found, expected = distortion_loss(made), nerfstudio_losses.distortion_loss([made.weights], [made.samples])
    torch.testing.assert_close(found, expected)
    assert found > 0
    slopes = [torch.autograd.grad(loss, field.grid, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3 * slopes[1].abs().max().item())


def test_a_toy_object_is_fitted_from_its_pictures():
    """Cameras, field and renderer together: 15 views in 180 steps; of another view the error falls to a seventh."""
    item = objects_3d(1, views_each=16)[0]
    cameras, masks = from_toyworld(item.held_out.cameras, 64), (item.held_out.masks > 0).float()[..., None]
    target = item.held_out.images.permute(0, 2, 3, 1) * masks + (1 - masks)
    field, generator, background = VoxelField(32), torch.Generator().manual_seed(0), SolidBackground()
    optimizer = torch.optim.Adam(field.parameters(), lr=5e-2)
    errors = []
    for step in range(180):
        made = render(field, cameras[step % 15 : step % 15 + 1], background=background, generator=generator)
        loss = (made.rgb - target[step % 15]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    with torch.no_grad():
        unseen = render(field, cameras[15:], background=background)
    assert (unseen.rgb - target[15]).square().mean() < errors[0] / 7
    seen = item.held_out.masks[15] > 0
    assert (unseen.depth[0, ..., 0] - item.held_out.depth[15])[seen].abs().median() < 0.1

"""Render scenes to pictures with ground truth: mask, depth, normals, part segmentation, key points.

One flat list of (ray, primitive) pairs a batch: each primitive is tested only against the rays inside its projected
bounding box, hits are resolved with a z-buffer. The same code runs on CPU and GPU; pictures agree to rounding.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.toyworld import backgrounds, styles
from common.toyworld.geometry import FAR, half_extent, intersect
from common.toyworld.scene import Scene
from common.toyworld.vocabulary import MATERIALS, PATTERNS

RESOLUTION = 64
SUPERSAMPLING = 2
_LIGHT = (0.45, 0.75, 0.50)  # towards the light, camera frame: above, right, in front
_ICE = np.array([0.72, 0.90, 0.98])


@dataclass(frozen=True)
class Render:
    """B pictures and their ground truth, all (B, ..., H, W)."""

    images: Tensor  # (B, 3, H, W) float32 in [0, 1]
    masks: Tensor  # (B, H, W) int64: 0 background, k + 1 = entity k
    depth: Tensor  # (B, H, W) distance along the ray, 1e9 = sky
    normals: Tensor  # (B, 3, H, W) unit, world frame; 0 on background
    parts: Tensor  # (B, H, W) int64: index into part_names of the picture + 1, 0 = background
    part_names: list[list[tuple[int, str]]]  # per picture: (entity, part name) of each part
    keypoints: list[np.ndarray]  # per picture: centre of each part in pixels, (P, 2) x right, y down
    cameras: list  # the scenes' cameras


@dataclass
class _Primitives:
    image: Tensor
    entity: Tensor
    index: Tensor
    kind: Tensor
    center: Tensor
    rotation: Tensor
    size: Tensor
    taper: Tensor
    color: Tensor
    pattern: Tensor
    pattern_color: Tensor
    period: Tensor
    material: Tensor
    box: Tensor  # first column, first row, columns, rows of the rays to test


def _collect(
    scenes: list[Scene], side: int, device
) -> tuple[_Primitives, list[list[tuple[int, str]]], list[np.ndarray]]:
    rows: dict[str, list] = {name: [] for name in _Primitives.__annotations__}
    names: list[list[tuple[int, str]]] = []
    keypoints = []
    for b, scene in enumerate(scenes):
        eye, axes = scene.camera.position(), scene.camera.axes()
        focal = side / 2 / np.tan(np.radians(scene.camera.fov_deg / 2))
        names.append([])
        points = []
        for k, placed in enumerate(scene.placed):
            entity = placed.entity
            for part in placed.parts():
                turn = np.eye(3) if part.rotation is None else part.rotation
                half = half_extent(part)
                corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * half
                seen = (np.asarray(part.center) + corners @ turn.T - eye) @ axes.T
                middle = (np.asarray(part.center) - eye) @ axes.T
                depth = np.maximum(-seen[:, 2], 0.05)
                pixels = np.stack([side / 2 + focal * seen[:, 0] / depth, side / 2 - focal * seen[:, 1] / depth], 1)
                first = np.clip(np.floor(pixels.min(0)), 0, side).astype(int)
                last = np.clip(np.ceil(pixels.max(0)), 0, side).astype(int)
                center_depth = max(-middle[2], 0.05)
                points.append(
                    [side / 2 + focal * middle[0] / center_depth, side / 2 - focal * middle[1] / center_depth]
                )
                slot, iced = part.slot.removeprefix("ice:"), part.slot.startswith("ice:")
                color = np.asarray(entity.slot_color(slot))
                names[b].append((k, part.name))
                values = {
                    "image": b, "entity": k, "index": len(names[b]), "kind": part.kind, "center": part.center,
                    "rotation": turn, "size": part.size, "taper": part.taper,
                    "color": 0.4 * color + 0.6 * _ICE if iced else color,
                    "pattern": PATTERNS.index(entity.pattern) if part.patterned else 0,
                    "pattern_color": entity.pattern_rgb, "period": entity.pattern_period * placed.scale,
                    "material": 1 if slot == "ice" else MATERIALS.index(entity.material),
                    "box": [first[0], first[1], max(last[0] - first[0], 0), max(last[1] - first[1], 0)],
                }  # fmt: skip
                for name, value in values.items():
                    rows[name].append(value)
        keypoints.append(np.asarray(points, np.float32) / SUPERSAMPLING)
    whole = {"image", "entity", "index", "kind", "pattern", "material", "box"}
    tensors = {
        name: torch.as_tensor(np.asarray(value), dtype=torch.int64 if name in whole else torch.float32, device=device)
        for name, value in rows.items()
    }
    return _Primitives(**tensors), names, keypoints


def _rays(scenes: list[Scene], side: int, device) -> tuple[Tensor, Tensor]:
    """Camera positions (B, 3) and unit ray directions (B, side * side, 3)."""
    grid = (torch.arange(side, dtype=torch.float32) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(-grid, grid, indexing="ij")
    eyes = torch.tensor(np.stack([s.camera.position() for s in scenes]), dtype=torch.float32)
    axes = torch.tensor(np.stack([s.camera.axes() for s in scenes]), dtype=torch.float32)
    half = torch.tensor([np.tan(np.radians(s.camera.fov_deg / 2)) for s in scenes], dtype=torch.float32)
    local = torch.stack([x.flatten(), y.flatten(), -torch.ones(side * side)], -1)[None].repeat(len(scenes), 1, 1)
    local[..., :2] *= half[:, None, None]
    directions = torch.nn.functional.normalize(local @ axes, dim=-1)
    return eyes.to(device), directions.to(device)


def _pairs(prims: _Primitives, side: int) -> tuple[Tensor, Tensor]:
    """All (primitive, flat ray index) pairs inside the primitives' boxes."""
    counts = prims.box[:, 2] * prims.box[:, 3]
    which = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    local = torch.arange(len(which), device=counts.device) - starts
    box = prims.box[which]
    column, row = box[:, 0] + local % box[:, 2], box[:, 1] + local // box[:, 2]
    return which, prims.image[which] * side * side + row * side + column


def _surface_pattern(pattern: Tensor, point: Tensor, base: Tensor, other: Tensor, period: Tensor) -> Tensor:
    """Colour of a patterned surface at local metric points, (M, 3)."""
    q = point / period[:, None]
    striped = torch.sin(2 * torch.pi * q[:, 1]) > 0
    checker = (torch.floor(q * 1.1 + 0.25).sum(-1) % 2) > 0.5
    cell = (q * 1.15 + 0.5) - torch.floor(q * 1.15 + 0.5) - 0.5
    dotted = cell.norm(dim=-1) < 0.36
    second = ((pattern == 1) & striped) | ((pattern == 2) & dotted) | ((pattern == 3) & checker)
    return torch.where(second[:, None], other, base)


def _shade(color: Tensor, normal: Tensor, view: Tensor, light: Tensor, material: Tensor) -> Tensor:
    """Half-Lambert light with highlights; metal shows a bright band from the sky. All (M, 3), material (M,)."""
    diffuse = 0.56 + 0.48 * (normal * light).sum(-1).clamp(-0.5, 1)
    reflected = view - 2 * (view * normal).sum(-1, keepdim=True) * normal
    highlight = (reflected * light).sum(-1).clamp(min=0)
    shine = torch.where(material == 1, 0.75 * highlight**12, torch.zeros_like(highlight))
    sky = torch.where(material == 2, 0.55 * (reflected[:, 1] * 3 + 0.2).clamp(0, 1), torch.zeros_like(shine))
    metal = (material == 2)[:, None]
    lit = torch.where(
        metal, color * (diffuse * 0.75)[:, None] + 0.8 * sky[:, None] * (0.45 + 0.55 * color), color * diffuse[:, None]
    )
    return lit + shine[:, None]


def _cast_shadows(scenes: list[Scene], prims: _Primitives, eyes: Tensor, directions: Tensor, depth: Tensor) -> Tensor:
    """Soft round shadows on the ground under each entity, factor (B, R) in (0, 1]."""
    point = eyes[:, None, [0, 2]] + depth.clamp(max=60.0)[..., None] * directions[..., [0, 2]]
    shadow = torch.ones_like(depth)
    for k in range(max(len(s.placed) for s in scenes)):
        centers, radii = torch.zeros(len(scenes), 2), torch.ones(len(scenes), 2) * 1e-3
        for b in range(len(scenes)):
            own = ((prims.image == b) & (prims.entity == k)).cpu()
            if own.any():
                c = prims.center.cpu()[own][:, [0, 2]]
                r = prims.size.cpu()[own].amax(-1, keepdim=True)
                low, high = (c - r).amin(0), (c + r).amax(0)
                centers[b], radii[b] = (low + high) / 2, (high - low) / 2
        q = (point - centers.to(point)[:, None]) / radii.to(point)[:, None]
        shadow = shadow * (1 - 0.5 * torch.exp(-1.4 * (q * q).sum(-1)))
    return torch.where(depth < FAR, shadow, torch.ones_like(shadow))


def render(scenes: list[Scene], *, resolution: int = RESOLUTION, device: str | torch.device = "cpu") -> Render:
    """Render B scenes.

    Args: resolution: side in pixels; rays are cast on a grid twice as fine and averaged.
    Returns: pictures and ground truth on ``device``. Source: our own world; see the module docstring.
    """
    if not scenes:
        raise ValueError("render needs at least one scene")
    side = resolution * SUPERSAMPLING
    count, rays = len(scenes), side * side
    prims, names, keypoints = _collect(scenes, side, device)
    eyes, directions = _rays(scenes, side, device)
    seeds = torch.tensor([s.scenery for s in scenes], dtype=torch.float32, device=device)
    colors, ground = backgrounds.paint([s.background for s in scenes], eyes, directions, seeds)
    colors = colors * _cast_shadows(scenes, prims, eyes, directions, ground)[..., None]

    which, ray = _pairs(prims, side)
    flat_directions = directions.reshape(-1, 3)
    hit_t = torch.full((len(which),), FAR, device=eyes.device)
    hit_normal = torch.zeros(len(which), 3, device=eyes.device)
    for kind in range(4):
        rows = (prims.kind[which] == kind).nonzero()[:, 0]
        if not len(rows):
            continue
        p, r = which[rows], ray[rows]
        to_local = prims.rotation[p]  # columns are local axes: v_local = v @ R
        origin = torch.einsum("mi,mij->mj", eyes[prims.image[p]] - prims.center[p], to_local)
        direction = torch.einsum("mi,mij->mj", flat_directions[r], to_local)
        t, normal = intersect(kind, origin, direction, prims.size[p], prims.taper[p])
        hit_t[rows], hit_normal[rows] = t, torch.einsum("mj,mij->mi", normal, to_local)

    buffer = torch.full((count * rays,), FAR, device=eyes.device).scatter_reduce_(0, ray, hit_t, "amin")
    front = (hit_t < FAR) & (hit_t <= buffer[ray])
    owner = torch.full((count * rays,), len(prims.kind), device=eyes.device)
    owner.scatter_reduce_(0, ray[front], which[front], "amin")
    won = front & (owner[ray] == which)
    p, r, t, normal = which[won], ray[won], hit_t[won], hit_normal[won]

    view = flat_directions[r]
    local = torch.einsum("mi,mij->mj", eyes[prims.image[p]] + t[:, None] * view - prims.center[p], prims.rotation[p])
    base = _surface_pattern(prims.pattern[p], local, prims.color[p], prims.pattern_color[p], prims.period[p])
    axes = torch.tensor(np.stack([s.camera.axes() for s in scenes]), dtype=torch.float32, device=eyes.device)
    light = torch.nn.functional.normalize(torch.tensor(_LIGHT, device=eyes.device), dim=0) @ axes  # (B, 3)
    flat = colors.reshape(-1, 3)
    flat[r] = _shade(base, normal, view, light[prims.image[p]], prims.material[p])

    def plane(values: Tensor, fill: float, dtype) -> Tensor:
        full = torch.full((count * rays, *values.shape[1:]), fill, dtype=dtype, device=eyes.device)
        full[r] = values.to(dtype)
        return full.reshape(count, side, side, *values.shape[1:])

    def coarse(plane: Tensor) -> Tensor:
        return plane[:, ::SUPERSAMPLING, ::SUPERSAMPLING]

    depth = torch.where(buffer < FAR, buffer, ground.reshape(-1)).reshape(count, side, side)
    parts = plane(prims.index[p], 0, torch.int64)
    masks = coarse(plane(prims.entity[p] + 1, 0, torch.int64))
    picture = flat.reshape(count, side, side, 3).permute(0, 3, 1, 2).clamp(0, 1)
    picture = torch.nn.functional.avg_pool2d(picture, SUPERSAMPLING)
    picture = styles.stylize(picture, [s.style for s in scenes], lines=styles.outlines(parts), masks=masks)
    normals = coarse(plane(normal, 0.0, torch.float32)).permute(0, 3, 1, 2)
    return Render(picture, masks, coarse(depth), normals, coarse(parts), names, keypoints, [s.camera for s in scenes])

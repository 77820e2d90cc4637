"""Regularisers of DreamFusion (arXiv 2209.14988, App. A.2) on a rendering."""

from torch import Tensor

from common.three_d.render import Rendering


def orientation_loss(rendering: Rendering) -> Tensor:
    """Mean over rays of sum_i sg(w_i) max(0, n_i . v)^2: normals of what is seen face the camera (Ref-NeRF).

    Raises: ValueError if the rendering has no normals.
    """
    if rendering.orientation is None:
        raise ValueError("the orientation loss needs normals: render(..., with_normals=True)")
    return rendering.orientation.mean()


def opacity_loss(rendering: Rendering) -> Tensor:
    """Mean over rays of sqrt((sum_i w_i)^2 + 0.01): little is filled that need not be."""
    return (rendering.opacity.square() + 0.01).sqrt().mean()


def distortion_loss(rendering: Rendering) -> Tensor:
    """Mean over rays of sum_ij w_i w_j |s_i - s_j| + 1/3 sum_i w_i^2 d_i: density lies close together along a ray.

    Mip-NeRF 360 (Barron et al., arXiv 2111.12077, Eq. 15); s in [0, 1] between the faces of the box. The double sum is
    taken with running sums, since nerfstudio's table of all pairs costs more than a rendering on a CPU.
    """
    weights, starts, ends = rendering.weights, rendering.samples.spacing_starts, rendering.samples.spacing_ends
    middles = (starts + ends) / 2
    moments = weights * middles
    before, moments_before = weights.cumsum(1) - weights, moments.cumsum(1) - moments
    pairs = 2 * (weights * (middles * before - moments_before)).sum(1)
    own = (weights.square() * (ends - starts)).sum(1) / 3
    return (pairs + own).mean()

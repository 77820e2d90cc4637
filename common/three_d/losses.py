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

"""A tiny VAE behind the few attributes of a backbone that the latent cache reads."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image


@pytest.fixture
def backbone() -> SimpleNamespace:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    with torch.no_grad():
        vae.quant_conv.bias[4:] -= 8  # log variance: a narrow posterior, as a trained VAE has
    return SimpleNamespace(vae=vae.eval().requires_grad_(False), device=torch.device("cpu"))


@pytest.fixture
def photos(tmp_path):
    """Three noisy pictures: one square, one wide, one tall."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, shape in {"a.png": (20, 20, 3), "b.png": (20, 40, 3), "c.png": (50, 20, 3)}.items():
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    return folder

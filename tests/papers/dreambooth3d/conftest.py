"""A small config, photos that are made up, and a run with all three stages."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from common.backbones import load_backbone


@pytest.fixture
def config(paper):
    return small_config(paper)


def small_config(paper):
    config = paper.config.DreamBooth3DConfig.tiny("bear")
    tuning = replace(config.tuning, partial_steps=2, full_steps=4, multi_steps=2, learning_rate=1e-3)
    field = replace(config.field, resolution=10, render_px=16, num_samples=10)
    return replace(
        config, first_steps=3, final_steps=3, num_pseudo_views=4, num_inference_steps=4, tuning=tuning, field=field
    )


@pytest.fixture(scope="session")
def photos():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def make_method(paper, backbone_folder, config, photos, tmp_path):
    """The method in a folder; keyword arguments change the config."""

    def make(folder=tmp_path / "run", **changes):
        make_backbone = partial(load_backbone, backbone_folder)
        return paper.method.DreamBooth3D(make_backbone, replace(config, **changes), photos, folder)

    return make

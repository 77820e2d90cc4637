"""tiny-sd, and a field of few voxels."""

from dataclasses import replace

import pytest

from common.backbones import load_backbone


@pytest.fixture(scope="session")
def backbone():
    return load_backbone("tiny-sd").freeze()


@pytest.fixture
def config(paper):
    return replace(paper.config.DreamFusionConfig.tiny(), field_resolution=12, render_px=16, num_samples=12)

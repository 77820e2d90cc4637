"""tiny-sd with random weights that depend on a seed alone, so that no test depends on trained ones."""

import pytest

from common.backbones import Backbone, load_backbone


@pytest.fixture(scope="module")
def shared_backbone() -> Backbone:
    return load_backbone("tiny-sd", weights="random", seed=0).freeze()

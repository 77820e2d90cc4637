"""The small backbone, fresh for every test, because training changes all of it."""

import pytest

from common.backbones import Backbone


@pytest.fixture
def backbone(backbone_in_memory) -> Backbone:
    return backbone_in_memory

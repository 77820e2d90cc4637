"""What these tests share: tiny-sd with random weights, and pictures that are made up."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.backbones import Backbone, load_backbone


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def backbone() -> Backbone:
    """Fresh for every test: training changes all of it."""
    return load_backbone("tiny-sd", weights="random")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """tiny-sd with random weights as a diffusers folder, as users have one."""
    folder = tmp_path_factory.mktemp("model")
    load_backbone("tiny-sd", weights="random").to_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Three pictures of two sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for i, size in enumerate([(64, 64, 3), (80, 100, 3), (64, 64, 3)]):
        pixels = np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder

"""A small random Stable Diffusion with cross-attention at 8x8 tokens: 32 px, 8x8 latents, width 32."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from common.backbones import PRESETS, Backbone, load_backbone


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> str:
    """As a diffusers folder, for train.main and load_method."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "small-sd"
    shutil.copytree(PRESETS["tiny-sd"].architecture, folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(folder / "text_encoder")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    with torch.no_grad():
        for parameter in unet.parameters():  # the output layers are too small to matter as they are initialised
            parameter.add_(0.05 * torch.randn_like(parameter))
    unet.save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(16, 16, 16),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=32,
    ).save_pretrained(folder / "vae")
    return str(folder)


@pytest.fixture
def backbone(backbone_folder) -> Backbone:
    """Fresh for every test."""
    return load_backbone(backbone_folder).freeze()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Two folders of made-up pictures."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40 + i, 3), dtype=np.uint8)
        folder = root / ("one", "two")[i // 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return root / "one", root / "two"

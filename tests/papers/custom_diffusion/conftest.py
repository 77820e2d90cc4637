"""What these tests share: a small backbone of the Stable Diffusion 1.x kind, and pictures that are made up."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from common.backbones import PRESETS, Backbone, load_backbone


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> str:
    """A random Stable Diffusion as a diffusers folder, with tiny-sd's words: 32 px, 8x8 latents, width 32."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "small-sd"
    shutil.copytree(PRESETS["tiny-sd"].architecture, folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
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
    with torch.no_grad():  # the attention's output layers are too small to matter as they are initialised
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=32,
    )
    text_encoder = CLIPTextModel(CLIPTextConfig(**config))
    with torch.no_grad():  # as it is initialised, all features sum to 0, so they do not span their space
        text_encoder.final_layer_norm.bias.add_(0.5 * torch.randn(32))
    text_encoder.save_pretrained(folder / "text_encoder")
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    return str(folder)


@pytest.fixture
def backbone(backbone_folder) -> Backbone:
    """Fresh for every test."""
    return load_backbone(backbone_folder)

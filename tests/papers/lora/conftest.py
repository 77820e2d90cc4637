"""What these tests share: a small backbone of the Stable Diffusion 1.x kind, and pictures that are made up."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common.backbones import PRESETS, Backbone


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def backbone() -> Backbone:
    """16 px, random weights, tiny-sd's tokenizer; fresh for every test, because pairs are added to it."""
    tokenizer = CLIPTokenizer.from_pretrained(PRESETS["tiny-sd"].architecture / "tokenizer")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        scaling_factor=0.7,
    )
    text_config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    backbone = Backbone("small", unet, vae, CLIPTextModel(text_config), tokenizer, scheduler)
    for module in backbone.modules:  # the attention's output layers are too small to matter as they are initialised
        for parameter in module.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return backbone.eval()


@pytest.fixture
def model_folder(backbone, tmp_path):
    """The same as a diffusers folder, as users have one."""
    backbone.to_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Three pictures of two sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for i, size in enumerate([(64, 64, 3), (80, 100, 3), (64, 64, 3)]):
        pixels = np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder

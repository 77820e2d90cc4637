"""Small models and made-up pictures for the papers' tests; a paper's own conftest.py goes before this one."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel, UNet3DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common.backbones import PRESETS, Backbone, load_backbone
from common.backbones.inflate import temporal_modules


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> str:
    """A small random Stable Diffusion with tiny-sd's words as a diffusers folder: 32 px, 8x8 latents, width 32."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "small-sd"
    shutil.copytree(PRESETS["tiny-sd"].architecture, folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(folder / "text_encoder")
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(16, 16, 16),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=32,
    ).save_pretrained(folder / "vae")
    return str(folder)


@pytest.fixture(scope="module")
def shared_backbone(backbone_folder) -> Backbone:
    return load_backbone(backbone_folder).freeze()


@pytest.fixture
def backbone(shared_backbone) -> Backbone:
    """Without placeholders, whatever the test before has installed."""
    if shared_backbone.placeholders is not None:
        shared_backbone.placeholders.remove()
    return shared_backbone


@pytest.fixture
def backbone_in_memory() -> Backbone:
    """16 px, random weights, tiny-sd's tokenizer; fresh for every test."""
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
def video_backbone_folder(tmp_path_factory) -> str:
    """A small random text-to-video network, likewise; all layers answer, also those that start at zero."""
    folder = tmp_path_factory.mktemp("models") / "small-video"
    shutil.copytree(PRESETS["tiny-sd"].architecture, folder)
    shutil.copy(PRESETS["modelscope"].architecture / "model_index.json", folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(folder / "text_encoder")
        unet = UNet3DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
            attention_head_dim=8, down_block_types=("DownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )  # fmt: skip
        for module in temporal_modules(unet).values():
            for parameter in module.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape)
        unet.save_pretrained(folder / "unet")
        AutoencoderKL(
            block_out_channels=(16, 16, 16), norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, sample_size=32,
        ).save_pretrained(folder / "vae")  # fmt: skip
    return str(folder)


@pytest.fixture
def video_backbone(video_backbone_folder) -> Backbone:
    """Fresh for every test; clips of four frames."""
    backbone = load_backbone(video_backbone_folder)
    backbone.num_frames = 4
    return backbone


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Three pictures of two sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for i, size in enumerate([(64, 64, 3), (80, 100, 3), (64, 64, 3)]):
        pixels = np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of made-up pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder

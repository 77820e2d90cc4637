"""A small random Stable Diffusion with four cross-attention layers: 32 px, 8x8 latents, width 32."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from common.backbones import PRESETS, Backbone, load_backbone


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> str:
    """As a diffusers folder, for train.main and load_method."""
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


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Made-up pictures in concept/ and, more of them, in subject/; the words of a phrase in words.json."""
    root = tmp_path_factory.mktemp("files")
    for k, (folder, count) in enumerate((("concept", 2), ("subject", 3))):
        (root / folder).mkdir()
        for i in range(count):
            pixels = np.random.default_rng([k, i]).integers(0, 256, (40, 40 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    rows = [{"word": "upside", "positives": ["over"], "negatives": ["upright", "normal"]},
            {"word": "down", "positives": ["below", "under"], "negatives": ["up"]}]  # fmt: skip
    (root / "words.json").write_text(json.dumps(rows))
    return root

"""tiny-sd with random weights that depend on a seed alone, so that no test depends on trained ones."""

import pytest
import torch

from common.backbones import Backbone, load_backbone


@pytest.fixture(scope="module")
def shared_backbone() -> Backbone:
    return load_backbone("tiny-sd", weights="random", seed=0).freeze()


@pytest.fixture
def backbone(shared_backbone) -> Backbone:
    """Without pseudo-words, whatever the test before has installed."""
    if shared_backbone.placeholders is not None:
        shared_backbone.placeholders.remove()
    return shared_backbone


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> str:
    """A small random Stable Diffusion as a diffusers folder, for train.main: 32 px, 8x8 latents, width 32."""
    import json
    import shutil

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from common.backbones import PRESETS

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

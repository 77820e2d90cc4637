"""Tiny real backbones with random weights: one of the Stable Diffusion 1.x kind, one of the SDXL kind."""

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from common.backbones import PRESETS, Backbone

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def tiny_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(PRESETS["tiny-sd"].architecture / "tokenizer")


def tiny_text_config(width: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=24,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_modules(context_width: int, **unet_options: object) -> dict:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=context_width,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **unet_options,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        scaling_factor=0.7,
        force_upcast=True,
    )
    return {"unet": unet, "vae": vae, "noise_scheduler": DDPMScheduler(**BETAS, clip_sample=False)}


@pytest.fixture
def tiny_sd() -> Backbone:
    """16x16 px, 8x8 latents, 4 cross-attention layers of context width 32, the vocabulary of tiny-sd."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(tiny_text_config(32, tokenizer))
    return Backbone("tiny", **tiny_modules(32), tokenizer=tokenizer, text_encoder=text_encoder).freeze()


@pytest.fixture
def tiny_xl() -> Backbone:
    """The same in the form of SDXL: text encoders of width 32 and 16, pooled features and time ids."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer()
    text_time = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    }
    return Backbone(
        "tiny-xl",
        **tiny_modules(32 + 16, **text_time),
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(tiny_text_config(32, tokenizer)),
        tokenizer_2=tokenizer_2,
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(16, tokenizer_2)),
    ).freeze()

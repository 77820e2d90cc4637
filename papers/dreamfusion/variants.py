"""What the paper's settings are measured against, as changes of a config."""

from dataclasses import replace

from .config import DreamFusionConfig


def fixed_prompt(config: DreamFusionConfig) -> DreamFusionConfig:
    """The prompt without views' names."""
    return replace(config, view_prompts=False)


def albedo_only(config: DreamFusionConfig) -> DreamFusionConfig:
    """No light and no textureless renderings, ever."""
    return replace(config, albedo_share=1.0)


def with_omega(config: DreamFusionConfig, omega: float) -> DreamFusionConfig:
    """The paper's guidance weight."""
    return replace(config, guidance_scale=1 + omega)

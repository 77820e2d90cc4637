"""Text-to-image backbones: `load_backbone(name) -> Backbone`, `Conditioning`, `PlaceholderTokens`."""

from common.backbones.backbone import Backbone
from common.backbones.conditioning import Conditioning
from common.backbones.loading import load_backbone
from common.backbones.presets import PRESETS
from common.backbones.tokens import PlaceholderTokens

__all__ = ["PRESETS", "Backbone", "Conditioning", "PlaceholderTokens", "load_backbone"]

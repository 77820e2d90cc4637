"""What NeTI is compared with: extended textual inversion, and mappers that see the time alone or the layer alone."""

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from common.backbones import Conditioning

from .method import NeTI


class TimeAlone(NeTI):
    """The mapper gets l = 0 everywhere: one context for all layers, another at each timestep."""

    def conditioning(self, prompts: list[str], timesteps: Tensor, keep: Tensor | None = None) -> Conditioning:
        layer = torch.zeros(1, dtype=torch.int64, device=self.backbone.device)
        keys, values = self.contexts(prompts, timesteps, layer, None if keep is None else keep[:, :1])
        return Conditioning(keys[:, 0], value_embeds=None if values is None else values[:, 0])


class LayerAlone(NeTI):
    """The mapper gets t = 0 everywhere: one context for all timesteps, another in each layer.

    So it is computed once for all samples of a batch that have the same prompt, with the truncation of the first.
    """

    def conditioning(self, prompts: list[str], timesteps: Tensor, keep: Tensor | None = None) -> Conditioning:
        first, encode = None if keep is None else keep[:1], super().conditioning
        distinct = {prompt: encode([prompt], timesteps[:1] * 0, first) for prompt in dict.fromkeys(prompts)}
        return Conditioning.cat([distinct[prompt] for prompt in prompts])


class ExtendedTextualInversion(LayerAlone):
    """XTI (Voynov et al., arXiv 2303.09522): a free word for each layer, from the super-category's."""

    def make_mapper(self) -> nn.Module:
        return WordTable(self.word.repeat(self.num_layers, 1))


class WordTable(nn.Module):
    """In the place of the mapper: words (L,D), whatever the timestep; no bypass, nothing to truncate."""

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        self.words = Parameter(words.detach().clone())

    def forward(self, timesteps: Tensor, layers: Tensor, keep: Tensor | None = None) -> tuple[Tensor, None]:
        return self.words[layers], None

"""The stage network f: the embedding p_0 of one word in, the embeddings p_1 .. p_n of all stages out."""

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from common.training.seeding import derive_seed, seeded_uniform

HEADS, HEAD_WIDTH, FEED_FORWARD = 8, 64, 4  # FEED_FORWARD times the width is hidden (code)
DROPOUT = 0.1  # in training, behind both attentions and in the feed-forward (code)


def dropout(x: Tensor, keep: Tensor | None) -> Tensor:
    """x / 0.9 where keep (R,K) bool says so, 0 elsewhere; None is evaluation: x.   x: (R,1,K)."""
    return x if keep is None else x * keep[:, None] / (1 - DROPOUT)


def draw_dropout(sample_keys: Tensor, width: int, *, seed: int) -> Tensor:
    """What the three dropouts keep for each sample, (B, 2 width + 4 width) bool, from the samples' keys."""
    uniform = seeded_uniform(sample_keys, ((2 + FEED_FORWARD) * width,), seed=seed, stream="dropout")
    return uniform >= DROPOUT


class StageNetwork(nn.Module):
    """f: attention, attention to the raw p_0, feed-forward without residual; parameters named as in the code.

    The sequence is one token long, so each softmax is 1: both attentions are linear maps of their values. to_q, to_k
    and norm2, which feeds queries alone, never change anything; they are kept because the paper's network has them.

    Args:
        width: D of the text encoder's embeddings.
        seed: of the initial weights (torch's defaults).
    """

    def __init__(self, width: int, num_stages: int, *, seed: int) -> None:
        super().__init__()
        self.width, self.num_stages = width, num_stages
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "stage network"))
            self.attn1 = Attention(width, heads=HEADS, dim_head=HEAD_WIDTH)
            self.attn2 = Attention(width, heads=HEADS, dim_head=HEAD_WIDTH)
            self.ff = FeedForward(width, num_stages * width, mult=FEED_FORWARD, activation_fn="geglu")
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, word: Tensor, keep: Tensor | None = None) -> Tensor:
        """p_1 .. p_n, (R,n,D), of p_0, (R,D).   keep: of `draw_dropout`; None = evaluation."""
        p_0 = word[:, None]  # (R,1,D)
        keeps = [None] * 3 if keep is None else keep.split([self.width, self.width, FEED_FORWARD * self.width], dim=1)
        x = dropout(self.attn1(self.norm1(p_0)), keeps[0]) + p_0
        x = dropout(self.attn2(self.norm2(x), encoder_hidden_states=p_0), keeps[1]) + x
        geglu, _, linear = self.ff.net
        return linear(dropout(geglu(self.norm3(x)), keeps[2])).view(-1, self.num_stages, self.width)


class StageWords(nn.Module):
    """p_1 .. p_n as they are: what is left of f after training, or the ablation that trains them without f.

    Args: words: (n,D).
    """

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        self.words = nn.Parameter(words.detach().float().clone())

    def forward(self, word: Tensor, keep: Tensor | None = None) -> Tensor:
        """The same for every row of p_0 (R,D): (R,n,D)."""
        return self.words.expand(len(word), -1, -1)

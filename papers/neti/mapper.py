"""The neural mapper of NeTI: (timestep, UNet layer) -> word embedding and textual bypass.

Paper -> here:  (t, l) -> timesteps, layers (R,)   w -> frequencies (F,2)   h -> hidden (R,128)
    v_base -> words (R,D)   v_pass -> bypass (R,D)   truncation index -> keep, the number of hidden units that stay
R counts calls of the mapper: one for each sample and layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.training.seeding import derive_seed, seeded_generator, seeded_uniform

NUM_FREQUENCIES = 1024  # rows of w (code)
SIGMA_T, SIGMA_L = 0.03, 2.0  # bandwidths for t in 0..999 and l in 0..15, both as they are (code)
NUM_TIME_ANCHORS = 10  # 0, 100, ..., 900 (code)
HIDDEN = 128  # units of h, ordered by nested dropout


def draw_frequencies(generator: torch.Generator) -> Tensor:
    """w ~ N(0, diag(sigma_t^2, sigma_l^2)), (1024,2), drawn once and never trained."""
    return torch.randn(NUM_FREQUENCIES, 2, generator=generator) * torch.tensor([SIGMA_T, SIGMA_L])


def positional_encoding(timesteps: Tensor, layers: Tensor, frequencies: Tensor) -> Tensor:
    """e(t, l) = [sin(w (t, l)); cos(w (t, l))], of length 1; there is no 2 pi.

    Args:
        timesteps: (R,), 0..999, not scaled: dividing by 1000 would change the bandwidth.
        layers: (R,), 0..15.
        frequencies: w, (F,2).
    Returns: (R,2F).
    """
    times, layers = timesteps.to(frequencies), layers.to(frequencies)
    # sums of products and no matrix product, which autocast would round: the phases go up to about 100
    phases = times[:, None] * frequencies[:, 0] + layers[:, None] * frequencies[:, 1]  # (R,F)
    return F.normalize(torch.cat([phases.sin(), phases.cos()], dim=1), dim=1)


def anchor_encodings(num_layers: int, frequencies: Tensor, num_timesteps: int = 1000) -> Tensor:
    """Encodings of (t, l) on a grid of 10 timesteps, outer, and all layers, inner: (10 x num_layers, 2F)."""
    times = torch.arange(0, num_timesteps, num_timesteps // NUM_TIME_ANCHORS)
    return positional_encoding(
        times.repeat_interleave(num_layers), torch.arange(num_layers).repeat(len(times)), frequencies
    )


def truncate(hidden: Tensor, keep: Tensor) -> Tensor:
    """Nested dropout: the first keep[r] units of row r stay, the others become 0.   hidden: (R,H), keep: (R,) int64."""
    return hidden * (torch.arange(hidden.shape[1], device=hidden.device) < keep.to(hidden.device)[:, None])


def draw_truncation(sample_keys: Tensor, num_layers: int, probability: float, *, seed: int) -> Tensor:
    """Where the calls of a batch are truncated in training: uniform in 0..127 with the probability, else 128 (D3).

    Returns: keep, (B,num_layers) int64; each layer of a sample is drawn anew.
    """
    uniform = seeded_uniform(sample_keys, (2, num_layers), seed=seed, stream="nested dropout")
    index = (uniform[:, 1] * HIDDEN).long()
    return torch.where(uniform[:, 0] < probability, index, HIDDEN)


def scale_to_length(vectors: Tensor, length: Tensor) -> Tensor:
    """length * v / |v|, row by row, (R,N).   length: scalar."""
    return F.normalize(vectors, dim=1) * length


class Mapper(nn.Module):
    """M(t, l), trained whole but for w.

    Args:
        num_layers: cross-attention layers of the UNet, L; 16 in Stable Diffusion.
        width: of a word embedding, D.
        length: of the output, a scalar: that of the super-category word's embedding.
        bypass: whether v_pass comes out too. 563,616 parameters with it and 464,544 without for L = 16, D = 768.
        normalise_halves: scale v_base and v_pass to the length each, and not (v_base, v_pass) as one vector.
        seed: of w and the initial weights.
    """

    def __init__(
        self, num_layers: int, width: int, length: Tensor, *, bypass: bool, normalise_halves: bool, seed: int
    ) -> None:
        super().__init__()
        self.bypass, self.normalise_halves = bypass, normalise_halves
        self.register_buffer("frequencies", draw_frequencies(seeded_generator(seed, "frequencies")))
        self.register_buffer("length", length.detach().float())
        anchors = anchor_encodings(num_layers, self.frequencies)  # (160,2048)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "mapper"))
            self.input_layer = nn.Linear(anchors.shape[1], anchors.shape[0])
            self.net = nn.Sequential(
                *(nn.Linear(anchors.shape[0], HIDDEN), nn.LayerNorm(HIDDEN), nn.LeakyReLU()),
                *(nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN), nn.LeakyReLU()),
            )
            self.output_layer = nn.Linear(HIDDEN, width * (1 + bypass))
        with torch.no_grad():
            self.input_layer.weight.copy_(anchors)  # a start: it is trained, the bias too

    def forward(self, timesteps: Tensor, layers: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Words v_base (R,D), and v_pass (R,D) or None.   keep: (R,) int64, 0..128; None keeps all."""
        encoded = positional_encoding(timesteps, layers, self.frequencies)
        hidden = self.net(self.input_layer(encoded))  # h, (R,128)
        output = self.output_layer(hidden if keep is None else truncate(hidden, keep))
        if not self.bypass:
            return scale_to_length(output, self.length), None
        if self.normalise_halves:
            return tuple(scale_to_length(half, self.length) for half in output.chunk(2, dim=1))
        words, bypass = scale_to_length(output, self.length).chunk(2, dim=1)
        return words, bypass

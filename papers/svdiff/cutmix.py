"""Cut-Mix-Unmix (Sec. 3.3): collages of two subjects with their prompts, and the attention loss that keeps them apart.

A collage is two halves side by side. `sides` says where each of the S subjects of a run is in a sample: 0 = left,
1 = right, -1 = not in it, or no collage.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from common.backbones import Backbone
from common.data.latent_cache import posterior_moments
from common.training.seeding import seeded_generator

from .config import SVDiffConfig

PAIRS = ("{} on the left and a {} on the right", "{} and a {}")  # the paper's two examples; the left one comes first


class Pictures(NamedTuple):
    """Latents of a set of pictures: whole, (n,4,h,w), and as halves of collages, (n,4,h,w/2)."""

    whole: Tensor
    half: Tensor


def half_picture(pixel_values: Tensor) -> Tensor:
    """The whole picture at half size, its first and last rows repeated above and below (D4).

    Args:
        pixel_values: (B,3,H,W), H and W multiples of 4.
    Returns: (B,3,H,W/2).
    """
    small = F.interpolate(pixel_values, scale_factor=0.5, mode="area")
    margin = small.shape[-2] // 2
    return F.pad(small, (0, 0, margin, margin), mode="replicate")


def collage(left: Tensor, right: Tensor) -> Tensor:
    """Two halves (..., H, W/2), of pixels or of latents, side by side: (..., H, W)."""
    return torch.cat([left, right], dim=-1)


def collage_prompt(template: str, left: str, right: str, pair: str) -> str:
    """ "photo of a [V1] dog on the left and a [V2] sculpture on the right", "photo of a [V1] dog and a [V2] sculpture".

    Args:
        template: the config's.   pair: one of PAIRS.
        left, right: "[V1] dog", or "dog" for the class images.
    """
    return template.format(pair.format(left, right))


def encode_pictures(backbone: Backbone, pixel_values: Tensor) -> Pictures:
    """Posterior means (D5) of pictures (n,3,H,W) in [-1,1], one at a time."""
    whole = [posterior_moments(backbone, picture[None])[0] for picture in pixel_values]
    half = [posterior_moments(backbone, half_picture(picture[None]))[0] for picture in pixel_values]
    return Pictures(torch.cat(whole), torch.cat(half))


class CutMixDataset(Dataset):
    """Draws of one subject or, with the config's probability and if there are several, of a collage of two.

    Items: {"instance": {"latents": (4,h,w), "prompt"}, "class": the same with class images, "sides": (S,) int64}. The
    class images of a collage are a collage too, so that its look belongs to no identifier.

    Args:
        subjects: pictures of each subject.
        classes: class images of each subject's noun; None without prior loss.
    """

    def __init__(self, subjects: Sequence[Pictures], classes: Sequence[Pictures] | None, config: SVDiffConfig) -> None:
        if not len(subjects) == len(config.instance_prompts()) > 0:
            raise ValueError(f"{len(subjects)} sets of pictures for the prompts {config.instance_prompts()}")
        self.subjects, self.classes, self.config = subjects, classes, config

    def __len__(self) -> int:
        """Number of pictures of all subjects."""
        return sum(len(pictures.whole) for pictures in self.subjects)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, index)

    def sample(self, index: int, sample_key: int) -> dict[str, Any]:
        """The draw of a sample of a run, a function of its key alone."""
        config, count = self.config, len(self.subjects)
        generator = seeded_generator(config.seed, "cut-mix", sample_key)
        is_collage = torch.rand((), generator=generator).item() < config.cut_mix_probability and count > 1
        chosen = torch.randperm(count, generator=generator)[: 2 if is_collage else 1].tolist()  # without replacement
        pair = PAIRS[torch.randint(len(PAIRS), (), generator=generator).item()]
        sides = torch.full((count,), -1)
        if is_collage:
            sides[chosen] = torch.tensor([0, 1])

        def draw(sets: Sequence[Pictures], words: Sequence[str], prompts: Sequence[str]) -> dict[str, Any]:
            picks = [torch.randint(len(sets[i].whole), (), generator=generator).item() for i in chosen]
            if not is_collage:
                return {"latents": sets[chosen[0]].whole[picks[0]], "prompt": prompts[chosen[0]]}
            halves = [sets[i].half[pick] for i, pick in zip(chosen, picks, strict=True)]
            left, right = (words[i] for i in chosen)
            return {
                "latents": collage(*halves),
                "prompt": collage_prompt(config.prompt_template, left, right, pair),
            }

        item = {"instance": draw(self.subjects, config.words, config.instance_prompts()), "sides": sides}
        if self.classes is not None:
            item["class"] = draw(self.classes, config.class_nouns, config.class_prompts())
        return item


def token_positions(tokenizer: CLIPTokenizer, prompt: str, word: str) -> list[int]:
    """Where the tokens of a word are in a prompt, counted from the start token at 0.

    Raises: ValueError if the prompt lacks the word, or has it more than once.
    """
    ids = tokenizer(prompt).input_ids
    wanted = tokenizer(word, add_special_tokens=False).input_ids
    starts = [i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted]
    if len(starts) != 1:
        raise ValueError(f"{word!r} must be in the prompt once, found {len(starts)} times: {prompt!r}")
    return list(range(starts[0], starts[0] + len(wanted)))


def foreign_mask(side: int, height: int, width: int) -> Tensor:
    """M_2 for the subject on the left (side 0), M_1 for that on the right: 1 on the other's half, (height, width)."""
    right = torch.arange(width).expand(height, width) >= width // 2
    return (right if side == 0 else ~right).float()


def unmix_loss(attention: Tensor, foreign: Tensor) -> Tensor:
    """Sec. 3.3, MSE on the non-corresponding regions (D6): mean((A * M)^2) of each map, (N,).

    Args:
        attention: A, probabilities of one special token each, averaged over heads, (N, h, w).
        foreign: M, 1 where the other subject is, (N, h, w).
    """
    return (attention * foreign).square().flatten(1).mean(1)


def batch_unmix_loss(
    maps: Mapping[tuple[int, int], Sequence[Tensor]],
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    words: Sequence[str],
    sides: Tensor,
) -> Tensor:
    """Of a batch, a scalar: the sum over the two subjects, averaged over layers and samples; plain samples count 0.

    Args:
        maps: token grid -> head-averaged probabilities of each layer that has it, (B, h * w, tokens).
        prompts: of the B samples.
        words: the identifiers of the S subjects. One of several tokens counts as the mean of their maps.
        sides: (B, S).
    """
    present = [(row, subject) for row, subject in (sides >= 0).nonzero().tolist()]
    positions = [token_positions(tokenizer, prompts[row], words[subject]) for row, subject in present]
    losses = []
    for (height, width), layers in maps.items():
        foreign = torch.stack([foreign_mask(int(sides[row, subject]), height, width) for row, subject in present])
        for probabilities in layers:
            own = [probabilities[row, :, at].mean(-1) for (row, _), at in zip(present, positions, strict=True)]
            attention = torch.stack(own).unflatten(1, (height, width))
            losses.append(unmix_loss(attention, foreign.to(attention)).sum() / len(prompts))
    return torch.stack(losses).mean()

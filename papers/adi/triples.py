"""Sample triples: an anchor, another exemplar of the same action, and the anchor's subject and place in another action.

The pictures with other actions have to be given: how the paper makes them for photographs is unknown (D5).
"""

from pathlib import Path
from typing import Any

from torch import Tensor, tensor
from torch.utils.data import Dataset

from common.data.files import name_key
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.training.seeding import derive_seed, seeded_randn


class TripleDataset(Dataset):
    """Triples of latents; item i has exemplar i as its anchor. No picture is mirrored: that may be another action.

    Items: {"anchor", "other_context", "other_action": (4,h,w) float32, "prompt", "other_context_prompt": str}. Anchor
    and other_action share the prompt. `sample(index, sample_key)` draws the partner and the posterior samples, all
    three with the same noise; `dataset[index]` draws nothing.

    Args:
        exemplars: pictures of one action, with captions in which the placeholder stands where a word for it would.
        others: a picture for each exemplar, named like it: same subject and place, another action.
        placeholder: "<A>".
        seed: of all draws.
    Raises: ValueError naming the pictures if there is only one exemplar, a caption is missing or without placeholder,
        or an exemplar has no picture with another action.
    """

    def __init__(self, exemplars: LatentCache, others: LatentCache, placeholder: str, *, seed: int) -> None:
        folder = exemplars.folder
        if len(exemplars) < 2:
            raise ValueError(f"{str(folder.root)!r} holds one picture; a triple needs two exemplars of the action")
        if folder.captions is None:
            raise ValueError(
                f'the pictures in {str(folder.root)!r} have no captions; write NAME.txt files: "a photo of a woman '
                f'{placeholder}"'
            )
        pairs = zip(folder.paths, folder.captions, strict=True)
        if without := [path.name for path, caption in pairs if placeholder not in caption]:
            raise ValueError(
                f"captions without {placeholder} in {str(folder.root)!r}: {', '.join(without)}; write it where a word "
                f'for the action would stand: "a photo of a woman {placeholder}"'
            )
        self._exemplars, self._others, self.seed = exemplars, others, seed
        self._other_index = paired_by_name(folder, others.folder)

    def __len__(self) -> int:
        """Number of exemplars."""
        return len(self._exemplars)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The plain item: posterior means; the partner is the next exemplar."""
        return self._item(index, (index + 1) % len(self), None)

    def sample(self, index: int, sample_key: int) -> dict[str, Any]:
        """Exemplar `index` as sample `sample_key` of a run shows it: a pure function of (seed, index, sample_key)."""
        step = 1 + derive_seed(self.seed, "partner", sample_key) % (len(self) - 1)  # every other one equally likely
        noise = seeded_randn(tensor([sample_key]), self._exemplars.latent_shape, seed=self.seed, stream="posterior")[0]
        return self._item(index, (index + step) % len(self), noise)

    def _item(self, index: int, partner: int, noise: Tensor | None) -> dict[str, Any]:
        captions = self._exemplars.folder.captions
        return {
            "anchor": self._exemplars.latents(index, noise=noise),
            "other_context": self._exemplars.latents(partner, noise=noise),
            "other_action": self._others.latents(self._other_index[index], noise=noise),
            "prompt": captions[index],
            "other_context_prompt": captions[partner],
        }


def paired_by_name(exemplars: ImageFolder, others: ImageFolder) -> list[int]:
    """For each exemplar the index of the picture with its name (up to the suffix) in the other folder.

    Raises: ValueError naming what is missing, or two pictures of one name. Others without an exemplar are not used.
    """
    names, by_name = _names(exemplars), {name: i for i, name in enumerate(_names(others))}
    if missing := [name for name in names if name not in by_name]:
        raise ValueError(
            f"{len(missing)} of {len(names)} exemplars have no picture with another action in {str(others.root)!r}: "
            f"{', '.join(missing)}; each needs one of the same name: same subject and place, another action"
        )
    return [by_name[name] for name in names]


def _names(folder: ImageFolder) -> list[str]:
    names = [name_key(path.relative_to(folder.root).with_suffix("")) for path in folder.paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two pictures of one name in {str(folder.root)!r}: {', '.join(twice)}; rename one of each")
    return names


def load_folders(images: Path, other_action_images: Path, resolution_px: int, **options: bool) -> list[ImageFolder]:
    """Exemplars and their counterparts.   options: skip_bad_images."""
    return [ImageFolder(root, resolution_px=resolution_px, **options) for root in (images, other_action_images)]

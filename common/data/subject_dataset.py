"""What a method trains on: a picture's latents with a prompt, drawn anew for every sample of a run."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, tensor
from torch.utils.data import Dataset

from common.data.latent_cache import LatentCache
from common.training.seeding import derive_seed, seeded_randn


class SubjectDataset(Dataset):
    """Latents of one set of pictures, with prompts.

    Items: {"latents": (4,h,w) float32, "prompt": str, "image_index": int} and "mask" (1,H,W) float32 where the pictures
    have masks. `sample(index, sample_key)` draws variant, prompt and posterior sample; `dataset[index]` draws nothing.

    Args:
        latents: of the pictures.
        prompts: one is drawn for each sample; None = the captions of the pictures.
        seed: of all draws. Two datasets of one run need two seeds, or they draw alike.
    """

    def __init__(self, latents: LatentCache, prompts: Sequence[str] | None = None, *, seed: int):
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a list of prompts, got the string {prompts!r}")
        if prompts is None and latents.folder.captions is None:
            raise ValueError(
                f"the pictures in {str(latents.folder.root)!r} have no captions; pass prompts, or write NAME.txt files"
            )
        if prompts is not None and not prompts:
            raise ValueError("prompts is empty; pass at least one, or None for the captions of the pictures")
        self._latents, self._prompts, self.seed = latents, prompts, seed

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The plain item, for validation: centre crop, unflipped, posterior mean, first prompt."""
        return self._item(index, 0, 0, None)

    def sample(self, index: int, sample_key: int) -> dict[str, Any]:
        """Picture `index` as sample `sample_key` of a run shows it: a pure function of (seed, index, sample_key)."""
        variant = derive_seed(self.seed, "variant", sample_key) % self._latents.num_variants(index)
        prompt = derive_seed(self.seed, "prompt", sample_key) % len(self._prompts or "1")
        noise = seeded_randn(tensor([sample_key]), self._latents.latent_shape, seed=self.seed, stream="posterior")[0]
        return self._item(index, variant, prompt, noise)

    def _item(self, index: int, variant: int, prompt: int, noise: Tensor | None) -> dict[str, Any]:
        item = {
            "latents": self._latents.latents(index, variant, noise),
            "prompt": self._latents.folder.captions[index] if self._prompts is None else self._prompts[prompt],
            "image_index": index,
        }
        if self._latents.masks is not None:
            item["mask"] = self._latents.masks[index][variant].float()
        return item


class ZipDataset(Dataset):
    """Several datasets side by side, as pictures of a subject and of its class.

    `ZipDataset(instance=a, class_=b)` has items {"instance": item of a, "class": item of b}. It is as long as the
    longest; the others start again (modulo). A trailing underscore is dropped from a name that Python reserves.
    """

    def __init__(self, **parts: SubjectDataset):
        if not parts:
            raise ValueError("ZipDataset needs at least one dataset, as in ZipDataset(instance=..., class_=...)")
        self._parts = {name.removesuffix("_"): part for name, part in parts.items()}

    def __len__(self) -> int:
        return max(len(part) for part in self._parts.values())

    def __getitem__(self, index: int) -> dict[str, dict[str, Any]]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} items")
        return {name: part[index % len(part)] for name, part in self._parts.items()}

    def sample(self, index: int, sample_key: int) -> dict[str, dict[str, Any]]:
        """Each part's `sample`, with the same key."""
        return {name: part.sample(index % len(part), sample_key) for name, part in self._parts.items()}

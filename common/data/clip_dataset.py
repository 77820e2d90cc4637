"""What a video method trains on: a clip's latents with a prompt, drawn anew for every sample of a run."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, tensor
from torch.utils.data import Dataset

from common.data.clip_latents import ClipLatents
from common.training.seeding import derive_seed, seeded_randn


class ClipDataset(Dataset):
    """Latents of one set of videos, with prompts.

    Items: {"latents": (4,F,h,w) float32, "prompt": str, "clip_index": int}. `sample(index, sample_key)` draws window,
    prompt and posterior sample; `dataset[index]` draws nothing.

    Args:
        latents: of the videos.
        prompts: one is drawn for each sample; None = the captions of the videos.
        seed: of all draws. Two datasets of one run need two seeds, or they draw alike.
    """

    def __init__(self, latents: ClipLatents, prompts: Sequence[str] | None = None, *, seed: int):
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a list of prompts, got the string {prompts!r}")
        if prompts is None and latents.folder.captions is None:
            raise ValueError(
                f"the videos in {str(latents.folder.root)!r} have no captions; pass prompts, or write NAME.txt files"
            )
        if prompts is not None and not prompts:
            raise ValueError("prompts is empty; pass at least one, or None for the captions of the videos")
        self._latents, self._prompts, self.seed = latents, prompts, seed

    def __len__(self) -> int:
        """Number of videos."""
        return len(self._latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The plain item, for validation: first window, posterior mean, first prompt."""
        return self._item(index, 0, 0, None)

    def sample(self, index: int, sample_key: int) -> dict[str, Any]:
        """Video `index` as sample `sample_key` of a run shows it: a pure function of (seed, index, sample_key)."""
        window = derive_seed(self.seed, "window", sample_key) % self._latents.num_windows(index)
        prompt = derive_seed(self.seed, "prompt", sample_key) % len(self._prompts or "1")
        noise = seeded_randn(tensor([sample_key]), self._latents.latent_shape, seed=self.seed, stream="posterior")[0]
        return self._item(index, window, prompt, noise)

    def _item(self, index: int, window: int, prompt: int, noise: Tensor | None) -> dict[str, Any]:
        return {
            "latents": self._latents.latents(index, window, noise),
            "prompt": self._latents.folder.captions[index] if self._prompts is None else self._prompts[prompt],
            "clip_index": index,
        }

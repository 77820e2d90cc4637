"""What MotionDirector is compared with: without debiasing, and one path that learns look and motion together."""

from typing import Any

from torch import Tensor

from common.training.noising import noise_batch
from common.training.seeding import derive_seed

from .dual_path import TEMPORAL, spatial_path
from .method import MotionDirector, original_loss, spatial_loss


class WithoutDebiasing(MotionDirector):
    """L_org-temp alone on the temporal path."""

    def _temporal_loss(self, model_pred: Tensor, target: Tensor, keys: Tensor) -> Tensor:
        return original_loss(model_pred, target)


class JointLoRA(MotionDirector):
    """The same pairs as one path: all learn from L_org-temp, and all are used at inference."""

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        noised = noise_batch(self.backbone, batch["latents"], batch["sample_keys"], seed=self.config.seed)
        conditioning = self._prompts.batch(list(batch["prompt"]))
        both = [spatial_path(0), TEMPORAL]
        with self.paths.using(dict.fromkeys(both, 1.0), learning=both):
            model_pred = self.backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning)
        return original_loss(model_pred, noised["target"]).mean()


class JointMixing(JointLoRA):
    """One path for the motion of a clip and the look of pictures at once.

    Batches are of `ZipDataset(clip=ClipDataset, image=SubjectDataset)`; the pictures have no temporal layers.
    """

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        shared = {name: batch[name] for name in ("sample_keys", "step")}
        return super().training_loss(batch["clip"] | shared) + self._picture_loss(batch["image"], batch["sample_keys"])

    def _picture_loss(self, pictures: dict[str, Any], keys: Tensor) -> Tensor:
        seed, path = derive_seed(self.config.seed, "pictures"), spatial_path(0)
        noised = noise_batch(self.backbone, pictures["latents"].unsqueeze(2), keys, seed=seed)
        conditioning = self._prompts.batch(list(pictures["prompt"]))
        with self.paths.using({path: 1.0}, learning=[path]):
            return spatial_loss(self.backbone, noised, conditioning, keys * 0).mean()

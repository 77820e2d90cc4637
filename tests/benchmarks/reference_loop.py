"""DreamBooth as a plain script trains it: every step decodes the pictures and runs the VAE and the text encoder again.

A yardstick written for this benchmark, after the outline of the diffusers example scripts: one network pass over
[subject; class], split in halves; torch's default AdamW; gradients clipped to norm 1.
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.backbones import Backbone
from common.data.images import crop_square, load_image, to_pixel_values


class PictureDataset(Dataset):
    """A picture of the subject and one of the class, each decoded when it is asked for, with token ids."""

    def __init__(self, backbone: Backbone, folders: tuple[Path, Path], prompts: tuple[str, str]):
        self.size_px, self.tokenizer, self.prompts = backbone.resolution_px, backbone.tokenizer, prompts
        self.paths = [sorted(folder.iterdir()) for folder in folders]

    def __len__(self) -> int:
        return max(len(paths) for paths in self.paths)

    def __getitem__(self, index: int) -> list[tuple[Tensor, Tensor]]:
        items = []
        for paths, prompt in zip(self.paths, self.prompts, strict=True):
            picture = crop_square(load_image(paths[index % len(paths)]), self.size_px)
            ids = self.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids[0]
            items.append((to_pixel_values(picture), ids))
        return items


def collate(items: list) -> tuple[Tensor, Tensor]:
    """[all of the subject ; all of the class]: pixel_values (2B,3,H,W), token ids (2B,77)."""
    rows = [item[part] for part in (0, 1) for item in items]
    return torch.stack([pixels for pixels, _ in rows]), torch.stack([ids for _, ids in rows])


def train_plainly(
    backbone: Backbone,
    folders: tuple[Path, Path],
    prompts: tuple[str, str],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Tune the U-Net in place.   folders, prompts: of the subject and of the class."""
    backbone.freeze().unet.requires_grad_(True).train()
    accelerator, unet = Accelerator(cpu=backbone.device.type == "cpu"), backbone.unet
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = get_scheduler("constant", optimizer)
    loader = DataLoader(
        PictureDataset(backbone, folders, prompts), batch_size, shuffle=True, collate_fn=collate, drop_last=True
    )
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for pixel_values, ids in itertools.islice(batches, steps):
        latents = backbone.vae.encode(pixel_values).latent_dist.sample() * backbone.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noisy_latents = backbone.noise_scheduler.add_noise(latents, noise, timesteps)
        prompt_embeds = backbone.text_encoder(ids)[0]
        noise_pred = unet(noisy_latents, timesteps, prompt_embeds).sample
        (subject_pred, class_pred), (subject_noise, class_noise) = noise_pred.chunk(2), noise.chunk(2)
        loss = F.mse_loss(subject_pred.float(), subject_noise.float())
        loss = loss + F.mse_loss(class_pred.float(), class_noise.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.detach().item()  # what the progress bar shows

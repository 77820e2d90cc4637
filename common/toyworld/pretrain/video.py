"""Recipe 7: the denoiser of tiny-video: tiny-sd inflated, its temporal layers and cross-attention trained on clips.

The temporal layers of this architecture do not read the prompt; cross-attention is where words of motion come in. No
caption of tiny-sd has these words, and its text encoder hardly tells them apart: "jumping" is three times nearer to
"still" than a cat is to a dog. So their embeddings are trained too, for tiny-video alone.
Epsilon objective, one timestep a clip, noise that frames have in part in common, as in sampling (`frames_in_common`),
captions dropped to "" one time in ten. Motion is decided at high noise, where errors of epsilon are small: timesteps
are drawn with a density that grows with t, and errors are weighted as those of v, (SNR + 1) / SNR (Salimans & Ho, arXiv
2202.00512), with the SNR in the numerator at most 5. Details flicker where low noise is learned badly: the last part of
the training draws timesteps evenly. The dropout of diffusers' temporal convolutions is off: no clip is seen more than a
few times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from common.backbones import load_backbone
from common.backbones.inflate import inflate, temporal_modules
from common.backbones.loading import load_trained_layers, load_words, word_id
from common.backbones.presets import VIDEO_EXTENSIONS
from common.backbones.video import frames_in_common
from common.io import atomic_write_text
from common.sampling.images import image_grid
from common.sampling.sampler import sample_latents
from common.toyworld.captions import motion_words
from common.toyworld.clip_shards import ALL_MOTIONS, load_clip_shards
from common.toyworld.pretrain.data import cached_latents, encode_texts, tokenize
from common.toyworld.pretrain.loop import LoopConfig, Recipe, train
from common.training.losses import min_snr_weights, signal_to_noise
from common.training.optimize import default_device
from common.training.seeding import seeded_generator

CAPTION_DROPOUT = 0.1
TRAINING = "training.json"  # of exported weights: how they were trained
EARLIER = "earlier.json"  # in a run's cache: TRAINING of the weights that it started from
TIMESTEP_POWERS = {"late": 2 / 3, "uniform": 1.0}
NUM_VALIDATION = 128  # clips at the end of the shards
GRID_PROMPTS = (
    "a video of a red teapot moving left on the beach", "a video of a blue car moving right in the city",
    "a video of a yellow duck jumping in a meadow", "a video of a green robot spinning on a stage",
    "a video of an orange cat growing in the snow", "a video of a white dog shrinking in the desert",
    "a video of a brown house zooming in in a forest", "a video of a purple mug zooming out in a room",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VideoConfig(LoopConfig):
    """Video denoiser: an hour on two cores."""

    data: Path  # folder of clip shards, see common.toyworld.clip_shards
    output: Path = Path("runs/video")
    minutes: float | None = 60.0
    batch_schedule: str = "0:4,3000:8"
    learning_rate: float = 8e-4
    optimizer: Literal["adamw", "muon"] = "muon"  # about 1.3 times fewer clips than AdamW to the same validation loss
    lr_schedule: str = "constant"
    ema_decay: float = 0.999
    validate_minutes: float = 15.0
    backbone: str = "tiny-sd"  # the image backbone that is inflated
    paraphrases: int = 2  # captions a clip, of those in the shards
    hard_motions: tuple[str, ...] = ("spinning", "shrinking", "zooming in", "orbiting camera")
    """Drawn three times as often as the others: they move few pixels, and are learned last."""
    guidance_scale: float = 7.5  # of the sample grid; s of uncond + s * (cond - uncond)
    timesteps: Literal["late", "uniform"] = "late"
    """late: denser at high noise, where motion is decided; uniform: for the last part, since details flicker else."""
    start_from: Path | None = None  # folder of exported weights to go on from, with a new optimiser


def trained_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """What the recipe trains: temporal layers and cross-attention."""
    prefixes = tuple(f"{name}." for name in temporal_modules(unet))
    return {name: p for name, p in unet.named_parameters() if name.startswith(prefixes) or ".attn2." in name}


class Words(nn.Module):
    """Embeddings of some words, which a text encoder uses in the place of its own.   rows: (N,D), of sorted `words`."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, words: Sequence[str]):
        super().__init__()
        table, ids = text_encoder.get_input_embeddings(), [word_id(tokenizer, word) for word in words]
        self.rows = nn.Parameter(table.weight[ids].detach().clone())
        places = torch.full((len(table.weight),), -1)
        places[ids] = torch.arange(len(ids))
        self.register_buffer("places", places, persistent=False)
        table.register_forward_hook(self._replace)

    def _replace(self, table: nn.Embedding, inputs: tuple[Tensor], embeddings: Tensor) -> Tensor:
        places = self.places[inputs[0]]
        return torch.where(places.unsqueeze(-1) >= 0, self.rows[places.clamp(min=0)], embeddings)


def drawn_examples(motions: Tensor, hard_motions: Sequence[str]) -> Tensor:
    """Indices of clips, those of hard motions three times; motions (N,) in ALL_MOTIONS.

    Raises: ValueError for an unknown motion.
    """
    unknown = sorted(set(hard_motions) - set(ALL_MOTIONS))
    if unknown:
        raise ValueError(f"no such motions: {', '.join(unknown)}; there are {', '.join(ALL_MOTIONS)}")
    hard = torch.isin(motions, torch.tensor([ALL_MOTIONS.index(name) for name in hard_motions], dtype=torch.int64))
    return torch.arange(len(motions)).repeat_interleave(torch.where(hard, 3, 1))


def timesteps_from(uniform: Tensor, num_train_timesteps: int, power: float) -> Tensor:
    """Timesteps of uniform numbers u in [0, 1), as u^power: even at 1, with a density that grows as sqrt(t) at 2/3."""
    return (uniform**power * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def late_weights(noise_scheduler: DDPMScheduler, timesteps: Tensor) -> Tensor:
    """Weights of epsilon's squared errors, (min(SNR, 5) + 1) / SNR: those of v, less at low noise; (B,) float32."""
    return min_snr_weights(noise_scheduler, timesteps) + 1 / signal_to_noise(noise_scheduler, timesteps)


def drawn_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Noise of clips, (B,4,F,h,w), as sampling begins with: frames have the preset's share of it in common."""
    own, shared = torch.randn(shape, generator=generator), torch.randn(*shape[:2], 1, *shape[3:], generator=generator)
    return frames_in_common(own, shared, VIDEO_EXTENSIONS["tiny-video"].noise_share)


def cache_of(run: Path) -> Path:
    """The folder beside a run that keeps its latents, and how the weights it started from were trained."""
    return run.parent / f"{run.name}-cache"


def train_video(config: VideoConfig) -> None:
    """Train; `export-video` takes the averaged weights from the checkpoint."""
    torch.manual_seed(config.seed)
    device = default_device()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    backbone = load_backbone(config.backbone, device=device).freeze()
    unet = inflate(backbone.unet).requires_grad_(False)
    if config.start_from is not None:
        load_trained_layers(unet, config.start_from)
        load_words(backbone, config.start_from)
    words = Words(backbone.tokenizer, backbone.text_encoder, motion_words()).to(device)
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for parameter in trained_parameters(unet).values():
        parameter.requires_grad_(True)
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # same values; torch's fused CPU attention is slower at these sizes
    scheduler = backbone.noise_scheduler
    data = load_clip_shards(config.data, config.max_images)
    num_frames = data.frames.shape[1]
    cache = cache_of(config.output)
    pictures = data.frames.flatten(0, 1)
    latents = cached_latents(backbone.vae, pictures, cache / "latents.safetensors")
    latents = latents.unflatten(0, (-1, num_frames)).permute(0, 2, 1, 3, 4)  # (N,4,F,16,16)
    captions = [texts[: config.paraphrases] for texts in data.captions]
    validation = min(NUM_VALIDATION, len(latents) // 10)
    drawn = drawn_examples(data.motions[:-validation], config.hard_motions)
    del data, pictures
    per_clip = len(captions[0])
    # row 0 is the empty prompt, then the captions of each clip
    prompts = tokenize(backbone.tokenizer, ["", *(text for row in captions[:-validation] for text in row)])
    check_texts = [row[0] for row in captions[-validation:]]
    check_noise = drawn_noise(latents[-validation:].shape, seeded_generator(0, "validation noise"))
    check_timesteps = torch.linspace(0, 999, validation).round().long()

    def losses_of(clean: Tensor, embeds: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return (unet(noisy, timesteps, embeds).sample.float() - noise).square().mean((1, 2, 3, 4))

    def loss(indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        indices, batch = drawn[indices], len(indices)
        paraphrase = torch.randint(per_clip, (batch,), generator=generator)
        is_told = torch.rand(batch, generator=generator) >= CAPTION_DROPOUT
        told = prompts[(1 + indices * per_clip + paraphrase) * is_told].to(device)
        embeds = backbone.text_encoder(told).last_hidden_state
        uniform = torch.rand(batch, generator=generator)
        timesteps = timesteps_from(uniform, scheduler.config.num_train_timesteps, TIMESTEP_POWERS[config.timesteps])
        clean = latents[indices].float()
        noise = drawn_noise(clean.shape, generator)
        losses = losses_of(clean.to(device), embeds, noise.to(device), timesteps.to(device))
        weights = late_weights(scheduler, timesteps.to(device))
        return {"loss": (losses * weights).mean(), "unweighted": losses.mean()}

    def validate() -> dict[str, float]:
        check_embeds = encode_texts(backbone.tokenizer, backbone.text_encoder, check_texts)
        parts = (latents[-validation:].float(), check_embeds, check_noise, check_timesteps)
        batches = zip(*(part.split(8) for part in parts), strict=True)
        return {"loss": torch.cat([losses_of(*(x.to(device) for x in batch)) for batch in batches]).mean().item()}

    def sample_grid() -> Image.Image:
        noise = drawn_noise((len(GRID_PROMPTS), *latents.shape[1:]), seeded_generator(0, "grid"))
        made = sample_latents(
            video, backbone.encode_prompt(GRID_PROMPTS), seeds=range(len(GRID_PROMPTS)), latents=noise,
            guidance_scale=config.guidance_scale,
        )  # fmt: skip
        frames = backbone.decode_latents(made.permute(0, 2, 1, 3, 4).flatten(0, 1))
        return image_grid(frames, columns=num_frames)

    video = load_backbone(config.backbone, device=device).freeze()
    video.unet = unet
    if config.start_from is not None:
        atomic_write_text(cache / EARLIER, (config.start_from / TRAINING).read_text("utf-8"))
    elif not config.resume:
        (cache / EARLIER).unlink(missing_ok=True)  # of another run in this place
    model = nn.ModuleDict({"unet": unet, "words": words})
    recipe = Recipe("video", model, len(drawn), loss, validate, sample_grid, tables=frozenset({"words.rows"}))
    train(recipe, config)

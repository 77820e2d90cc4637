"""`Backbone`: the parts of a latent diffusion model and the verbs that every method needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from common.backbones.attention import conditioned
from common.backbones.conditioning import Conditioning

if TYPE_CHECKING:
    from common.backbones.tokens import PlaceholderTokens


@dataclass(eq=False)
class Backbone:
    """Plain diffusers and transformers objects, and what methods do with them.

    `tokenizer_2` and `text_encoder_2` belong to SDXL and are None otherwise. `tokenizer` is None where only an
    architecture was loaded. `placeholders` is the `PlaceholderTokens` that is installed, if any.
    """

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer | None
    noise_scheduler: DDPMScheduler
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    placeholders: PlaceholderTokens | None = None

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def latent_size(self) -> int:
        """Height and width of the latents the UNet was trained on."""
        return self.unet.config.sample_size

    @property
    def resolution_px(self) -> int:
        """Height and width of the images that belong to such latents."""
        return self.latent_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents of one sample, (4,h,w)."""
        return (self.vae.config.latent_channels, self.latent_size, self.latent_size)

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """The text encoder; for SDXL both."""
        return tuple(encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All networks."""
        return (self.unet, self.vae, *self.text_encoders)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Backbone:
        """Move all networks, in place. Placeholder vectors follow to the device and stay float32."""
        for module in self.modules:
            nn.Module.to(module, device=device, dtype=dtype)  # diffusers' own `to` warns at every cast, without cause
        if self.placeholders is not None:
            self.placeholders.to(self.text_encoder.device)
        return self

    def eval(self) -> Backbone:
        """Evaluation mode (no dropout) for all networks, in place."""
        for module in self.modules:
            module.eval()
        return self

    def freeze(self) -> Backbone:
        """No network is trained: requires_grad off and eval mode, in place."""
        for module in self.modules:
            module.requires_grad_(False)
        return self.eval()

    def encode_images(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """VAE latents, scaled to about unit variance.

        Args:
            pixel_values: (B,3,H,W) in [-1,1].
            generator: draws from the posterior; None takes its mode.
        Returns: (B,4,h,w).
        """
        with self._vae_dtype() as dtype:
            posterior = self.vae.encode(pixel_values.to(self.device, dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return (latents * self.vae.config.scaling_factor).to(self.dtype)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B,3,H,W), clamped to [-1,1], from scaled latents (B,4,h,w)."""
        with self._vae_dtype() as dtype:
            images = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.device, dtype)).sample
        return images.to(self.dtype).clamp(-1, 1)

    @contextmanager
    def _vae_dtype(self) -> Iterator[torch.dtype]:
        """The VAE's dtype. SDXL's VAE overflows in float16, so it works in float32 inside the block."""
        if self.text_encoder_2 is None or self.vae.dtype != torch.float16 or not self.vae.config.force_upcast:
            yield self.vae.dtype
            return
        try:
            yield self.vae.to(torch.float32).dtype
        finally:
            self.vae.to(torch.float16)

    def encode_prompt(self, prompts: str | Sequence[str]) -> Conditioning:
        """What the text encoders make of prompts, as the diffusers pipelines compute it.

        Goes through installed placeholder tokens, whose vectors get gradients. SDXL time ids are those of an uncropped
        image of `resolution_px`.
        Raises: ValueError for a prompt of more than 77 tokens, start and end token included: nothing is cut.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.text_encoder_2 is None:
            ids = self._token_ids(self.tokenizer, prompts)
            return Conditioning(self.text_encoder(ids).last_hidden_state)
        hidden_states, pooled = [], None
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            output = encoder(self._token_ids(tokenizer, prompts), output_hidden_states=True)
            hidden_states.append(output.hidden_states[-2])
            pooled = output[0]  # of the second encoder: text_embeds
        size = self.resolution_px
        return Conditioning(
            torch.cat(hidden_states, dim=-1),
            pooled_prompt_embeds=pooled,
            time_ids=torch.tensor([[size, size, 0, 0, size, size]] * len(prompts), device=self.device),
        )

    def _token_ids(self, tokenizer: CLIPTokenizer | None, prompts: list[str]) -> Tensor:
        if tokenizer is None:
            raise ValueError(
                f"{self.name} was built from its architecture, which holds no tokenizer, so it cannot encode prompts; "
                "load a diffusers folder that has tokenizer/, or the pretrained weights"
            )
        if self.placeholders is not None:
            prompts = [self.placeholders.expand(prompt) for prompt in prompts]
        limit = self.text_encoder.config.max_position_embeddings
        ids = tokenizer(prompts, padding="max_length", max_length=limit, truncation=False).input_ids
        for prompt, row in zip(prompts, ids, strict=True):
            if len(row) > limit:
                raise ValueError(
                    f"{len(row)} tokens, but {self.name} reads {limit} (start and end included): {prompt!r}"
                )
        return torch.tensor(ids, device=self.device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) latents + sqrt(1 - alpha_bar_t) noise; latents, noise (B,4,h,w), timesteps (B,) int64."""
        last = self.noise_scheduler.config.num_train_timesteps - 1
        if timesteps.min() < 0 or timesteps.max() > last:  # a negative one would index from the end
            raise ValueError(f"timesteps must be in [0, {last}], got {timesteps.tolist()}")
        return self.noise_scheduler.add_noise(latents, noise, timesteps)

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict` should answer, (B,4,h,w): the noise, or the velocity for a v-prediction backbone."""
        if self._is_v_prediction():
            return self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return noise

    def predict(self, latents: Tensor, timesteps: Tensor | int, conditioning: Conditioning) -> Tensor:
        """The UNet's own output (epsilon or v), (B,4,h,w).

        Args:
            latents: noisy latents, (B,4,h,w).
            timesteps: (B,) int64, or one for all.
            conditioning: of B samples; one for several samples is `conditioning.repeat(B)`.
        """
        if conditioning.batch_size != len(latents):
            raise ValueError(
                f"{len(latents)} latents but a conditioning of batch {conditioning.batch_size}; see Conditioning.repeat"
            )
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(len(latents))
        context, options = self._context(conditioning, latents), {}
        if conditioning.pooled_prompt_embeds is not None:
            options["added_cond_kwargs"] = {
                "text_embeds": conditioning.pooled_prompt_embeds,
                "time_ids": conditioning.time_ids,
            }
        if conditioning.mid_block_residual is not None:
            options["down_block_additional_residuals"] = conditioning.down_block_residuals
            options["mid_block_additional_residual"] = conditioning.mid_block_residual
        plain = conditioning.is_plain
        with nullcontext() if plain else conditioned(self.unet, conditioning, timesteps):
            return self.unet(latents, timesteps, encoder_hidden_states=context, **options).sample

    def _context(self, conditioning: Conditioning, latents: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        """What the UNet takes as encoder_hidden_states."""
        if conditioning.image_tokens is None:
            return conditioning.prompt_embeds
        return conditioning.prompt_embeds, list(conditioning.image_tokens)

    def predict_noise(self, latents: Tensor, timesteps: Tensor | int, conditioning: Conditioning) -> Tensor:
        """The predicted noise epsilon, (B,4,h,w), also for a v-prediction backbone; arguments as in `predict`."""
        model_pred = self.predict(latents, timesteps, conditioning)
        if not self._is_v_prediction():
            return model_pred
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(len(latents))
        # for v = a noise - s x0 and latents = a x0 + s noise, a^2 + s^2 = 1: a v + s latents = noise
        alpha_bar = self.noise_scheduler.alphas_cumprod.to(latents.device)[timesteps]
        alpha_bar = alpha_bar.view(-1, *[1] * (latents.ndim - 1))
        return (alpha_bar.sqrt() * model_pred + (1 - alpha_bar).sqrt() * latents).to(model_pred.dtype)

    def _is_v_prediction(self) -> bool:
        prediction_type = self.noise_scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"{self.name} predicts {prediction_type!r}; only epsilon and v_prediction are supported")
        return prediction_type == "v_prediction"

    def to_pipeline(self) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """A diffusers pipeline of the same objects, with a DDIM scheduler and without safety checker.

        Placeholder tokens that are installed work in its prompts, and stop working there when they are removed.
        """
        scheduler = DDIMScheduler.from_config(self.noise_scheduler.config, set_alpha_to_one=False)
        shared = {
            "vae": self.vae, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer, "unet": self.unet,
            "scheduler": scheduler,
        }  # fmt: skip
        if self.text_encoder_2 is None:
            return StableDiffusionPipeline(
                **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        return StableDiffusionXLPipeline(
            **shared, text_encoder_2=self.text_encoder_2, tokenizer_2=self.tokenizer_2, add_watermarker=False
        )

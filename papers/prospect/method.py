"""ProSpect (Zhang et al., ACM TOG 42(6), SIGGRAPH Asia 2023, arXiv 2305.16225): staged contexts, and the method.

stages.py has the stages and their prompts, network.py the network f that makes the words p_1 .. p_n.
Paper -> here:  P* = [p_1 .. p_n] -> stage_words (n,D), index 0 = end of generation   p_0 -> word   S* -> placeholder
    c_i -> context of stage i, (R,77,D)   eps -> noise   z_t, t -> noisy_latents, timesteps
Departures D1 to D7 are explained in the card.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

from common.backbones import Backbone, Conditioning, PlaceholderTokens, load_backbone
from common.io import atomic_save_safetensors, atomic_write_text, load_safetensors
from common.sampling import img2img, sample_images
from common.training.losses import fixed_noise_validation
from common.training.noising import NoisedBatch, noise_batch

from .config import ProSpectConfig
from .network import StageNetwork, StageWords, draw_dropout
from .stages import first_timesteps, stage_of, stage_prompts

SLUG = Path(__file__).parent.name
ARTIFACT = "stage_words.safetensors"
NETWORK = "stage_network.safetensors"


def write_words(token_embeds: Tensor, token_ids: Tensor, words: Mapping[int, Tensor]) -> Tensor:
    """p_i takes the place of the placeholder's row, before positions are added.

    Args:
        token_embeds: (R,77,D).   token_ids: (R,77) int64.
        words: id of a placeholder -> one word for each row, (R,D).
    """
    for token_id, rows in words.items():
        is_placeholder = (token_ids == token_id)[..., None]
        token_embeds = torch.where(is_placeholder, rows[:, None].to(token_embeds.dtype), token_embeds)
    return token_embeds


def text_contexts(text_encoder: Module, token_ids: Tensor, words: Mapping[int, Tensor]) -> Tensor:
    """c_i of the frozen text encoder with the words written in, (R,77,D); arguments as in `write_words`."""
    table = text_encoder.get_input_embeddings()
    handle = table.register_forward_hook(lambda _, args, output: write_words(output, token_ids, words))
    try:
        return text_encoder(token_ids).last_hidden_state
    finally:
        handle.remove()


def denoising_loss(backbone: Backbone, noised: NoisedBatch, conditioning: Conditioning) -> Tensor:
    """|eps - eps_theta(z_t, t, c_i(t))|^2 as a mean over channels and pixels; one value per sample, (B,).

    For a v-prediction backbone the velocity takes the place of eps.
    """
    model_pred = backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning)  # (B,4,h,w)
    return F.mse_loss(model_pred.float(), noised["target"].float(), reduction="none").flatten(1).mean(1)


class ProSpect:
    """One picture, or a few of one concept, as n words, one for each stage; the backbone stays frozen.

    Several concepts can be told to one picture, also in one stage: see `add_concept`.
    """

    def __init__(self, backbone: Backbone, config: ProSpectConfig) -> None:
        if len(backbone.text_encoders) > 1:
            raise ValueError(f"{backbone.name} has two text encoders; ProSpect is defined for one, as in sd14 or sd21")
        self.backbone, self.config = backbone.freeze(), config
        self.tokens = PlaceholderTokens(backbone) if backbone.placeholders is None else backbone.placeholders
        (row,) = self.tokens.add(config.placeholder, initializer_token=config.initializer_token)
        self.word = row.requires_grad_(False)  # p_0, (1,D)
        width = self.word.shape[1]
        self.stages: Module = (
            StageWords(self.word.repeat(config.num_stages, 1))
            if config.direct
            else StageNetwork(width, config.num_stages, seed=config.seed)
        ).to(self.word.device)
        self.others: dict[str, Tensor] = {}  # placeholder -> P* of concepts that were added

    def parameters(self) -> list[tuple[str, Parameter]]:
        """f, or the n words themselves with `direct`."""
        return list(self.stages.named_parameters())

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """The denoising loss for latents (B,4,h,w); each sample is told the word of its own stage."""
        noised = noise_batch(self.backbone, batch["latents"], batch["sample_keys"], seed=self.config.seed)
        keep = draw_dropout(batch["sample_keys"], self.word.shape[1], seed=self.config.seed).to(self.word.device)
        words = self.stages(self.word.expand(len(keep), -1), keep)  # (B,n,D)
        stages = stage_of(noised["timesteps"], self.config.num_stages)
        own = words[torch.arange(len(words), device=words.device), stages]  # (B,D)
        conditioning = Conditioning(self.contexts(list(batch["prompt"]), {self.config.placeholder: own}))
        return denoising_loss(self.backbone, noised, conditioning).mean()

    def contexts(self, prompts: list[str], words: Mapping[str, Tensor]) -> Tensor:
        """Text features of R prompts, (R,77,D).   words: placeholder -> its word in each prompt, (R,D)."""
        tokenizer, limit = self.backbone.tokenizer, self.backbone.text_encoder.config.max_position_embeddings
        ids = tokenizer(prompts, padding="max_length", max_length=limit).input_ids
        for prompt, row in zip(prompts, ids, strict=True):
            if len(row) > limit:
                raise ValueError(f"{len(row)} tokens, but {self.backbone.name} reads {limit}: {prompt!r}")
        by_id = {tokenizer.convert_tokens_to_ids(name): rows for name, rows in words.items()}
        return text_contexts(self.backbone.text_encoder, torch.tensor(ids, device=self.backbone.device), by_id)

    @torch.no_grad()
    def stage_words(self) -> Tensor:
        """P* = [p_1 .. p_n] without dropout, (n,D) float32."""
        return self.stages(self.word)[0].clone()

    @torch.no_grad()
    def conditioning(self, prompt: str, fills: Sequence[str | int] | None = None) -> Conditioning:
        """One context for each stage; the n prompts are encoded here, once.

        Args:
            prompt: with S* or the placeholder of another concept in it; of neither, the backbone alone is told it.
            fills: what stands for S* at each stage, see `stages.stage_prompts`; None = S* with its own p_i.
        """
        num_stages, placeholder = self.config.num_stages, self.config.placeholder
        if fills is not None and len(fills) != num_stages:
            raise ValueError(f"fills needs one item for each of the {num_stages} stages, got {len(fills)}")
        concepts = {placeholder: self.stage_words(), **self.others}
        if fills is None:
            if not any(name in prompt for name in concepts):
                return self.backbone.encode_prompt(prompt)
            told = [(prompt, stage) for stage in range(num_stages)]
        else:
            told = stage_prompts(prompt, placeholder, fills)
        contexts = {
            start: Conditioning(self.contexts([text], {name: words[[source]] for name, words in concepts.items()}))
            for start, (text, source) in zip(first_timesteps(num_stages), told, strict=True)
        }
        return Conditioning.staged(contexts)

    def generate(
        self,
        prompt: str,
        *,
        seeds: list[int],
        fills: Sequence[str | int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Pictures for a prompt such as "a photo of a S* on the beach", one per seed, (B,3,H,W) in [-1,1].

        Args:
            fills: as in `conditioning`.
            num_inference_steps, guidance_scale: DDIM steps and s; None = those of the config.
            batch_size: pictures at a time.
        """
        config = self.config
        return sample_images(
            self.backbone,
            self.conditioning(prompt, fills),
            seeds=seeds,
            batch_size=batch_size,
            num_inference_steps=config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
        )

    @torch.no_grad()
    def edit(
        self,
        pixel_values: Tensor,
        prompt: str,
        *,
        seeds: list[int],
        strength: float,
        fills: Sequence[str | int] | None = None,
    ) -> Tensor:
        """Image editing: noise pictures (B,3,H,W) for strength x the steps, and denoise them under the prompt.

        Args: strength: in (0, 1]; stages whose steps are not run say nothing.   fills: as in `conditioning`.
        """
        latents = img2img(
            self.backbone,
            self.backbone.encode_images(pixel_values),
            self.conditioning(prompt, fills),
            seeds=seeds,
            strength=strength,
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
        )
        return self.backbone.decode_latents(latents).float().cpu()

    @torch.no_grad()
    def validation_loss(self, latents: Tensor) -> float:
        """The loss of pictures (B,4,h,w) under the plain prompt, with noise and timesteps that never change."""
        return fixed_noise_validation(self.backbone, latents, self.conditioning(self.config.plain_prompt()))

    def add_concept(self, artifact_path: str | Path) -> str:
        """Let prompts name the concept of another artifact, trained on the same backbone. Returns: its placeholder."""
        words, header = self._read(artifact_path)
        name = header["placeholder"]
        self.tokens.add(name, initial_vectors=words[:1])  # which row it is does not matter: each stage writes over it
        self.others[name] = words.to(self.word.device)
        return name

    def save(self, folder: Path) -> None:
        """Write stage_words.safetensors, all that generation needs, and artifact.json.

        Each p_i is an entry "S*[i]", (1,D), that diffusers' `load_textual_inversion` takes.
        """
        header = {
            "slug": SLUG,
            "version": "1",
            "backbone": self.backbone.name,
            "class_noun": self.config.initializer_token,
            "placeholder": self.config.placeholder,
            "config": json.dumps(asdict(self.config)),
        }
        words = {stage_token(self.config.placeholder, i): row[None] for i, row in enumerate(self.stage_words())}
        path = Path(folder) / ARTIFACT
        atomic_save_safetensors(words, path, header)
        atomic_write_text(path.with_name("artifact.json"), json.dumps({**header, "file": ARTIFACT}, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read the words that `save` wrote; they take the place of the network. Raises: ValueError for other shapes."""
        self.stages = StageWords(self._read(folder)[0]).to(self.word.device)

    def _read(self, path: str | Path) -> tuple[Tensor, dict[str, str]]:
        words, header = _read_artifact(path)
        own = (self.config.num_stages, self.word.shape[1])
        if tuple(words.shape) != own:
            raise ValueError(f"{path} holds words {tuple(words.shape)}, but {self.config.placeholder} needs {own}")
        return words, header

    def save_network(self, folder: Path) -> None:
        """Write f and p_0, what the code's file holds; named as there."""
        tensors = {f"attention.{name}": value for name, value in self.stages.state_dict().items()}
        header = {"slug": SLUG, "config": json.dumps(asdict(self.config))}
        atomic_save_safetensors({**tensors, "initial_embeddings": self.word}, Path(folder) / NETWORK, header)


def stage_token(placeholder: str, stage: int) -> str:
    """The name of p_i in the artifact: "<cup>[9]"."""
    return f"{placeholder}[{stage}]"


def load_method(
    artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu"
) -> ProSpect:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: stage_words.safetensors, or the folder that holds it.
        backbone_name: None = the one that it was trained on.
    """
    _, header = _read_artifact(artifact_path)
    config = ProSpectConfig(**json.loads(header["config"]))
    method = ProSpect(load_backbone(backbone_name or header["backbone"], device=device), config)
    method.load(Path(artifact_path))
    return method


def _read_artifact(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """P*, (n,D), and the header of an artifact."""
    path = Path(path)
    path = path / ARTIFACT if path.is_dir() else path
    tensors, header = load_safetensors(path)
    if "config" not in header or "placeholder" not in header:
        raise ValueError(f"{path} was not written by this method")
    names = [stage_token(header["placeholder"], stage) for stage in range(len(tensors))]
    return torch.cat([tensors[name] for name in names]), header

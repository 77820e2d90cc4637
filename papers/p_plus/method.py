"""P+ and extended textual inversion, XTI (Voynov et al., 2023, arXiv 2303.09522), in the order of the paper.

Paper -> here:  P+ -> Conditioning.layer_prompt_embeds   layer i -> index in the order of the forward pass
    y -> prompt   S* -> placeholder   t_i -> layer_token(S*, i)   e_i -> words, L tensors (1,D)   eps -> noise
Departures D1 to D4 are explained in the card. Bands of layers, and what mixing does with them, are in bands.py.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from common.backbones import Backbone, Conditioning, PlaceholderTokens, load_backbone
from common.backbones.attention import attention_layers
from common.io import atomic_save_safetensors, atomic_write_text, load_safetensors
from common.sampling import sample_images
from common.training.losses import fixed_noise_validation
from common.training.noising import NoisedBatch, noise_batch

from .config import PPlusConfig

SLUG = Path(__file__).parent.name
ARTIFACT = "layer_words.safetensors"
KEY = "words"  # the one tensor in it, (L,D)


def layer_token(placeholder: str, layer: int) -> str:
    """t_i, the token that stands for S* in the prompt of one layer: "<duck>" in layer 3 is "<duck>[3]"."""
    return f"{placeholder}[{layer}]"


def replace_each(text: str, replacements: Mapping[str, str]) -> str:
    """All of the words replaced at once, the longest first, so that none is found inside another: "sks" in "sks1"."""
    names = "|".join(re.escape(name) for name in sorted(replacements, key=len, reverse=True))
    return re.sub(names, lambda match: replacements[match[0]], text)


def layer_prompts(prompt: str, placeholders: Sequence[str], num_layers: int) -> list[str]:
    """y -> y_1 .. y_L, which differ in the tokens of the concepts only (Sec. 3; Sec. 4 for t_i)."""
    return [replace_each(prompt, {name: layer_token(name, i) for name in placeholders}) for i in range(num_layers)]


def denoising_loss(backbone: Backbone, noised: NoisedBatch, conditioning: Conditioning) -> Tensor:
    """|eps - eps_theta(z_t, t, c(y_1), .., c(y_L))|^2 as a mean over channels and pixels; one value per sample, (B,).

    For a v-prediction backbone the velocity takes the place of eps.
    """
    model_pred = backbone.predict(noised["noisy_latents"], noised["timesteps"], conditioning)  # (B,4,h,w)
    return F.mse_loss(model_pred.float(), noised["target"].float(), reduction="none").flatten(1).mean(1)


class PPlus:
    """A concept as one word for each cross-attention layer, on a frozen backbone.

    The backbone may hold the words of other concepts too (`add_concept`); prompts can use them all.
    """

    def __init__(self, backbone: Backbone, config: PPlusConfig) -> None:
        if len(backbone.text_encoders) > 1:
            raise ValueError(f"{backbone.name} has two text encoders; P+ is defined for one, as in sd14, sd15, sd21")
        self.backbone, self.config = backbone.freeze(), config
        cross = [layer.info for layer in attention_layers(backbone.unet) if layer.info.kind == "cross"]
        self.layer_names = [info.name for info in cross]
        self.tokens = PlaceholderTokens(backbone) if backbone.placeholders is None else backbone.placeholders
        self.placeholders: list[str] = []
        self.words: list[Parameter] = self._add(config.placeholder, initializer_token=config.initializer_token)

    @property
    def num_layers(self) -> int:
        """L, of the UNet: 16 in SD 1.x."""
        return len(self.layer_names)

    def _add(self, placeholder: str, words: Tensor | None = None, **options: Any) -> list[Parameter]:
        """Install t_1 .. t_L.   words: (L,D)."""
        added: list[Parameter] = []
        for i in range(self.num_layers):
            start = None if words is None else words[i : i + 1]
            added += self.tokens.add(layer_token(placeholder, i), initial_vectors=start, **options)
        self.placeholders.append(placeholder)
        return added

    def parameters(self) -> list[tuple[str, Parameter]]:
        """e_1 .. e_L, each (1,D)."""
        return [(f"words.{i}", word) for i, word in enumerate(self.words)]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """The denoising loss for latents (B,4,h,w), one template a sample; e_i learns through layer i alone."""
        noised = noise_batch(self.backbone, batch["latents"], batch["sample_keys"], seed=self.config.seed)
        conditioning = self.conditioning(list(batch["prompt"]))
        return denoising_loss(self.backbone, noised, conditioning).mean()

    def conditioning(self, prompts: Sequence[str], fills: Sequence[str] | None = None) -> Conditioning:
        """A context for each cross-attention layer; all texts that differ are encoded as one batch.

        Args:
            prompts: B texts with S*, or the placeholder of another concept, in them; a text with neither says the same
                to all layers.
            fills: L texts that take the place of S* in the layers' prompts, such as "red cube", or the placeholder of
                another concept; None = S* everywhere.
        Raises: ValueError if fills is of another length, or there is no S* that it could take the place of.
        """
        if fills is not None and len(fills) != self.num_layers:
            raise ValueError(f"fills needs one text for each of the {self.num_layers} layers, got {len(fills)}")
        told = [self._told(prompt, fills) for prompt in prompts]  # B x L
        rows = {text: i for i, text in enumerate(dict.fromkeys(text for texts in told for text in texts))}
        encoded = self.backbone.encode_prompt(list(rows)).prompt_embeds
        layers = tuple(encoded[[rows[texts[i]] for texts in told]] for i in range(self.num_layers))  # each (B,77,D)
        return Conditioning(layers[0], layer_prompt_embeds=layers)

    def _told(self, prompt: str, fills: Sequence[str] | None) -> list[str]:
        """What each layer is told, L texts."""
        if fills is None:
            return layer_prompts(prompt, self.placeholders, self.num_layers)
        if self.config.placeholder not in prompt:
            raise ValueError(f"the prompt has no {self.config.placeholder} to put words in the place of: {prompt!r}")
        others = {name: name for name in self.placeholders}
        filled = [replace_each(prompt, others | {self.config.placeholder: fill}) for fill in fills]
        return [layer_prompts(text, self.placeholders, self.num_layers)[i] for i, text in enumerate(filled)]

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        *,
        seeds: list[int],
        fills: Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Pictures for a prompt such as "a photo of a S* on the beach", one per seed, (B,3,H,W) in [-1,1].

        The unconditional half of guidance is told the empty prompt in all layers.

        Args:
            fills: as in `conditioning`; this is how two concepts are mixed.
            num_inference_steps, guidance_scale: DDIM steps and s; None = those of the config.
            batch_size: pictures at a time.
        """
        config = self.config
        return sample_images(
            self.backbone,
            self.conditioning([prompt], fills),
            seeds=seeds,
            batch_size=batch_size,
            num_inference_steps=config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
        )

    @torch.no_grad()
    def validation_loss(self, latents: Tensor) -> float:
        """The loss of pictures (B,4,h,w) under the plain prompt, with noise and timesteps that never change."""
        return fixed_noise_validation(self.backbone, latents, self.conditioning([self.config.plain_prompt()]))

    def layer_words(self) -> Tensor:
        """e_1 .. e_L, (L,D) float32."""
        return torch.cat([word.detach().float() for word in self.words])

    def set_layer_words(self, words: Tensor) -> None:
        """Put other vectors in the place of e_1 .. e_L.   words: (L,D), or (1,D) for all layers."""
        with torch.no_grad():
            for i, word in enumerate(self.words):
                word.copy_(words[min(i, len(words) - 1)][None])

    def add_concept(self, artifact_path: str | Path) -> str:
        """Let prompts name the concept of another artifact, trained on the same backbone. Returns: its placeholder."""
        words, header = self._read(artifact_path)
        self._add(header["placeholder"], words)
        return header["placeholder"]

    def save(self, folder: Path) -> None:
        """Write layer_words.safetensors, {"words": (L,D) float32}, and artifact.json.

        The header names slug, backbone, class word, placeholder, config and the modules that the rows belong to.
        """
        header = {
            "slug": SLUG,
            "version": "1",
            "backbone": self.backbone.name,
            "class_noun": self.config.initializer_token,
            "placeholder": self.config.placeholder,
            "layers": json.dumps(self.layer_names),
            "config": json.dumps(asdict(self.config)),
        }
        path = Path(folder) / ARTIFACT
        atomic_save_safetensors({KEY: self.layer_words().cpu()}, path, header)
        atomic_write_text(path.with_name("artifact.json"), json.dumps({**header, "file": ARTIFACT}, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read the words that `save` wrote. Raises: ValueError naming the file if its layers or width are others."""
        self.set_layer_words(self._read(folder)[0])

    def _read(self, path: str | Path) -> tuple[Tensor, dict[str, str]]:
        words, header = read_artifact(path)
        own = (self.num_layers, self.words[0].shape[1])
        if tuple(words.shape) != own or json.loads(header["layers"]) != self.layer_names:
            raise ValueError(
                f"{path} holds words {tuple(words.shape)} for the layers of {header['backbone']}; {self.backbone.name} "
                f"needs {own} in its own order"
            )
        return words, header


def load_method(
    artifact_path: str | Path, backbone_name: str | None = None, device: torch.device | str = "cpu"
) -> PPlus:
    """The method of an artifact, ready to generate.

    Args:
        artifact_path: layer_words.safetensors, or the folder that holds it.
        backbone_name: None = the one that it was trained on.
    """
    _, header = read_artifact(artifact_path)
    config = PPlusConfig(**json.loads(header["config"]))
    method = PPlus(load_backbone(backbone_name or header["backbone"], device=device), config)
    method.load(Path(artifact_path))
    return method


def read_artifact(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """e_1 .. e_L, (L,D), and the header of an artifact. Raises: ValueError naming the file if it is no such file."""
    path = Path(path)
    path = path / ARTIFACT if path.is_dir() else path
    tensors, header = load_safetensors(path)
    if header.get("slug") != SLUG:
        raise ValueError(f"{path} was not written by this method, but by {header.get('slug', 'something unknown')}")
    return tensors[KEY], header

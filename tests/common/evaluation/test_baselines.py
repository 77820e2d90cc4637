"""The two baselines on a tiny-sd with random weights: what they learn, what they leave alone, what they save."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.backbones import Backbone, load_backbone
from common.evaluation import baselines
from common.evaluation.baselines import (
    BaselineConfig,
    FullFineTuning,
    TokenInversion,
    full_fine_tuning,
    token_inversion,
)
from common.evaluation.study import Study, benchmark_row, run_study
from common.fingerprint import weights_hash
from common.io import load_safetensors
from common.sampling.images import save_png, to_pil
from common.toyworld.benchmark import subjects
from common.training.noising import noise_batch

LEARNING_RATE = 1e-3
CONFIG = BaselineConfig(train_steps=1, batch_size=2, learning_rate=LEARNING_RATE, num_inference_steps=2)
METHODS = {"inversion": TokenInversion, "fine-tuning": FullFineTuning}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_backbone(name: str = "tiny-sd", **options) -> Backbone:
    return load_backbone("tiny-sd", weights="random")


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A subject and the folder with two of its photos; backbones have random weights, always the same."""
    monkeypatch.setattr(baselines, "load_backbone", new_backbone)
    monkeypatch.setattr(baselines, "default_device", lambda: torch.device("cpu"))
    (subject,) = subjects(1)
    for i, image in enumerate(to_pil(subject.images[:2])):
        save_png(image, tmp_path / "photos" / f"{i}.png")
    return subject, tmp_path / "photos"


def fit_settings(run: Path) -> dict:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]


@pytest.mark.parametrize("kind", METHODS)
def test_loss_is_the_mean_squared_error_of_the_noise(kind):
    """Reference: diffusers' own modules and the forward process in numpy, under the words of each baseline."""
    method = METHODS[kind](new_backbone(), "dog", CONFIG)
    backbone, keys = method.backbone, torch.tensor([3, 8])
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    prompt = {"inversion": "a photo of a <subject>", "fine-tuning": "a photo of a sks dog"}[kind]
    assert method.plain_prompt() == prompt
    loss = method.training_loss({"latents": latents, "sample_keys": keys, "prompt": [prompt] * 2, "step": 0})

    drawn = noise_batch(backbone, latents, keys, seed=CONFIG.seed)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    kept = np.cumprod(1 - betas)[drawn["timesteps"].numpy()].reshape(2, 1, 1, 1)
    noisy = np.sqrt(kept) * latents.numpy() + np.sqrt(1 - kept) * drawn["noise"].numpy()
    words = "a photo of a dog" if kind == "inversion" else prompt  # the new word begins as its class
    length = backbone.tokenizer.model_max_length
    ids = backbone.tokenizer([words] * 2, padding="max_length", max_length=length, return_tensors="pt").input_ids
    with torch.no_grad():
        context = backbone.text_encoder(ids).last_hidden_state
        predicted = backbone.unet(torch.from_numpy(noisy).float(), drawn["timesteps"], context).sample
    expected = np.mean((predicted.numpy() - drawn["noise"].numpy()) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert loss.ndim == 0


def test_inversion_trains_one_vector_by_adam_and_nothing_else(world, tmp_path):
    """Adam's first step moves every coordinate by the learning rate, whatever the gradient's size."""
    subject, photos = world
    candidate = token_inversion("tiny-sd", CONFIG)
    assert candidate.words == "<subject>"
    learned = candidate.train(subject, photos, tmp_path / "run")
    assert fit_settings(tmp_path / "run")["fit.max_grad_norm"] is None  # as in Textual Inversion
    fresh = new_backbone()
    (row,) = fresh.tokenizer(subject.class_noun, add_special_tokens=False).input_ids
    before = fresh.text_encoder.get_input_embeddings().weight[row].detach()
    (vector,) = learned.parameters()
    moved = (vector.detach()[0] - before).abs()
    assert vector.shape == (1, len(before))
    assert moved.median().item() == pytest.approx(LEARNING_RATE, rel=0.02)
    assert moved.max().item() <= LEARNING_RATE * 1.001
    for part in ("unet", "vae", "text_encoder"):
        assert weights_hash(getattr(learned.backbone, part)) == weights_hash(getattr(fresh, part)), part

    learned.save(tmp_path / "artifact")
    (path,) = (tmp_path / "artifact").iterdir()
    tensors, header = load_safetensors(path)
    assert path.name == "learned_embeds.safetensors" and header["placeholder_token"] == "<subject>"
    assert tensors.keys() == {"<subject>"} and torch.equal(tensors["<subject>"], vector.detach())


def test_fine_tuning_trains_the_whole_unet_and_nothing_else(world, tmp_path):
    subject, photos = world
    candidate = full_fine_tuning("tiny-sd", CONFIG)
    assert candidate.words == "sks {class}"
    learned = candidate.train(subject, photos, tmp_path / "run")
    assert fit_settings(tmp_path / "run")["fit.max_grad_norm"] == 1.0
    fresh = new_backbone()
    assert sum(p.numel() for p in learned.parameters()) == sum(p.numel() for p in fresh.unet.parameters())
    unmoved = [
        name
        for (name, now), before in zip(learned.backbone.unet.named_parameters(), fresh.unet.parameters(), strict=True)
        if torch.equal(now, before)
    ]
    assert not unmoved
    for part in ("vae", "text_encoder"):
        assert weights_hash(getattr(learned.backbone, part)) == weights_hash(getattr(fresh, part)), part

    learned.save(tmp_path / "artifact")
    (path,) = (tmp_path / "artifact").iterdir()
    fresh.unet.load_state_dict(load_safetensors(path)[0])
    assert weights_hash(fresh.unet) == weights_hash(learned.backbone.unet)
    assert path.stat().st_size == pytest.approx(4 * sum(p.numel() for p in learned.parameters()), rel=0.01)  # float32

    again = candidate.train(subject, photos, tmp_path / "run")  # a finished run is found, not done again
    assert weights_hash(again.backbone.unet) == weights_hash(learned.backbone.unet)


def test_untrained_baselines_draw_and_score_as_the_base_with_their_words():
    """The untrained new word is the class noun bit for bit, and "sks dog" is two ordinary words."""
    inversion, tuned = TokenInversion(new_backbone(), "dog", CONFIG), FullFineTuning(new_backbone(), "dog", CONFIG)
    images = inversion.generate("a photo of a <subject>", seeds=[4, 5])
    assert images.shape == (2, 3, 64, 64) and images.abs().max() <= 1
    assert torch.equal(images, tuned.generate("a photo of a dog", seeds=[4, 5]))
    alone = tuned.generate("a photo of a dog", seeds=[5])
    torch.testing.assert_close(images[1:], alone, rtol=0, atol=1e-4)  # another batch size rounds differently
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    tuned.words = "dog"
    assert inversion.validation_loss(latents) == tuned.validation_loss(latents)


def test_settings_tell_the_two_and_every_field_apart():
    make = {"inversion": token_inversion, "fine-tuning": full_fine_tuning}
    settings = [make[kind]("tiny-sd", CONFIG).settings for kind in METHODS]
    more = BaselineConfig(train_steps=2, batch_size=2, learning_rate=LEARNING_RATE, num_inference_steps=2)
    settings.append(token_inversion("tiny-sd", more).settings)
    assert len({json.dumps(row, sort_keys=True) for row in settings}) == 3


def test_both_run_the_study_with_the_real_judge(tmp_path):
    folder = tmp_path / "tiny-random"
    new_backbone().to_pipeline().save_pretrained(folder)
    candidates = {"TI": token_inversion(str(folder), CONFIG), "full": full_fine_tuning(str(folder), CONFIG)}
    scores = run_study(str(folder), candidates, Study.quick(), tmp_path / "runs")
    (name,) = [subject.name for subject in subjects(1)]
    assert all(values.keys() == {"TI", "full"} and values["TI"].keys() == {name} for values in scores.values())
    assert scores["bytes"]["TI"][name] < 2000 < 70e6 < scores["bytes"]["full"][name]
    rows = [benchmark_row(method, scores, Study.quick(), str(folder)) for method in candidates]
    assert rows[0].study == rows[1].study and rows[0].setting == Study.quick().setting("tiny-random")
    assert rows[0].training_seconds > 0 and 0 <= rows[0].compliance.mean <= 1 and -1 <= rows[0].identity.mean <= 1

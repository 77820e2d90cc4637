"""The three stages: who learns from what, in which order, and what is kept."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common.backbones import load_backbone
from common.io import load_safetensors
from common.three_d.cameras import angles_of
from common.three_d.render import render
from common.training.seeding import derive_seed, keys_of_step, seeded_randn


def weights(backbone):
    return {name: value.clone() for name, value in backbone.unet.state_dict().items()}


def differ(a, b):
    return any(not torch.equal(a[name], b[name]) for name in a)


def test_tuning_loss_by_hand(paper, backbone_folder, config):
    """The mean squared error of epsilon for photos, and lambda times that for class images, with noise of their own."""
    config = replace(config, tuning=replace(config.tuning, prior_loss_weight=0.5))
    backbone = load_backbone(backbone_folder)
    method = paper.tuning.SubjectTuning(backbone, config, seed=7)
    keys = keys_of_step(3, 2)
    latents, of_class = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    found = method.training_loss({"sample_keys": keys, "latents": latents, "class_latents": of_class})

    from common.training.noising import uniform_timesteps

    losses = []
    cases = ((latents, "a photo of a sks bear", 7), (of_class, "a photo of a bear", derive_seed(7, "class images")))
    for clean, prompt, seed in cases:
        timesteps = uniform_timesteps(keys, seed, 1000)
        noise = seeded_randn(keys, (4, 8, 8), seed=seed)
        abar = backbone.noise_scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        told = backbone.encode_prompt([prompt, prompt])
        losses.append(F.mse_loss(backbone.unet(noisy, timesteps, told.prompt_embeds).sample, noise))
    torch.testing.assert_close(found, losses[0] + 0.5 * losses[1])


def test_stages_in_the_papers_order(make_method, backbone_folder):
    """D_full and D_multi both begin with D_partial; the untuned model stays as it is."""
    method = make_method()
    method.run()
    files = {"partial", "full", "multi"}
    assert {path.parent.name for path in method.folder.glob("*/unet.safetensors")} == files
    assert {path.parent.name for path in method.folder.glob("*/field.safetensors")} == {"first_field", "final_field"}
    tuned = {name: load_safetensors(method.folder / name / "unet.safetensors")[0] for name in files}
    untouched = weights(load_backbone(backbone_folder))
    pairs = [(untouched, tuned["partial"]), (tuned["partial"], tuned["full"]), (tuned["partial"], tuned["multi"]),
             (tuned["full"], tuned["multi"])]  # fmt: skip
    assert all(differ(*pair) for pair in pairs)
    largest = max((tuned["multi"][name] - tuned["partial"][name]).abs().max().item() for name in untouched)
    assert largest < 2.5 * 1e-3  # two steps of Adam at 1e-3 away from D_partial


def test_multi_tuning_sees_pseudo_views_and_photos(paper, make_method, monkeypatch):
    method, seen = make_method(), {}

    def fit(trained, dataset, settings, folder, **options):
        seen[folder.name] = (len(dataset), settings.train_steps, weights(trained.backbone))

    method.tune_partial()
    partial = load_safetensors(method.folder / "partial" / "unet.safetensors")[0]
    first = method.first_field()
    views = method.pseudo_views(first)
    monkeypatch.setattr(paper.method, "fit", fit)
    method.tune_multi(views)
    count, steps, start = seen["multi"]
    assert (count, steps) == (4 + 3, 2) and not differ(start, partial)


def test_finished_stages_are_read(paper, make_method, monkeypatch):
    first = make_method().run()

    def fit(*of, **options):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(paper.method, "fit", fit)
    again = make_method().run()
    assert torch.equal(first.field.grid, again.field.grid)


def test_a_stopped_stage_goes_on(paper, make_method, monkeypatch, tmp_path):
    """The final field in 18 steps at once, and with a stop after 16: the same bits."""

    def training_loss(field, batch, whole=paper.subject_field.SubjectField.training_loss):
        if field.views is not None and batch["step"] == 16:
            raise MemoryError
        return whole(field, batch)

    method = make_method(final_steps=18, folder=tmp_path / "stopped")
    method.options = {"checkpoint_every": 16}
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.subject_field.SubjectField, "training_loss", training_loss)
        method.run()
    assert not (method.folder / "final_field" / "field.safetensors").exists()
    whole = make_method(final_steps=18, folder=tmp_path / "whole")
    whole.options = {"checkpoint_every": 16}
    assert torch.equal(method.run().field.grid, whole.run().field.grid)


def test_prior_loss_uses_samples_of_the_untuned_model(make_method, config):
    tuning = replace(config.tuning, prior_loss_weight=1.0, num_class_images=2)
    method = make_method(tuning=tuning)
    method.tune_partial()
    assert load_safetensors(method.folder / "class_latents.safetensors")[0]["latents"].shape == (2, 4, 8, 8)


def test_pseudo_views_know_their_cameras(paper, make_method, config):
    """A rendering of the first field with a view's camera is the view's rendering; cameras surround the object."""
    method = make_method(num_pseudo_views=24)
    first = method.first_field()
    views = method.pseudo_views(first)
    camera = views.cameras(16)[5:6]
    with torch.no_grad():
        made = render(first.field, camera, background=first.background, num_samples=10).images()
    torch.testing.assert_close(made[0], views.renderings[5], rtol=0, atol=1e-4)
    azimuths, elevations, distances = angles_of(views.cameras(16))
    assert ((azimuths % 360).sort().values.diff() < 40).all()
    assert elevations.min() >= config.field.elevation_low and elevations.max() <= config.field.elevation_high
    middle = (config.field.distance_low + config.field.distance_high) / 2
    torch.testing.assert_close(distances, torch.full_like(distances, middle), rtol=0, atol=1e-4)
    assert len(list((method.folder / "first_field" / "pseudo_views").glob("*.png"))) == 24
    back = paper.pseudo_views.read_pseudo_views(method.folder / "first_field")
    assert all(torch.equal(value, getattr(back, name)) for name, value in vars(views).items())


def test_white_balance_by_hand(paper):
    picture = torch.full((1, 3, 8, 8), 0.8)  # 0.9 of 1
    picture[:, :, 2:6, 2:6] = 0.0  # 0.5
    made = paper.pseudo_views.white_balanced(picture)
    assert made[0, :, 0, 0] == pytest.approx(torch.ones(3)) and made[0, 0, 3, 3] == pytest.approx(0.5 / 0.9 * 2 - 1)
    dark = paper.pseudo_views.white_balanced(torch.full((1, 3, 8, 8), -0.8))
    assert dark[0, 0, 0, 0] == pytest.approx(0.1 * 1.25 * 2 - 1)  # a dark picture stays dark

"""The algorithm: its gradient, who gets it, saving and loading, settings, training with a resume, the claims."""

from dataclasses import replace

import pytest
import torch

from common.distillation import TimestepRange, distillation_loss, picture_latents
from common.io import load_safetensors
from common.training.seeding import keys_of_step, seeded_generator


def batch(step, views=1):
    return {"step": step, "sample_keys": keys_of_step(step, views)}


def test_the_gradient_is_the_residual_times_the_renderings_derivative(paper, backbone, config):
    """dL/dtheta of L_SDS against w (eps_hat - eps) put by hand into autograd.grad of the latents."""
    method = paper.method.DreamFusion(backbone, config, "a bear")
    rendering, azimuths, elevations = method.random_views(2, 0, seeded_generator(0, "test"))
    told = method.prompts.at(azimuths, elevations)
    loss = distillation_loss(
        backbone, rendering.images(), method.predictor(told), TimestepRange(), seeded_generator(1, "test")
    )
    (found,) = torch.autograd.grad(loss, method.field.grid, retain_graph=True)

    generator = seeded_generator(1, "test")
    timesteps = torch.randint(20, 981, (2,), generator=generator)
    latents = picture_latents(backbone, rendering.images())
    noise = torch.randn(latents.shape, generator=generator)
    abar = backbone.noise_scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    with torch.no_grad():
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        with_prompt = backbone.predict_noise(noisy, timesteps, told)
        without = backbone.predict_noise(noisy, timesteps, backbone.encode_prompt(["", ""]))
        omega = config.guidance_scale - 1
        gradient = (1 - abar) * ((1 + omega) * with_prompt - omega * without - noise)
    (expected,) = torch.autograd.grad(latents, method.field.grid, grad_outputs=gradient / 2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_only_field_and_background_learn(paper, backbone, config):
    method = paper.method.DreamFusion(backbone, replace(config, background="learned", views_per_step=2), "a bear")
    groups = method.parameters()
    assert [group["lr"] for group in groups] == [config.learning_rate, config.background_learning_rate]
    method.training_loss(batch(0, 2)).backward()
    for group in groups:
        for name, parameter in group["params"]:
            assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for module in backbone.modules for p in module.parameters())
    assert set(method.losses) == {"sds", "opacity", "orientation"}


@pytest.mark.parametrize("field", ("voxels", "triplane"))
def test_a_step_is_a_function_of_its_number(paper, backbone, config, field):
    config = replace(config, field=field)
    losses = [paper.method.DreamFusion(backbone, config, "a bear").training_loss(batch(s)).item() for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_regularisers_rise_and_weigh_as_told(paper, backbone, config):
    """At step 0 orientation weighs nothing, later its weight: differences between two configs by hand."""

    def loss(step, **changes):
        method = paper.method.DreamFusion(backbone, replace(config, **changes), "a bear")
        value = method.training_loss(batch(step)).item()
        return value, method.losses

    (plain, parts), (opaque, _) = loss(0, opacity_weight=0.0), loss(0, opacity_weight=500.0)
    assert opaque - plain == pytest.approx(500 * parts["opacity"], rel=1e-3)
    assert loss(0, orientation_weight=0.0)[0] == loss(0, orientation_weight=1e4)[0]
    late = config.train_steps // 2
    (plain, parts), (facing, _) = (loss(late, orientation_weight=w) for w in (0.0, 1e4))
    assert facing - plain == pytest.approx(1e4 * parts["orientation"], rel=1e-2)


def test_saved_fields_come_back(paper, backbone, config, tmp_path):
    method = paper.method.DreamFusion(backbone, replace(config, background="learned"), "a bear")
    with torch.no_grad():
        method.field.grid += 0.3
    method.save(tmp_path)
    again = paper.method.load_method(tmp_path / "field.safetensors")
    pictures = again.generate("a bear", seeds=[0, 1, 2])
    assert pictures.shape == (3, 3, 16, 16) and torch.equal(pictures, method.views(3).images())
    with pytest.raises(ValueError, match="made from the prompt 'a bear'"):
        again.generate("a cat", seeds=[0])
    other = paper.method.DreamFusion(backbone, replace(config, field_resolution=9), "a bear")
    with pytest.raises(ValueError, match="field.safetensors does not fit the field"):
        other.load(tmp_path)


def test_larger_backbones_see_larger_pictures(paper, backbone, config):
    method = paper.method.DreamFusion(backbone, config, "a bear")
    pictures = method.views(1).images()
    assert pictures.shape[-1] == 16 and picture_latents(backbone, pictures).shape == (1, *backbone.latent_shape)


def test_settings_are_checked(paper):
    make = paper.config.DreamFusionConfig
    for wrong in ({"train_steps": 0}, {"learning_rate": 0.0}, {"albedo_share": 1.5}, {"highest_timestep": 1.0},
                  {"lowest_timestep": 0.99}, {"distance_low": 9.0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
            make(**wrong)
    assert make().guidance_scale == 1 + 100


def test_train_stops_and_resumes(paper, tmp_path, monkeypatch, capsys):
    """Eighteen steps at once, and with a stop after sixteen: the same bits; and all files are there."""
    arguments = [
        *("--prompt", "a bear", "--train-steps", "18", "--field-resolution", "10", "--render-px", "16"),
        *("--num-samples", "8", "--checkpoint-every", "16", "--sample-every", "0"),
    ]
    paper.train.main([*arguments, "--output", str(tmp_path / "whole")])
    assert "training field.grid: (1, 4, 10, 10, 10), 4,000 numbers, lr 0.05" in capsys.readouterr().out
    assert {"field.safetensors", "turntable.mp4", "normals.gif"} <= {f.name for f in (tmp_path / "whole").iterdir()}

    monkeypatch.setattr(paper.train, "save_object", lambda *of: None)  # seen above; it takes seconds

    def training_loss(method, batch, whole=paper.method.DreamFusion.training_loss):
        if batch["step"] == 16:
            raise MemoryError
        return whole(method, batch)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(paper.method.DreamFusion, "training_loss", training_loss)
        paper.train.main([*arguments, "--output", str(tmp_path / "stopped")])
    paper.train.main([*arguments, "--output", str(tmp_path / "stopped"), "--resume"])
    files = [load_safetensors(tmp_path / run / "field.safetensors")[0] for run in ("whole", "stopped")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_claims_of_made_up_scores(paper):
    """Every claim holds when the scores are as the paper says, and none when they are the other way."""
    e, plan = paper.experiments, paper.experiments.Plan.full()
    better, worse = (1.0, 0.0), (0.0, 1.0)

    def scores(good):
        def pair(first, second, higher):
            a, b = good if higher else good[::-1]
            return {first: dict.fromkeys(plan.nouns, a), second: dict.fromkeys(plan.nouns, b)}

        return {
            e.JANUS: pair(e.PROPOSAL, e.FIXED, False),
            e.TEXTURELESS: pair(e.PROPOSAL, e.ALBEDO, True),
            e.VARIANCE: pair(e.SDS, e.WITHOUT_NOISE, False),
            e.AGREEMENT: {e.SDS: dict.fromkeys(plan.nouns, 1.0 if good == better else 5.0)},
            e.CLASS: pair(e.STRONG, e.WEAK, True),
            e.SATURATION: pair(e.STRONG, e.WEAK, True),
            e.DIVERSITY: pair(e.STRONG, e.WEAK, False),
            e.SIDES: {e.PROPOSAL: dict.fromkeys(plan.nouns, 4.0 if good == better else 1.0)},
        }

    for good, verdict in ((better, "yes"), (worse, "no")):
        found = paper.reproduce.claims(scores(good), plan, "tiny-sd")
        assert {claim.holds for claim in found} == {"not run", verdict} and len(found) == 9

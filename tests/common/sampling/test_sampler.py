"""The loop against diffusers' own pipeline, and what it promises about seeds, batches, guidance and callbacks."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

from common.backbones.conditioning import Conditioning
from common.sampling.guidance import classifier_free, rescaled
from common.sampling.sampler import img2img, sample_latents, seeded_noise

PIPELINE_SCHEDULERS = {
    "ddim": (DDIMScheduler, {"set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1}),
    "dpmpp": (DPMSolverMultistepScheduler, {"steps_offset": 1}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
}


def pipeline_latents(backbone, scheduler, **call):
    """What StableDiffusionPipeline makes of the same modules with the schedulers as Stable Diffusion ships them."""
    scheduler_class, settings = PIPELINE_SCHEDULERS[scheduler]
    stepper = scheduler_class(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=backbone.noise_scheduler.config.prediction_type,
        **settings,
    )
    pipe = StableDiffusionPipeline(
        backbone.vae, None, None, backbone.unet, stepper, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe(output_type="latent", **call).images


def conditionings(backbone):
    return backbone.encode_prompt(["a red cup", "a dog"]), backbone.encode_prompt(["", ""])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp", "euler"])
def test_equals_the_diffusers_pipeline(small_backbone, small_v_backbone, scheduler, prediction_type):
    """Same generators on both sides, so the initial noise of a seed is tested too."""
    backbone = small_backbone if prediction_type == "epsilon" else small_v_backbone
    cond, null = conditionings(backbone)
    expected = pipeline_latents(
        backbone,
        scheduler,
        prompt_embeds=cond.prompt_embeds,
        negative_prompt_embeds=null.prompt_embeds,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 11)],
        num_inference_steps=12,
        guidance_scale=4.0,
        height=16,
        width=16,
    )
    actual = sample_latents(
        backbone, cond, null, seeds=[3, 11], num_inference_steps=12, guidance_scale=4.0, scheduler=scheduler
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_eta_equals_the_diffusers_pipeline_and_differs_from_eta_0(small_backbone):
    cond, null = conditionings(small_backbone)
    settings = {"num_inference_steps": 6, "guidance_scale": 3.0, "eta": 0.8}
    expected = pipeline_latents(
        small_backbone,
        "ddim",
        prompt_embeds=cond[:1].prompt_embeds,
        negative_prompt_embeds=null[:1].prompt_embeds,
        generator=torch.Generator().manual_seed(5),
        height=16,
        width=16,
        **settings,
    )
    actual = sample_latents(small_backbone, cond[:1], null[:1], seeds=[5], **settings)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    plain = sample_latents(small_backbone, cond[:1], null[:1], seeds=[5], **{**settings, "eta": 0.0})
    assert not torch.allclose(actual, plain, atol=0.1)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_does_not_depend_on_batch_or_order(small_backbone, eta):
    cond = small_backbone.encode_prompt("a red cup")
    settings = {"num_inference_steps": 8, "guidance_scale": 5.0, "eta": eta}
    together = sample_latents(small_backbone, cond, seeds=[4, 7, 1, 9], **settings)
    alone = torch.cat([sample_latents(small_backbone, cond, seeds=[seed], **settings) for seed in (9, 1, 7, 4)])
    torch.testing.assert_close(together, alone.flip(0), rtol=1e-4, atol=1e-4)


def test_draws_of_eta_do_not_repeat_the_initial_noise_when_latents_are_given(small_backbone):
    cond = small_backbone.encode_prompt("a dog")
    settings = {"seeds": [4], "num_inference_steps": 3, "eta": 1.0}
    given = sample_latents(small_backbone, cond, latents=seeded_noise(small_backbone, [4]), **settings)
    assert torch.equal(given, sample_latents(small_backbone, cond, **settings))


def test_noise_of_a_seed_is_bit_equal_in_any_batch(small_backbone):
    assert torch.equal(seeded_noise(small_backbone, [4, 7, 1])[1], seeded_noise(small_backbone, [7])[0])


def test_guidance_makes_one_pass_of_twice_the_batch_and_none_at_scale_1(small_backbone):
    cond, null = conditionings(small_backbone)
    small_backbone.network_batches.clear()
    sample_latents(small_backbone, cond, null, seeds=[0, 1], num_inference_steps=3)
    assert small_backbone.network_batches == [4, 4, 4]
    small_backbone.network_batches.clear()
    small_backbone.encoded_prompts.clear()
    sample_latents(small_backbone, cond, seeds=[0, 1], num_inference_steps=3, guidance_scale=1)
    assert small_backbone.network_batches == [2, 2, 2] and small_backbone.encoded_prompts == []


def test_rule_gets_both_predictions_the_timestep_and_the_scale(small_backbone):
    cond, null = conditionings(small_backbone)
    calls = []

    def rule(noise_uncond, noise_cond, timestep, guidance_scale):
        calls.append((timestep, guidance_scale))
        return classifier_free(noise_uncond, noise_cond, timestep, guidance_scale)

    settings = {"seeds": [0, 1], "num_inference_steps": 4, "guidance_scale": 6.0}
    ruled = sample_latents(small_backbone, cond, null, guidance=rule, **settings)
    assert calls == [(751, 6.0), (501, 6.0), (251, 6.0), (1, 6.0)]
    plain = sample_latents(small_backbone, cond, null, **settings)
    assert torch.equal(ruled, plain)
    assert not torch.allclose(sample_latents(small_backbone, cond, null, guidance=rescaled(), **settings), plain)


def test_missing_negative_is_the_empty_prompt(small_backbone):
    cond, null = conditionings(small_backbone)
    settings = {"seeds": [0, 1], "num_inference_steps": 3}
    explicit = sample_latents(small_backbone, cond, null, **settings)
    assert torch.equal(sample_latents(small_backbone, cond, **settings), explicit)


def test_conditioning_per_step_equals_one_where_all_are_equal_and_is_used_in_order(small_backbone):
    cond, null = conditionings(small_backbone)
    settings = {"seeds": [0, 1], "num_inference_steps": 3, "guidance_scale": 3.0}
    once = sample_latents(small_backbone, cond, null, **settings)
    assert torch.equal(sample_latents(small_backbone, cond, [null] * 3, **settings), once)
    seen = []

    class Recording:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def predict_noise(self, latents, timesteps, conditioning):
            seen.append(conditioning.prompt_embeds[0, 0, 0].item())
            return self.inner.predict_noise(latents, timesteps, conditioning)

    marked = [Conditioning(torch.full((1, 5, 12), float(step))) for step in range(3)]
    sample_latents(Recording(small_backbone), cond, marked, **settings)
    assert seen == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp", "euler"])
def test_callback_sees_every_step_and_can_replace_latents(small_backbone, scheduler):
    cond, null = conditionings(small_backbone)
    settings = {"seeds": [0, 1], "num_inference_steps": 5, "scheduler": scheduler}
    kept, steps = [], []

    def keep(step_index, timestep, latents, noise_pred):
        steps.append((step_index, timestep))
        kept.append(latents)
        assert noise_pred.shape == latents.shape == (2, 4, 8, 8)

    final = sample_latents(small_backbone, cond, null, on_step=keep, **settings)
    assert [index for index, _ in steps] == list(range(5)) and steps[0][1] > steps[-1][1]
    assert torch.equal(kept[-1], final)
    replaced = sample_latents(
        small_backbone, cond, null, on_step=lambda i, t, x, n: x + 1 if i == 4 else None, **settings
    )
    torch.testing.assert_close(replaced, final + 1)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_stopping_and_starting_again_is_the_same_run(small_backbone, scheduler):
    """The latents that a callback sees are those that `latents` and `start_step` take, also for Euler."""
    cond, null = conditionings(small_backbone)
    settings = {"seeds": [0, 1], "num_inference_steps": 6, "scheduler": scheduler}
    kept = []
    whole = sample_latents(small_backbone, cond, null, on_step=lambda i, t, x, n: kept.append(x), **settings)
    rest = sample_latents(small_backbone, cond, null, latents=kept[3], start_step=4, **settings)
    torch.testing.assert_close(rest, whole, rtol=1e-5, atol=1e-5)


def test_result_can_enter_a_training_step(small_backbone):
    """Tensors of inference_mode could not."""
    latents = sample_latents(
        small_backbone, small_backbone.encode_prompt("a dog"), seeds=[0], num_inference_steps=2, guidance_scale=1
    )
    weight = torch.ones(4, 4, 1, 1, requires_grad=True)
    torch.nn.functional.conv2d(latents, weight).sum().backward()
    assert not latents.requires_grad and weight.grad is not None


def test_img2img_keeps_more_at_lower_strength_and_skips_the_right_steps(small_backbone):
    cond, null = conditionings(small_backbone)
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = []
    settings = {"seeds": [0, 1], "num_inference_steps": 10, "guidance_scale": 1.0}
    little = img2img(small_backbone, clean, cond, null, strength=0.1, **settings)
    half = img2img(
        small_backbone, clean, cond, null, strength=0.5, on_step=lambda i, t, x, n: steps.append((i, t)), **settings
    )
    assert steps == [(5, 401), (6, 301), (7, 201), (8, 101), (9, 1)]
    assert (little - clean).square().mean() < (half - clean).square().mean()


def test_img2img_with_a_perfect_denoiser_returns_to_the_data(gaussian_backbone):
    """At strength s the exact result is the noised latents moved along the ODE: known in closed form."""
    clean = torch.full((1, 4, 8, 8), 0.9, dtype=torch.float64)
    cond = gaussian_backbone.encode_prompt("")
    actual = img2img(gaussian_backbone, clean, cond, seeds=[3], strength=0.5, num_inference_steps=500, guidance_scale=1)
    alpha = gaussian_backbone.alpha(499)  # 250 steps remain of 999, 997, ..., 1
    noised = alpha**0.5 * clean + (1 - alpha) ** 0.5 * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    exact = gaussian_backbone.unstandardise(gaussian_backbone.standardise(noised, alpha), gaussian_backbone.alpha(0))
    torch.testing.assert_close(actual, exact, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": []}, "one int per image"),
        ({"seeds": 3}, "one int per image"),
        ({"seeds": [0, 1, 2]}, "conditioning is for 2 images but there are 3 seeds"),
        ({"eta": 0.5, "scheduler": "euler"}, "eta is a setting of ddim only"),
        ({"eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
        ({"start_step": 2}, "start_step 2 needs latents"),
        ({"start_step": 5, "latents": torch.zeros(2, 4, 8, 8)}, "start_step must be in 0..4, got 5"),
        ({"latents": torch.zeros(3, 4, 8, 8)}, "latents hold 3 images but there are 2 seeds"),
        ({"scheduler": "plms"}, "ddim, dpmpp, euler"),
    ],
)
def test_bad_values_raise(small_backbone, settings, message):
    cond, null = conditionings(small_backbone)
    with pytest.raises(ValueError, match=message):
        sample_latents(small_backbone, cond, null, **{"seeds": [0, 1], "num_inference_steps": 5, **settings})


def test_a_list_needs_one_conditioning_per_step(small_backbone):
    cond, null = conditionings(small_backbone)
    with pytest.raises(ValueError, match="negative_conditioning has 4 entries; a list needs one per step, 5"):
        sample_latents(small_backbone, cond, [null] * 4, seeds=[0, 1], num_inference_steps=5)


@pytest.mark.parametrize(("strength", "message"), [(0.0, "strength must be in"), (0.05, "leaves none to run")])
def test_img2img_checks_strength(small_backbone, strength, message):
    cond, null = conditionings(small_backbone)
    with pytest.raises(ValueError, match=message):
        img2img(
            small_backbone,
            torch.zeros(2, 4, 8, 8),
            cond,
            null,
            seeds=[0, 1],
            strength=strength,
            num_inference_steps=10,
        )

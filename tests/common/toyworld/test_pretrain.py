"""The training loop of the recipes, the VAE's losses and folding, caches, sampling, export, measures."""

import json
import math
import signal

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from common.io import load_safetensors
from common.toyworld.pretrain import export as export_module
from common.toyworld.pretrain.data import PromptTable, cached_latents, encode_texts, to_pixel_values
from common.toyworld.pretrain.export import ExportConfig, export, measurement_table
from common.toyworld.pretrain.loop import (
    LoopConfig,
    Progress,
    Recipe,
    batch_size_at,
    load_average,
    lr_factor,
    parse_batch_schedule,
    train,
)
from common.toyworld.pretrain.unet import denoising_losses
from common.toyworld.pretrain.vae import (
    VaeConfig,
    fold_latent_statistics,
    keep_encoder,
    psnr,
    reconstruction_loss,
    reconstruction_psnr,
)
from common.toyworld.tokenizer import load_tokenizer
from common.training.interrupt import RunInterrupted
from common.training.run_folder import RunFolderError


def small_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    return AutoencoderKL(
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4, layers_per_block=1,
        mid_block_add_attention=False, sample_size=64, **blocks,
    ).eval()  # fmt: skip


def small_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def small_text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def scheduler():
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )  # fmt: skip


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 256, (12, 3, 8, 8), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, 64).permute(0, 2, 3, 1).to(torch.uint8)


# --- loop ---------------------------------------------------------------------------------------------------------


def line_recipe(seen: list | None = None, stop_at: int | None = None) -> Recipe:
    """Learn y = 3x from 40 numbers; noise drawn from the step's generator."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    xs = torch.linspace(-1, 1, 40)[:, None]
    calls = []

    def loss(indices, generator):
        if seen is not None:
            seen.append(indices.tolist())
        calls.append(0)
        if stop_at is not None and len(calls) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        noise = 0.1 * torch.randn(len(indices), 1, generator=generator)
        return {"loss": (model(xs[indices]) - 3 * xs[indices] - noise).square().mean()}

    return Recipe("line", model, 40, loss, lambda: {"error": (model.weight - 3).abs().item()})


def line_config(tmp_path, **changes) -> LoopConfig:
    settings = {"steps": 12, "batch_schedule": "0:4,6:8", "learning_rate": 0.05, "lr_warmup_steps": 2, "log_every": 4}
    settings["bf16"] = False
    return LoopConfig(data=tmp_path, output=tmp_path / "run", **(settings | changes))


def test_the_loop_learns_logs_and_leaves_the_average(tmp_path):
    seen: list = []
    recipe = line_recipe(seen)
    train(recipe, line_config(tmp_path, steps=150, ema_decay=0.9))
    assert recipe.model.weight.item() == pytest.approx(3, abs=0.15)
    assert [len(rows) for rows in seen[:8]] == [4] * 6 + [8] * 2
    assert sorted(sum(seen[:6], []) + seen[6] + seen[7]) == list(range(40))  # one epoch shows each example once
    tensors, header = load_safetensors(tmp_path / "run" / "checkpoint.safetensors")
    assert json.loads(header["progress"])["step"] == 150
    assert torch.equal(tensors["ema.weight"], recipe.model.weight.detach())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("validation/error" in line for line in lines) and lines[0]["step"] == 4
    other = load_average(torch.nn.Linear(1, 1), tmp_path / "run")
    assert torch.equal(other.weight, recipe.model.weight)
    with pytest.raises(ValueError, match="does not fit"):
        load_average(torch.nn.Conv1d(1, 1, 1, bias=False), tmp_path / "run")


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(line_recipe(), line_config(whole))
    with pytest.raises(RunInterrupted):
        train(line_recipe(stop_at=7), line_config(stopped))
    assert json.loads(load_safetensors(stopped / "run" / "checkpoint.safetensors")[1]["progress"])["step"] == 7
    with pytest.raises(RunFolderError, match="not empty"):
        train(line_recipe(), line_config(stopped))
    train(line_recipe(), line_config(stopped, resume=True))
    first, second = (load_safetensors(folder / "run" / "checkpoint.safetensors")[0] for folder in (whole, stopped))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    recipe = line_recipe()
    weight = recipe.model.weight
    broken = Recipe("line", recipe.model, 40, lambda *_: {"loss": weight.sum() * math.nan}, recipe.validate)
    train(recipe, line_config(tmp_path))
    kept = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    with pytest.raises(FloatingPointError, match="step 12: loss nan"):
        train(broken, line_config(tmp_path, steps=20, resume=True))
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == kept


def test_a_time_budget_ends_the_run_and_its_schedule(tmp_path):
    config = line_config(tmp_path, steps=None, minutes=10.0)
    assert Progress(step=500, seconds=300).fraction(config) == 0.5
    assert lr_factor(config, Progress(step=500, seconds=300)) == pytest.approx(0.5)
    assert lr_factor(config, Progress(step=0, seconds=0)) == pytest.approx(0.5)  # first of two warm-up steps
    held = line_config(tmp_path, steps=None, minutes=10.0, lr_schedule="constant")
    factors = [lr_factor(held, Progress(step=500, seconds=60 * m)) for m in (1, 8, 9, 10)]
    assert factors == pytest.approx([1, 1, 0.5, 0])
    with pytest.raises(ValueError, match="--minutes"):
        line_config(tmp_path, steps=None)


def test_batch_schedules_in_steps_and_minutes():
    schedule = parse_batch_schedule("0:16,100:32,90m:64")
    for step, minutes, expected in ((0, 0, 16), (99, 9, 16), (100, 9, 32), (500, 90, 64)):
        assert batch_size_at(schedule, Progress(step=step, seconds=60 * minutes)) == expected
    for bad in ("16", "5:16", "0:0", "0:16;9:32"):
        with pytest.raises(ValueError, match="schedule"):
            parse_batch_schedule(bad)


# --- VAE ----------------------------------------------------------------------------------------------------------


def test_reconstruction_loss_by_hand(tmp_path):
    config = VaeConfig(data=tmp_path, object_weight=4, chroma_weight=2, absolute_weight=0.5)
    error = torch.zeros(1, 3, 2, 2)
    error[:, :, 0, 0] = torch.tensor([0.2, 0.2, 0.2])  # no chroma, on the second entity
    error[:, :, 1, 1] = torch.tensor([0.0, 0.0, 0.1])  # blue, on the background
    masks = torch.tensor([[[2, 0], [0, 0]]], dtype=torch.uint8)
    on_object = 0.2**2 + 0.5 * 0.2
    outside = 0.1**2 / 3 + 2 * ((0.1 * 0.5) ** 2 + (0.1 * 0.081312) ** 2) + 0.5 * 0.1 / 3
    expected = (4 * on_object + outside) / 4 / ((4 + 3) / 4)  # mean over 4 pixels; mean weight 7/4
    assert reconstruction_loss(error, masks, config).item() == pytest.approx(expected, rel=1e-4)


def test_psnr_in_db():
    assert psnr(torch.full((5,), 0.04)) == pytest.approx(20.0)  # range 2: 10 log10(4 / 0.04)


def test_folding_gives_unit_latents_and_the_same_pictures(images):
    vae = small_vae()
    pixel_values = to_pixel_values(images)
    with torch.no_grad():
        before = vae.encode(pixel_values).latent_dist
        decoded = vae.decode(before.mode()).sample
        fold_latent_statistics(vae, images)
        after = vae.encode(pixel_values).latent_dist
        torch.testing.assert_close(vae.decode(after.mode()).sample, decoded, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.mode().mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mode().std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    old_std = before.mode().std((0, 2, 3))[:, None, None]
    torch.testing.assert_close(after.std, before.std / old_std, atol=1e-4, rtol=1e-3)
    assert vae.config.scaling_factor == 1.0


def test_a_kept_encoder_gives_the_same_latents_with_a_narrow_posterior_and_does_not_train(images):
    vae, pixel_values = small_vae(), to_pixel_values(images)
    with torch.no_grad():
        mode = vae.encode(pixel_values).latent_dist.mode()
    posterior = keep_encoder(vae, posterior_std=0.05).encode(pixel_values).latent_dist
    assert torch.equal(posterior.mode(), mode)
    torch.testing.assert_close(posterior.std, torch.full_like(mode, 0.05))
    trained = {name.split(".")[0] for name, p in vae.named_parameters() if p.requires_grad}
    assert trained == {"decoder", "post_quant_conv"}


def test_decoder_only_needs_a_trained_encoder(tmp_path):
    with pytest.raises(ValueError, match="--start-from"):
        VaeConfig(data=tmp_path, decoder_only=True)


def test_reconstruction_psnr_counts_object_pixels_alone(images):
    masks = torch.zeros(len(images), 64, 64, dtype=torch.uint8)
    masks[:, :32] = 1
    top, bottom = (reconstruction_psnr(small_vae(), images, m)["psnr_object"] for m in (masks, 1 - masks))
    whole = reconstruction_psnr(small_vae(), images, masks)["psnr"]
    assert 10 ** (-whole / 10) == pytest.approx((10 ** (-top / 10) + 10 ** (-bottom / 10)) / 2, rel=1e-4)


# --- caches and sampling ------------------------------------------------------------------------------------------


def test_latents_are_cached_until_the_vae_changes_and_must_have_unit_variance(images, tmp_path):
    path = tmp_path / "latents.safetensors"
    with pytest.raises(ValueError, match="pretrain fold"):
        cached_latents(small_vae(), images, path)
    vae = fold_latent_statistics(small_vae(), images)
    first = cached_latents(vae, images, path)
    written = path.stat().st_mtime_ns
    assert torch.equal(cached_latents(vae, images, path), first) and path.stat().st_mtime_ns == written
    other = fold_latent_statistics(small_vae(seed=1), images)
    assert not torch.equal(cached_latents(other, images, path), first)


def test_the_prompt_table_gives_what_the_text_encoder_gives(tmp_path):
    tokenizer, encoder = load_tokenizer(), small_text_encoder()
    texts = ["a red mug", "a photo of a cat", "a red mug"]
    table = PromptTable(tokenizer, encoder, texts, tmp_path / "prompts.npy")
    assert table.rows[""] == 0 and len(table.rows) == 3
    rows = torch.tensor([table.rows["a photo of a cat"], 0])
    expected = encode_texts(tokenizer, encoder, ["a photo of a cat", ""])
    assert table[rows].shape == (2, 77, 32)
    torch.testing.assert_close(table[rows], expected, atol=2e-3, rtol=1e-3)
    again = PromptTable(tokenizer, encoder, texts[::-1], tmp_path / "prompts.npy")
    assert torch.equal(again[rows], table[rows])


def test_the_denoising_loss_of_a_network_that_says_nothing_is_the_noise_power(scheduler):
    unet = small_unet()
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    noise, embeds = torch.randn(3, 4, 16, 16), torch.randn(3, 77, 32)
    losses = denoising_losses(unet, scheduler, torch.randn(3, 4, 16, 16), embeds, noise, torch.tensor([0, 500, 999]))
    torch.testing.assert_close(losses, noise.square().mean((1, 2, 3)))


# --- export and measures ------------------------------------------------------------------------------------------


def test_the_exported_folder_is_a_diffusers_pipeline(tmp_path, monkeypatch, scheduler):
    unet = small_unet()
    unet.save_config(tmp_path / "architecture" / "unet")
    scheduler.save_pretrained(tmp_path / "architecture" / "scheduler")
    monkeypatch.setattr(export_module, "ARCHITECTURE", tmp_path / "architecture")
    small_vae().save_pretrained(tmp_path / "vae")
    small_text_encoder().save_pretrained(tmp_path / "text_encoder")
    bias = unet.conv_out.bias
    loss = Recipe("unet", unet, 8, lambda *_: {"loss": (bias - 1).square().sum() + 0 * _sum(unet)}, lambda: {"x": 0.0})
    train(loss, LoopConfig(data=tmp_path, output=tmp_path / "run", steps=3, batch_schedule="0:1", bf16=False))
    parts = {"vae": tmp_path / "vae", "text_encoder": tmp_path / "text_encoder", "unet_run": tmp_path / "run"}
    export(ExportConfig(output=tmp_path / "out", **parts))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    torch.testing.assert_close(pipeline.unet.conv_out.bias, bias, atol=1e-3, rtol=1e-3)
    result = pipeline("a red mug", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
    assert result.images.shape == (1, 64, 64, 3)
    stored, _ = load_safetensors(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert "3 steps" in (tmp_path / "out" / "README.md").read_text()


def _sum(module: torch.nn.Module) -> torch.Tensor:
    return sum(parameter.sum() for parameter in module.parameters())


def test_the_card_states_numbers_beside_goals():
    measured = {
        "settings": {"num_images": 4, "first_seed": 9, "num_inference_steps": 30, "guidance_scale": 4.0},
        "attributes": {"class": {"generated": 0.75, "goal": 0.9, "judge": 0.98, "prompts": 4}},
        "vae": {"psnr": 28.04, "psnr_object": 25.06},
        "frechet": 3.0,
        "frechet_floor": 1.0,
    }
    text = "\n".join(measurement_table(measured))
    assert "| class | 75.0% | 90% | 98.0% | 4 |" in text
    assert "28.0 dB" in text and "25.1 dB" in text

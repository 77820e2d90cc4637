"""The equations, what is trained, counts, the artifact, the settings."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import nn

from common.backbones import load_backbone
from common.backbones.adapters import SpectralShift, attach
from common.io import atomic_save_safetensors, load_safetensors
from common.sampling import sample_images
from common.training import losses as common_losses
from common.training.noising import noise_batch

STORED_LOSSES = [2.448384, 2.295262, 2.453184, 2.252331, 2.102180]
KIB, PER_TENSOR = 1024, 0.36  # storage of a tensor in the paper's files, beyond its values, in KiB


def wave(*shape, step=0.7):
    """Made-up weights and inputs without a random generator."""
    count = torch.Size(shape).numel()
    return torch.sin(step * torch.arange(1, 1 + count).float() ** 1.5).reshape(shape)


def make_batch(step=0, batch_size=2, *, size=8, with_class=True, collage=False):
    generator = torch.Generator().manual_seed(step)

    def part(prompt):
        return {"latents": torch.randn(batch_size, 4, size, size, generator=generator), "prompt": [prompt] * batch_size}

    instance, of_class = ("sks dog and a zwx cat", "dog and a cat") if collage else ("sks dog", "dog")
    batch = {"instance": part(f"a photo of a {instance}")}
    batch |= {"class": part(f"a photo of a {of_class}")} if with_class else {}
    sides = torch.tensor([[0, 1]] * batch_size) if collage else torch.full((batch_size, 1), -1)
    return {
        **batch,
        "sides": sides,
        "sample_keys": torch.arange(step * batch_size, (step + 1) * batch_size),
        "step": step,
    }


def make_method(paper, backbone, nouns=("dog",), **changes):
    return paper.method.SVDiff(backbone, paper.config.SVDiffConfig.tiny(*nouns, **changes))


def randomised(method, scale=0.05):
    generator = torch.Generator().manual_seed(5)
    shifts = {n: scale * torch.randn(s.shape, generator=generator) for n, s in method.shifts().items()}
    method.load_shifts(shifts)
    return shifts


def small(paper, backbone, **changes):
    return make_method(paper, backbone, num_inference_steps=2, **changes)


REFERENCE = {
    # mkshing/svdiff-pytorch @ a78f69e, svdiff_pytorch/layers.py, SVDLinear(4, 3) at scale 1 and 0.5
    1.0: [[1.2547069787979126, 0.11267489194869995, 0.9350547194480896],
          [0.45240190625190735, -0.9446383118629456, 0.4141240119934082]],
    0.5: [[1.187186360359192, 0.18646949529647827, 0.9500752091407776],
          [0.2975367605686188, -0.9481764435768127, 0.3860917091369629]],
}  # fmt: skip
CONVOLUTION = [  # the same, SVDConv2d(2, 3, 3, stride=2, padding=1)
    [[1.1197012662887573, -1.8264174461364746], [-0.997915506362915, -0.05791236460208893]],
    [[1.4968923330307007, -1.7683451175689697], [-1.122750163078308, 0.5431129932403564]],
    [[0.9718724489212036, 0.3140102028846741], [0.15247507393360138, 1.155534029006958]],
]
MATRIX = [  # phymhan/SVDiff @ 4ca843c, utils_svd.py, _SpectralShift, its missing attributes set to None and 0
    [0.4499879479408264, 1.1050673723220825, -0.5399836897850037, -0.6970928907394409],
    [0.777657687664032, -0.934685468673706, 0.5711202621459961, -0.19071020185947418],
    [0.3589423894882202, -0.1470894068479538, 0.11323945969343185, -0.18938493728637695],
]
VECTOR = [0.9442176818847656, 0.7174781560897827, -5.4756598472595215, -0.5312666893005371]  # the same, 1-D
SLERP = [
    [[[0.6568293571472168, 1.066385269165039], [-0.05094370245933533, -0.5228367447853088]]],
    [[[0.46225374937057495, -0.935269296169281], [0.8388081192970276, 0.06228704750537872]]],
]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_eq_2_on_a_linear_layer(paper, scale):
    """Reference: mkshing's layer, its numbers; the last shift is cut by the ReLU. Ours three times."""
    weight, bias, inputs, shift = wave(3, 4), wave(3, step=0.3), wave(2, 4, step=0.9), torch.tensor([0.3, -0.2, -5.0])
    scaled = paper.method.scale_shifts({"w": shift}, scale)["w"]
    expected = torch.tensor(REFERENCE[scale])
    changed = F.linear(inputs, paper.method.shifted_weight(weight, scaled), bias)
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)
    layer = nn.Sequential(nn.Linear(4, 3))
    layer.load_state_dict({"0.weight": weight, "0.bias": bias})
    residual = SpectralShift(layer[0].weight)
    residual.shift.data.copy_(scaled)
    with attach({"0.weight": residual}, layer.requires_grad_(False)) as attached:
        in_training = layer(inputs)
        attached.merge()
        merged = layer(inputs)
    torch.testing.assert_close(in_training, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def test_eq_2_on_a_convolution(paper):
    """Reference: mkshing's layer, its numbers."""
    weight, inputs = wave(3, 2, 3, 3), wave(1, 2, 4, 4, step=0.9)
    changed = paper.method.shifted_weight(weight, torch.tensor([-0.4, 0.2, -9.0]))
    output = F.conv2d(inputs, changed, wave(3, step=0.3), stride=2, padding=1)
    torch.testing.assert_close(output[0], torch.tensor(CONVOLUTION), rtol=1e-5, atol=1e-5)


def test_eq_2_on_matrix_and_vector(paper):
    """Reference: the first author's file, its numbers: one additive value for each entry of a vector."""
    shift = torch.tensor([0.3, -0.2, -5.0, 0.1])
    matrix = paper.method.shifted_weight(wave(3, 4), shift[:3])
    torch.testing.assert_close(matrix, torch.tensor(MATRIX), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(paper.method.shifted_weight(wave(4), shift), torch.tensor(VECTOR))


def test_prior_preservation_loss_by_hand(paper):
    loss = paper.method.prior_preservation_loss
    assert loss(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 8.0]), 0.5).item() == 2 + 0.5 * 6
    assert loss(torch.tensor([1.0, 3.0]), torch.tensor([]), 0.5).item() == 2


def test_denoising_loss_equals_the_shared_one(paper, backbone):
    noised = noise_batch(backbone, torch.randn(2, 4, 8, 8), torch.arange(2), seed=0)
    conditioning = backbone.encode_prompt(["a sks dog", "a dog"])
    ours = paper.method.denoising_loss(backbone, noised, conditioning)
    assert torch.equal(ours, common_losses.denoising_loss(backbone, noised, conditioning))


def test_combinations_by_hand(paper):
    m, first, second = paper.method, {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([3.0, 4.0])}
    assert m.add_shifts(first, second)["w"].tolist() == [4.0, 2.0]  # Eq. 4
    assert m.interpolate_shifts(first, second, 0.25)["w"].tolist() == [2.5, 2.5]  # Eq. 5: 0.25 of the first
    assert m.scale_shifts(first, -2.0)["w"].tolist() == [-2.0, 4.0]
    assert m.shift_correlation(first, second) == pytest.approx(-5 / (5**0.5 * 5))  # cosine: (3 - 8) / (sqrt 5 * 5)
    two = {"w": first["w"], "v": torch.tensor([1.0])}
    assert m.shift_correlation(two, {**second, "v": torch.tensor([2.0])}) == pytest.approx((1 - 5**-0.5) / 2)
    with pytest.raises(KeyError, match="'v'"):
        m.add_shifts(first, two)


def test_style_mix_takes_the_geometry_from_the_middle(paper):
    """(16, down, 1) to (8, down, 0) of P+ are cross-attention layers 5 and 6 in call order."""
    unet = load_backbone("sd15", weights="meta").unet
    names = [f"unet.{name}" for name, p in unet.named_parameters() if name.endswith(".weight") and p.ndim == 2]
    geometry, appearance = ({name: torch.full((1,), value) for name in names} for value in (1.0, 2.0))
    mixed = paper.method.style_mix(geometry, appearance)
    queries = [name for name in names if name.endswith("attn2.to_q.weight")]
    from_geometry = [name for name in queries if mixed[name] == 1]
    assert len(queries) == 16
    assert [name.split(".transformer")[0] for name in from_geometry] == [
        "unet.down_blocks.2.attentions.1", "unet.mid_block.attentions.0",
    ]  # fmt: skip


def test_slerp(paper):
    """Reference: mkshing/svdiff-pytorch @ a78f69e, utils.slerp_tensor(0.3, ...), its numbers; the ends by hand."""
    first, second = wave(2, 1, 2, 2), wave(2, 1, 2, 2, step=0.4)
    torch.testing.assert_close(paper.method.slerp(0.3, first, second), torch.tensor(SLERP), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(paper.method.slerp(0.0, first, second), first)
    torch.testing.assert_close(paper.method.slerp(1.0, first, second), second)


# Table 1: subset -> KB as printed, values by arithmetic on the shapes, tensors
TABLE_1 = {
    "UNet": ("1404", 322_856, 391), "UNet-CA": ("194", 43_776, 64), "UNet-CA-KV": ("84.8", 18_816, 32),
    "UNet-1D": ("430", 100_160, 109), "UNet-2D": ("617", 140_416, 184), "UNet-4D": ("355", 82_280, 98),
    "Up-Blocks": ("789", None, None), "Down-Blocks": ("469", None, None), "Mid-Block": ("135", None, None),
    "Up-CA": ("106", None, None), "Down-CA": ("70.4", None, None), "Mid-CA": ("17.7", None, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def sd15_shifts(paper):
    """Of all weights, on SD 1.5."""
    config = paper.config.SVDiffConfig(class_nouns=("dog",))
    return paper.method.SVDiff(load_backbone("sd15", weights="meta"), config).shifts()


def test_counts_on_stable_diffusion_15(sd15_shifts):
    """82,280 + 140,416 + 100,160 in the U-Net; with the text encoder 398,197, the paper's 1.7 MB."""
    totals = {"unet": 0, "text_encoder": 0}
    for name, shift in sd15_shifts.items():
        totals[name.split(".")[0]] += shift.numel()
    assert totals == {"unet": 82_280 + 140_416 + 100_160, "text_encoder": 56_141 + 19_200}
    size = 4 * 398_197 / 1e6 + PER_TENSOR * KIB * len(sd15_shifts) / 1e6
    assert round(size, 1) in (1.7, 1.8)
    assert 982_581_444 / 398_197 > 2_200  # the abstract's "2,200 fewer parameters"


@pytest.mark.parametrize("subset", TABLE_1)
def test_twelve_sizes_of_table_1(paper, subset, sd15_shifts):
    printed, values, tensors = TABLE_1[subset]
    dims = {n: p.ndim for n, p in load_backbone("sd15", weights="meta").unet.named_parameters()}
    chosen = paper.config.SUBSETS[subset]
    names = [n for n in dims if f"unet.{n}" in sd15_shifts and chosen(n, dims[n])]
    count = sum(sd15_shifts[f"unet.{n}"].numel() for n in names)
    if values is not None:
        assert (count, len(names)) == (values, tensors)
    size = 4 * count / KIB + PER_TENSOR * len(names)
    assert size == pytest.approx(float(printed), rel=0.015)


def test_config_subset_and_learning_rates(paper, backbone):
    method = make_method(paper, backbone, subset="UNet-CA-KV", train_text_encoder=True)
    unet = [name for name in method.shifts() if name.startswith("unet.")]
    assert len(unet) == 2 * 4 and all("attn2.to_" in name for name in unet)  # down, mid, two up: see conftest
    spectral, norms = method.parameters()
    assert (spectral["lr"], norms["lr"]) == (method.config.learning_rate, method.config.norm_learning_rate)
    assert all("norm" in name for name, _ in norms["params"])
    assert any("token_embedding" in name for name, _ in spectral["params"])


def test_fresh_shifts_and_strength_0_are_the_base_bit_for_bit(paper, backbone, backbone_folder):
    base = load_backbone(backbone_folder).freeze()
    settings = {"num_inference_steps": 2, "guidance_scale": 5.0}
    expected = sample_images(base, "a photo of a sks dog", seeds=[1], **settings)
    method = small(paper, backbone, train_text_encoder=True)
    assert torch.equal(method.generate(seeds=[1]), expected)
    noised = noise_batch(base, torch.randn(2, 4, 8, 8), torch.arange(2), seed=0)
    prompts = ["a photo of a sks dog"] * 2
    ours = paper.method.denoising_loss(backbone, noised, method.encode(prompts))  # with gradients, through the shifts
    assert torch.equal(ours, paper.method.denoising_loss(base, noised, base.encode_prompt(prompts)))
    shifts = randomised(method)
    assert not torch.equal(method.generate(seeds=[1]), expected)
    method.load_shifts(paper.method.scale_shifts(shifts, 0.0))
    assert torch.equal(method.generate(seeds=[1]), expected)


def test_merged_weights_are_eq_2_and_leave_no_trace(paper, backbone):
    method = make_method(paper, backbone)
    before = {name: p.clone() for name, p in backbone.unet.named_parameters()}
    shifts = randomised(method, scale=0.3)
    with method.merged():
        for name, shift in shifts.items():
            name = name.removeprefix("unet.")
            expected = paper.method.shifted_weight(before[name], shift)
            torch.testing.assert_close(backbone.unet.get_parameter(name), expected, rtol=1e-4, atol=1e-4)
        biases = [name for name in before if name.endswith(".bias")]
        assert biases and all(torch.equal(backbone.unet.get_parameter(name), before[name]) for name in biases)
    assert all(torch.equal(p, before[name]) for name, p in backbone.unet.named_parameters())


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_gradients_reach_the_shifts_and_nothing_else(paper, backbone, train_text_encoder):
    method = make_method(paper, backbone, train_text_encoder=train_text_encoder, prior_loss_weight=1.0)
    method.training_loss(make_batch()).backward()
    named = [pair for group in method.parameters() for pair in group["params"]]
    assert {name for name, _ in named} == set(method.shifts())
    assert all(p.grad is not None for _, p in named)
    assert any(name.startswith("text_encoder.") for name, _ in named) == train_text_encoder
    assert all(p.grad is None for module in backbone.modules for p in module.parameters())


def test_training_loss_is_two_separate_passes(paper, backbone):
    """Reference: each term alone, noised by the closed form, with lambda = 0.25."""
    method, batch = make_method(paper, backbone, prior_loss_weight=0.25), make_batch()
    terms, drawn = [], []
    for name in ("instance", "class"):
        seed = paper.method.derive_seed(0, name)
        noised = noise_batch(backbone, batch[name]["latents"], batch["sample_keys"], seed=seed)
        alpha_bar = backbone.noise_scheduler.alphas_cumprod[noised["timesteps"]].view(-1, 1, 1, 1)
        z = alpha_bar.sqrt() * batch[name]["latents"] + (1 - alpha_bar).sqrt() * noised["noise"]
        context = backbone.encode_prompt(batch[name]["prompt"]).prompt_embeds
        terms.append(F.mse_loss(backbone.unet(z, noised["timesteps"], context).sample, noised["noise"]))
        drawn.append(noised["timesteps"])
    torch.testing.assert_close(method.training_loss(batch), terms[0] + 0.25 * terms[1], rtol=1e-5, atol=0)
    assert not torch.equal(*drawn)
    naive = make_method(paper, backbone, prior_loss_weight=0.0)
    torch.testing.assert_close(naive.training_loss(make_batch(with_class=False)), terms[0], rtol=1e-5, atol=0)


def test_attention_loss_is_added_for_collages_only(paper, backbone):
    nouns, resolutions = ("dog", "cat"), (8,)
    plain = make_method(paper, backbone, nouns)
    with_loss = dataclasses.replace(plain.config, unmix_loss_weight=2.0, unmix_resolutions=resolutions)
    alone = plain.training_loss(make_batch(collage=True))
    plain.config = with_loss
    batch = make_batch(collage=True)
    more = plain.training_loss(batch)
    assert more > alone
    more.backward()
    assert all(p.grad is not None for group in plain.parameters() for _, p in group["params"])
    batch["sides"] = torch.full((2, 2), -1)
    torch.testing.assert_close(plain.training_loss(batch), alone, rtol=1e-6, atol=0)


def test_losses_of_five_steps_are_the_stored_ones(paper, backbone):
    method = make_method(paper, backbone, prior_loss_weight=1.0, learning_rate=1e-2, norm_learning_rate=1e-3)
    optimizer = torch.optim.AdamW(method.parameters())
    losses, before = [], {name: p.clone() for name, p in backbone.unet.named_parameters()}
    for step in range(5):
        loss = method.training_loss(make_batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(STORED_LOSSES, rel=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in backbone.unet.named_parameters())
    assert all(shift.any() for shift in method.shifts().values())


def test_artifact_gives_the_same_picture_and_a_merged_pipeline_too(paper, backbone, backbone_folder, tmp_path):
    method = small(paper, backbone, train_text_encoder=True)
    shifts = randomised(method)
    prompt = "a photo of a sks dog in the snow"
    ours = method.generate(prompt, seeds=[7])
    method.save(tmp_path)
    tensors, header = load_safetensors(tmp_path / "spectral_shifts.safetensors")
    assert header["slug"] == paper.slug and header["class_noun"] == "dog" and header["identifier"] == "sks"
    assert json.loads((tmp_path / "artifact.json").read_text())["slug"] == paper.slug
    assert all(torch.equal(tensors[name], shift) for name, shift in shifts.items()) and len(tensors) == len(shifts)
    size, numbers = (tmp_path / "spectral_shifts.safetensors").stat().st_size, sum(s.numel() for s in shifts.values())
    assert size < 4 * numbers + 150 * len(shifts) + 2000
    loaded = paper.method.load_method(tmp_path)
    assert loaded.config == method.config
    assert torch.equal(loaded.generate(prompt, seeds=[7]), ours)
    other = paper.method.load_method(tmp_path / "spectral_shifts.safetensors", backbone_folder)
    assert torch.equal(other.generate(prompt, seeds=[7]), ours)

    with method.merged():  # what stock diffusers makes of the merged weights
        method.backbone.to_pipeline().save_pretrained(tmp_path / "pipeline")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": method.config.guidance_scale, "output_type": "pt"}
    theirs = pipe(prompt, generator=torch.Generator().manual_seed(7), **settings).images * 2 - 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused(paper, backbone, tmp_path):
    method = make_method(paper, backbone)
    name, shift = next(iter(method.shifts().items()))
    with pytest.raises(ValueError, match="do not fit"):
        method.load_shifts({name: shift})
    with pytest.raises(ValueError, match="do not fit"):
        method.load_shifts(method.shifts() | {name: shift[:-1]})
    atomic_save_safetensors({name: shift}, tmp_path / "spectral_shifts.safetensors")
    with pytest.raises(ValueError, match="no config"):
        paper.method.load_method(tmp_path)


def test_editing(paper, backbone):
    """Without training, an edit is plain inversion and sampling; eta and noise_share inject noise by the seed."""
    config = dict(description="a red dog", num_inference_steps=2)
    method = paper.method.SVDiff(backbone, paper.config.SVDiffConfig.tiny(**config))
    assert method.config.instance_prompts() == ("a red dog",) and method.config.prior_loss_weight == 0
    photo = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    same = method.edit(photo, "a blue dog", seeds=[0, 1])
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-4)
    for noise in ({"eta": 1.0}, {"noise_share": 0.5}):
        edited = method.edit(photo, "a blue dog", seeds=[0, 1], **noise)
        assert (edited[0] - edited[1]).abs().max() > 1e-3
    randomised(method)
    assert not torch.equal(method.edit(photo, "a blue dog", seeds=[0, 1]), same)


def test_presets_have_the_papers_values_and_bad_values_raise(paper):
    make = paper.config.SVDiffConfig
    config = make(class_nouns=("dog", "sculpture"))
    assert (config.train_steps, config.batch_size, config.cut_mix_probability) == (1000, 1, 0.6)
    assert (config.learning_rate, config.norm_learning_rate, config.num_class_images) == (1e-3, 1e-6, 200)
    assert config.instance_prompts() == ("photo of a sks dog", "photo of a ktn sculpture")
    assert config.class_prompts() == ("photo of a dog", "photo of a sculpture")
    assert make.tiny("dog").instance_prompts() == ("a photo of a sks dog",)
    for changes, message in [
        ({"train_steps": 0}, "train_steps must be >= 1, got 0"),
        ({"prior_loss_weight": -1.0}, "prior_loss_weight must be >= 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"cut_mix_probability": 1.5}, r"in \[0, 1\], got 1.5"),
        ({"subset": "VAE"}, "subset must be one of"),
        ({"prompt_template": "a photo"}, "must hold {} once"),
        ({"description": "a dog"}, "not both"),
        ({"identifiers": ("sks",)}, "2 class_nouns need as many different identifiers"),
        ({"identifiers": ("sks", "sks")}, "2 class_nouns need as many different identifiers"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**{"class_nouns": ("dog", "cat")} | changes)
    with pytest.raises(ValueError, match="set prior_loss_weight=0"):
        make(description="a red dog")

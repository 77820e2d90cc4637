import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import nn

from common.backbones.adapters import (
    DenseDelta,
    LowRank,
    SpectralShift,
    add_lora,
    attach,
    export_lora,
    lora_layers,
    merge_lora,
    set_lora_strength,
    unmerge_lora,
)

TIMESTEPS = torch.tensor([5, 900])


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
    ).eval()


@pytest.fixture(scope="module")
def unet():
    return tiny_unet().requires_grad_(False)


def run(unet):
    with torch.no_grad():
        return unet(draw(2, 4, 16, 16), TIMESTEPS, draw(2, 5, 12, seed=2)).sample


def residuals_of_every_kind(unet):
    """A linear layer, a convolution and a norm scale, with trained (random) values."""
    weights = dict(unet.named_parameters())
    names = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "mid_block.resnets.0.conv1.weight",
        "up_blocks.3.resnets.0.norm1.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.norm1.weight",
    ]
    chosen = {name: DenseDelta(0.3 * draw(*weights[name].shape, seed=number)) for number, name in enumerate(names)}
    shifted = "up_blocks.1.resnets.0.conv2.weight"
    chosen[shifted] = SpectralShift(weights[shifted])
    nn.init.normal_(chosen[shifted].shift, std=0.3, generator=torch.Generator().manual_seed(9))
    return chosen


def test_attached_residuals_equal_a_network_with_changed_weights_and_leave_no_trace(unet):
    """Reference: the same network whose weights were overwritten by W + 0.5 delta."""
    residuals = residuals_of_every_kind(unet)
    expected, state = run(unet), {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    changed = copy.deepcopy(unet)
    with torch.no_grad():
        for name, residual in residuals.items():
            weight = changed.get_parameter(name)
            weight += 0.5 * residual.delta(weight)
    with attach(residuals, unet) as attached:
        attached.set_strength(0.5)
        torch.testing.assert_close(run(unet), run(changed))
        assert (run(unet) - expected).abs().max() > 1e-3
        assert list(unet.state_dict()) == list(state)
        attached.set_strength(0)
        assert torch.equal(run(unet), expected)
    assert torch.equal(run(unet), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())
    assert all("forward" not in vars(module) for module in unet.modules())


def test_merge_gives_the_attached_output_and_unmerge_restores_every_bit(unet):
    residuals = residuals_of_every_kind(unet)
    expected, state = run(unet), {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    attached = attach(residuals, unet)
    attached.set_strength(0.7)
    active = run(unet)
    attached.merge()
    assert torch.equal(run(unet), active)
    assert not torch.equal(unet.state_dict()[next(iter(residuals))], state[next(iter(residuals))])
    with pytest.raises(RuntimeError, match="unmerge"):
        attached.set_strength(0.1)
    with pytest.raises(RuntimeError, match="merged already"):
        attached.merge()
    attached.unmerge()
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())
    assert torch.equal(run(unet), active)
    attached.merge()
    attached.detach()
    assert torch.equal(run(unet), expected)


def test_strength_per_sample_treats_each_row_with_its_own(unet):
    residuals = residuals_of_every_kind(unet)
    base = run(unet)
    with attach(residuals, unet) as attached:
        attached.set_strength(0.8)
        full = run(unet)
        attached.set_strength(torch.tensor([0.0, 0.8]))
        mixed = run(unet)
        torch.testing.assert_close(mixed[0], base[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(mixed[1], full[1], rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="strength per sample"):
            attached.merge()
        attached.set_strength(torch.ones(3))
        with pytest.raises(ValueError, match="strength has 3 values, but a layer got 2 rows"):
            run(unet)


def test_residuals_on_one_weight_add_up_in_any_order_of_removal():
    layer = nn.Sequential(nn.Linear(6, 4))
    inputs, first, second = draw(3, 6), DenseDelta(draw(4, 6, seed=2)), DenseDelta(draw(4, 6, seed=3))
    base = layer(inputs)
    one, two = attach({"0.weight": first}, layer), attach({"0.weight": second}, layer)
    expected = F.linear(inputs, layer[0].weight + first.change + second.change, layer[0].bias)
    torch.testing.assert_close(layer(inputs), expected)
    with pytest.raises(RuntimeError, match="residuals attached elsewhere"):
        one.merge()
    one.detach()
    torch.testing.assert_close(layer(inputs), F.linear(inputs, layer[0].weight + second.change, layer[0].bias))
    two.detach()
    assert torch.equal(layer(inputs), base)


def test_only_residuals_get_gradients(unet):
    residuals = residuals_of_every_kind(unet)
    with attach(residuals, unet):
        unet(draw(2, 4, 16, 16), TIMESTEPS, draw(2, 5, 12, seed=2)).sample.square().mean().backward()
    for residual in residuals.values():
        assert all(parameter.grad.abs().sum() > 0 for parameter in residual.parameters())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_dense_delta_learns_exactly_what_full_training_of_the_weight_learns():
    """Reference: the gradient of the weight itself."""
    plain, frozen = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(6, 4))
    frozen.load_state_dict(plain.state_dict())
    residual = DenseDelta(torch.zeros(4, 6))
    plain(draw(3, 6)).square().sum().backward()
    with attach({"0.weight": residual}, frozen.requires_grad_(False)):
        frozen(draw(3, 6)).square().sum().backward()
    torch.testing.assert_close(residual.change.grad, plain[0].weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(5, 8), (6, 2, 3, 3)])
def test_spectral_shift_moves_the_singular_values(shape):
    """Reference: singular values of the changed weight, from torch.linalg.svdvals; relu cuts the last one at 0."""
    weight = draw(*shape)
    residual = SpectralShift(weight)
    assert torch.equal(weight + residual.delta(weight), weight)
    assert list(residual.state_dict()) == ["shift"] and residual.shift.shape == (shape[0],)
    spectrum = torch.linalg.svdvals(weight.flatten(1))
    with torch.no_grad():
        residual.shift.fill_(0.25)
        residual.shift[-1] = -100.0
    wanted = spectrum + 0.25
    wanted[-1] = 0.0
    result = torch.linalg.svdvals((weight + residual.delta(weight)).flatten(1))
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs a matrix"):
        SpectralShift(torch.ones(3))


def test_spectral_shift_counts_of_svdiff_on_sd15():
    """Reference: SVDiff, Table 1, as numbers of values: 82,280 in convolutions, 140,416 in linear layers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    counts = {2: 0, 4: 0}
    for name, parameter in unet.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            counts[parameter.ndim] += SpectralShift(parameter).shift.numel()
    assert counts == {2: 140_416, 4: 82_280}


@pytest.mark.parametrize("strength", [0.5, torch.tensor([0.0, 0.7])])
@pytest.mark.parametrize(
    "layer, inputs",
    [
        (nn.Linear(9, 12), draw(2, 3, 9)),  # 6 positions for 9 shifts
        (nn.Conv2d(3, 40, 3, stride=2, padding=1), draw(2, 3, 3, 4)),  # 24 for 27
        (nn.Embedding(11, 5), torch.tensor([[1, 2, 10, 2], [0, 4, 4, 9]])),
    ],
)
def test_spectral_shift_in_training_equals_the_rebuilt_weight(layer, inputs, strength):
    """Reference: DenseDelta of the same change, which always goes through the weight; values and gradients."""
    layer.requires_grad_(False)
    spectral = SpectralShift(layer.weight)
    nn.init.normal_(spectral.shift, std=0.3, generator=torch.Generator().manual_seed(9))
    dense, network, results = DenseDelta(spectral.delta(layer.weight)), nn.Sequential(layer), []
    assert spectral.output_change(layer, inputs) is not None
    for residual in (spectral, dense):
        with attach({"0.weight": residual}, network) as attached:
            attached.set_strength(strength)
            output = network(inputs)
            output.square().sum().backward()
            results.append(output.detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    of_change = torch.autograd.grad(spectral.delta(layer.weight), spectral.shift, dense.change.grad)[0]
    torch.testing.assert_close(spectral.shift.grad, of_change, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert spectral.output_change(layer, inputs) is None
        spectral.shift.zero_()
    with attach({"0.weight": spectral}, network):
        assert torch.equal(network(inputs), layer(inputs))


def test_compress_keeps_the_fewest_directions_that_reach_the_fraction():
    """Reference: singular values 4, 3, 2, 1 by construction; 0.6 of their sum 10 needs 4 + 3."""
    left, right = torch.linalg.qr(draw(6, 4)).Q, torch.linalg.qr(draw(8, 4, seed=2)).Q
    change = left @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])) @ right.T
    compressed = DenseDelta(change).compress(0.6)
    assert isinstance(compressed, LowRank) and compressed.down.shape == (2, 8) and compressed.up.shape == (6, 2)
    expected = left[:, :2] @ torch.diag(torch.tensor([4.0, 3.0])) @ right[:, :2].T
    torch.testing.assert_close(compressed.delta(change), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(DenseDelta(change).compress(1.0).delta(change), change, rtol=1e-4, atol=1e-5)
    convolution = draw(4, 2, 3, 3)
    restored = DenseDelta(convolution).compress(1.0).delta(convolution)
    torch.testing.assert_close(restored, convolution, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(0, 1\], got 0"):
        DenseDelta(change).compress(0)
    with pytest.raises(ValueError, match="ranks differ"):
        LowRank(torch.ones(2, 8), torch.ones(6, 3))


def test_attach_refuses_what_it_cannot_do_and_changes_nothing(unet):
    good = "mid_block.resnets.0.conv1.weight"
    residual = DenseDelta(torch.zeros(unet.get_parameter(good).shape))
    for bad, error in (
        ({"nowhere.weight": residual}, KeyError),
        ({"mid_block.resnets.0.conv1.bias": residual}, KeyError),
        ({"mid_block.resnets.0.norm1.weight": residual}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(bad))):
            attach({good: residual, **bad}, unet)
    with pytest.raises(TypeError, match="PReLU"):
        attach({"0.weight": DenseDelta(torch.zeros(3))}, nn.Sequential(nn.PReLU(3)))
    assert all("forward" not in vars(module) for module in unet.modules())


def test_fresh_lora_and_strength_0_give_the_base_output_and_leave_the_random_state():
    unet = tiny_unet().requires_grad_(False)
    expected, random_state = run(unet), torch.get_rng_state()
    parameters = add_lora(unet, rank=2, alpha=6.0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(run(unet), expected)
    assert all(parameter.requires_grad for parameter in parameters)
    assert {id(p) for p in parameters} == {id(p) for p in unet.parameters() if p.requires_grad}
    for number, parameter in enumerate(parameters):
        parameter.data.copy_(draw(*parameter.shape, seed=number))
    assert (run(unet) - expected).abs().max() > 1e-3
    full = run(unet)
    set_lora_strength(unet, 0.0)
    assert torch.equal(run(unet), expected)
    set_lora_strength(unet, 1.0)
    assert torch.equal(run(unet), full)


def test_lora_size_on_sd15_is_199296_for_each_rank():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
        assert sum(parameter.numel() for parameter in add_lora(unet, rank=4)) == 4 * 199_296


def test_exported_lora_loads_into_a_diffusers_pipeline_with_its_alpha(tmp_path):
    unet = tiny_unet()
    for number, parameter in enumerate(add_lora(unet, rank=2, alpha=6.0)):
        parameter.data.copy_(0.3 * draw(*parameter.shape, seed=number))
    path = export_lora(unet, tmp_path / "deep" / "lora.safetensors")
    assert [file.name for file in path.parent.iterdir()] == ["lora.safetensors"]
    with safe_open(path, framework="pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys())
        assert all(key.startswith("unet.") for key in file.keys())
    other = tiny_unet()
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(**parts, unet=other, requires_safety_checker=False)
    pipe.load_lora_weights(path)
    assert stored == sum(p.numel() for name, p in other.named_parameters() if "lora" in name)
    torch.testing.assert_close(run(other), run(unet), rtol=0, atol=0)
    with pytest.raises(ValueError, match="ends in .safetensors"):
        export_lora(unet, tmp_path / "lora.bin")


def test_merged_lora_is_the_changed_weight_and_unmerging_restores_every_bit():
    """Reference: W + strength * alpha / rank * B A, written out here."""
    unet = tiny_unet().requires_grad_(False)
    for number, parameter in enumerate(add_lora(unet, rank=2, alpha=6.0)):
        parameter.data.copy_(0.3 * draw(*parameter.shape, seed=number))
    set_lora_strength(unet, 0.5)
    active, layers = run(unet), lora_layers(unet)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    assert len(layers) == 128 and unet.get_submodule(name) is layers[name]
    weight = layers[name].get_base_layer().weight
    before = weight.clone()
    originals = merge_lora(unet)
    change = layers[name].lora_B["default"].weight @ layers[name].lora_A["default"].weight
    torch.testing.assert_close(weight, before + 0.5 * 3.0 * change)
    torch.testing.assert_close(run(unet), active, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="merged already"):
        merge_lora(unet)
    unmerge_lora(unet, originals)
    assert torch.equal(weight, before) and torch.equal(run(unet), active)


@pytest.mark.parametrize("init, largest", [("kaiming", 64**-0.5), ("gaussian", None)])
def test_lora_starts_as_it_says(init, largest):
    """Kaiming-uniform with a = sqrt 5 is uniform in +-1 / sqrt(inputs); diffusers' Gaussian has deviation 1 / rank."""
    network = UNet2DConditionModel(
        block_out_channels=(64,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=64, attention_head_dim=8,
    )  # fmt: skip
    add_lora(network, rank=8, init=init)
    downs = torch.cat([layer.lora_A["default"].weight.flatten() for layer in lora_layers(network).values()])
    assert not any(layer.lora_B["default"].weight.any() for layer in lora_layers(network).values())
    if init == "kaiming":
        assert 0.99 * largest < downs.abs().max() <= largest
    else:
        assert downs.std().item() == pytest.approx(1 / 8, rel=0.05)

"""Sums, averages and SVD of pairs, against PEFT's `add_weighted_adapter` and numpy."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def peft_model(ranks, alphas):
    """Two layers, a linear one and a convolution, with one PEFT adapter for each rank."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 7), nn.Conv2d(6, 7, 3)).double()
    for i, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0", "1"], init_lora_weights=False)
        if i == 0:
            model = get_peft_model(network, config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = draw(*parameter.shape, seed=sum(map(ord, name)))
    return model


def adapter(paper, model, name):
    layers = {key: model.base_model.model[int(key)] for key in "01"}
    return {
        key: paper.formats.Factors(
            layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), float(layer.lora_alpha[name])
        )
        for key, layer in layers.items()
    }


def delta(model, key, name):
    return model.base_model.model[int(key)].get_delta_weight(name).detach()


def test_sum_of_deltas_is_peft_cat_and_the_sum_itself(paper):
    """Ranks 2 and 3 with scales 2.5 and 1/3."""
    model = peft_model((2, 3), (5.0, 1.0))
    model.base_model.add_weighted_adapter(["0", "1"], [0.5, 2.0], "both", combination_type="cat")
    pairs = paper.merging.sum_of_deltas([adapter(paper, model, "0"), adapter(paper, model, "1")], [0.5, 2.0])
    for key, pair in pairs.items():
        ours = paper.method.weight_delta(pair)
        assert len(pair.down) == pair.alpha == 5
        torch.testing.assert_close(ours, delta(model, key, "both"))
        torch.testing.assert_close(ours, 0.5 * delta(model, key, "0") + 2.0 * delta(model, key, "1"))


def test_a_layer_that_only_one_adapter_has_gets_its_delta_alone(paper):
    model = peft_model((2, 3), (2.0, 3.0))
    first, second = adapter(paper, model, "0"), adapter(paper, model, "1")
    del second["1"]
    pairs = paper.merging.sum_of_deltas([first, second], [1.0, 1.0])
    torch.testing.assert_close(paper.method.weight_delta(pairs["1"]), delta(model, "1", "0"))
    assert {len(pair.down) for pair in pairs.values()} == {5}


def test_average_of_factors_has_cross_terms_as_peft_linear(paper):
    """PEFT takes sqrt(weight * scale) on each side: weights 0.25 are our 0.5, weights 1 our 1."""
    model = peft_model((2, 2), (2.0, 2.0))
    adapters = [adapter(paper, model, "0"), adapter(paper, model, "1")]
    for peft_weight, ours in ((0.25, 0.5), (1.0, 1.0)):
        name = f"linear {ours:g}".replace(".", "_")
        model.base_model.add_weighted_adapter(["0", "1"], [peft_weight] * 2, name, combination_type="linear")
        pairs = paper.merging.average_of_factors(adapters, [ours, ours])
        summed = paper.merging.sum_of_deltas(adapters, [ours**2, ours**2])
        for key, pair in pairs.items():
            torch.testing.assert_close(paper.method.weight_delta(pair), delta(model, key, name))
            cross = [
                paper.method.weight_delta(a[key]._replace(down=b[key].down)) for a, b in (adapters, adapters[::-1])
            ]
            expected = paper.method.weight_delta(summed[key]) + ours**2 * (cross[0] + cross[1])
            torch.testing.assert_close(paper.method.weight_delta(pair), expected)


def test_svd_of_deltas_is_peft_svd(paper):
    model = peft_model((2, 3), (2.0, 3.0))
    model.base_model.add_weighted_adapter(
        ["0", "1"], [1.0, 0.5], "svd", combination_type="svd", svd_rank=2, svd_clamp=None
    )
    pairs = paper.merging.svd_of_deltas([adapter(paper, model, "0"), adapter(paper, model, "1")], [1.0, 0.5], 2)
    for key, pair in pairs.items():
        ours = paper.method.weight_delta(pair).double()
        torch.testing.assert_close(ours, delta(model, key, "svd"), rtol=1e-4, atol=1e-5)
        matrix = (delta(model, key, "0") + 0.5 * delta(model, key, "1")).flatten(1).numpy()
        left, spectrum, right = np.linalg.svd(matrix, full_matrices=False)
        best = torch.from_numpy(left[:, :2] * spectrum[:2] @ right[:2]).reshape(ours.shape)
        torch.testing.assert_close(ours, best, rtol=1e-4, atol=1e-5)


def test_distillation_clamps_at_the_quantile(paper):
    """Reference: numpy's SVD and quantile, up to the signs of the singular vectors."""
    base, change = draw(6, 8, seed=1), draw(6, 8, seed=2)
    (pair,) = paper.merging.distil({"layer": base + change}, {"layer": base}, 3, clamp_quantile=0.9).values()
    left, spectrum, right = np.linalg.svd(change.numpy(), full_matrices=False)
    up, down = left[:, :3] * spectrum[:3], right[:3]
    signs = np.sign(down[:, 0]) * np.sign(pair.down[:, 0].numpy())
    up, down = up * signs, down * signs[:, None]
    limit = np.quantile(np.concatenate([up.ravel(), down.ravel()]), 0.9)
    np.testing.assert_allclose(pair.up.numpy(), up.clip(-limit, limit), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pair.down.numpy(), down.clip(-limit, limit), rtol=1e-4, atol=1e-5)
    (exact,) = paper.merging.distil({"layer": base + change}, {"layer": base}, 6, clamp_quantile=1.0).values()
    assert exact.alpha == 6
    whole = paper.merging.svd_factors(change, 6)
    torch.testing.assert_close(paper.method.weight_delta(whole).double(), change, rtol=1e-4, atol=1e-5)


def test_bad_input_is_refused(paper):
    model = peft_model((2, 3), (2.0, 3.0))
    first, second = adapter(paper, model, "0"), adapter(paper, model, "1")
    with pytest.raises(ValueError, match="use sum_of_deltas"):
        paper.merging.average_of_factors([first, second], [0.5, 0.5])
    with pytest.raises(ValueError, match="use sum_of_deltas"):
        paper.merging.average_of_factors([first, {"0": first["0"]}], [0.5, 0.5])
    with pytest.raises(ValueError, match="got 2 and 1"):
        paper.merging.sum_of_deltas([first, second], [1.0])
    with pytest.raises(ValueError, match="rank must be in 1..7"):
        paper.merging.svd_factors(draw(7, 9, seed=1), 8)

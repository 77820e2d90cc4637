"""Stages, their prompts, the network f and the spectrum: pure functions against values made elsewhere."""

import numpy as np
import pytest
import torch

from common.training.seeding import keys_of_step

# Official code, zyxElsa/ProSpect at 31314f1: ldm/modules/embedding_manager.py, TransformerBlock(dim=8, n_heads=8,
# d_head=64, dropout=0.1, dim_out=24) in eval mode; parameter number i of the sorted names, entry k: 0.3 sin(0.7 k + i);
# x = context = cos(0 .. 7).
OFFICIAL_WORDS = [
    [-0.194944, 0.065334, 0.209537, 0.297506, 0.253248, 0.033448, -0.10621, -0.315422],
    [-0.252847, -0.178378, 0.052952, 0.232496, 0.279059, 0.264631, 0.020448, -0.110374],
    [-0.309674, -0.265376, -0.155639, 0.0383, 0.253406, 0.266427, 0.267105, 0.017761],
]
# The same file, EmbeddingManager.forward of "a photo of * on the beach" with these prospect_words: the words of each
# stage's row, read back from a table whose row is its number.
OFFICIAL_FILLS = ["*", "red *", "a dog", "dog", 8, "* dog *", "red", "*", "*", "teddy *"]
OFFICIAL_ROWS = [
    "p0", "red p1", "a dog", "dog", "p8", "p5 dog p5", "red", "p7", "p8", "teddy p9",
]  # fmt: skip


def formula_weights(module):
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(module.named_parameters())):
            k = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((0.3 * torch.sin(0.7 * k + i)).view(parameter.shape))
    return module


# Stages


def test_stage_of_a_timestep_is_that_of_the_official_expression(paper):
    """int(t * stages / 1000) in floating point, as the code has it; first timesteps by counting."""
    timesteps = torch.arange(1000)
    for num_stages in (1, 3, 7, 10, 1000):
        found = paper.stages.stage_of(timesteps, num_stages).tolist()
        expected = [int(torch.tensor([t]) * num_stages / 1000) for t in range(1000)]
        assert found == expected
        assert paper.stages.first_timesteps(num_stages) == [expected.index(stage) for stage in range(num_stages)]
    assert paper.stages.first_timesteps(10) == list(range(0, 1000, 100))


def test_names_say_that_stage_0_is_the_end(paper):
    names = paper.stages.stage_names(10)
    assert names[0] == "0: t 0-99, end" and names[9] == "9: t 900-999, start" and names[4] == "4: t 400-499"
    assert paper.stages.stage_names(1) == ["0: t 0-999"] and paper.stages.stage_names(3)[1] == "1: t 334-666"


def test_fills_of_the_readme_examples(paper):
    """The three lists of the official README, index 0 = "generation ends"."""
    fills, stages = paper.stages.stage_fills, paper.stages.ATTRIBUTE_STAGES
    content = ["a teddy * walking"] * 8 + ["a teddy walking"] * 2
    assert fills({"a teddy * walking": stages["content"]}, "a teddy walking") == content
    assert fills({"a corgi *": stages["layout"]}, "a corgi") == ["a corgi"] * 9 + ["a corgi *"]
    assert fills({"a * dog": stages["material"]}, "a dog") == ["a * dog"] * 5 + ["a dog"] * 5


@pytest.mark.parametrize(
    ("stages", "message"), [({"*": (10,)}, "0..9.*got 10"), ({"*": (1,), "b": (1,)}, "stage 1 is given twice")]
)
def test_bad_stages_are_named(paper, stages, message):
    with pytest.raises(ValueError, match=message):
        paper.stages.stage_fills(stages, "a dog")


def test_prompts_of_the_stages_are_those_of_the_official_manager(paper):
    told = paper.stages.stage_prompts("a photo of * on the beach", "*", OFFICIAL_FILLS)
    rows = [text.replace("*", f"p{source}") for text, source in told]
    assert rows == [f"a photo of {row} on the beach" for row in OFFICIAL_ROWS]


def test_bad_fills_are_named(paper):
    with pytest.raises(ValueError, match="item 1 of fills .* 0..1, got 2"):
        paper.stages.stage_prompts("*", "*", ["*", 2])
    with pytest.raises(ValueError, match="no <cat>"):
        paper.stages.stage_prompts("a cat", "<cat>", ["a", "b"])


# The network f


def test_network_is_the_official_block(paper):
    network = formula_weights(paper.network.StageNetwork(8, 3, seed=0))
    words = network(torch.cos(torch.arange(8.0))[None])
    torch.testing.assert_close(words, torch.tensor([OFFICIAL_WORDS]), rtol=1e-4, atol=2e-6)


def test_network_is_linear_maps_and_a_geglu_layer(paper):
    """With one token every softmax is 1; written with numpy, exact GELU."""
    from scipy.special import erf

    width, network = 8, paper.network.StageNetwork(8, 2, seed=3)
    p = {name: value.double().numpy() for name, value in network.state_dict().items()}
    word = np.cos(np.arange(8.0))

    def norm(x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5)

    def attend(name, values):
        return p[f"{name}.to_out.0.weight"] @ (p[f"{name}.to_v.weight"] @ values) + p[f"{name}.to_out.0.bias"]

    x = attend("attn1", norm(word)) + word
    x = attend("attn2", word) + x
    hidden = p["ff.net.0.proj.weight"] @ norm(x) + p["ff.net.0.proj.bias"]
    values, gate = hidden[: 4 * width], hidden[4 * width :]
    words = p["ff.net.2.weight"] @ (values * gate * 0.5 * (1 + erf(gate / np.sqrt(2)))) + p["ff.net.2.bias"]
    found = network(torch.tensor(word[None], dtype=torch.float32)).detach().numpy()
    np.testing.assert_allclose(found[0], words.reshape(2, 8), rtol=1e-4, atol=1e-6)


def test_dropout_is_inverted_and_belongs_to_the_sample(paper):
    keep = paper.network.draw_dropout(keys_of_step(0, 200), 8, seed=0)
    assert keep.shape == (200, 48) and keep.float().mean().item() == pytest.approx(0.9, abs=0.01)
    again = paper.network.draw_dropout(torch.tensor([17, 3]), 8, seed=0)
    assert torch.equal(again, keep[[17, 3]])
    x = torch.full((1, 1, 2), 9.0)
    dropped = paper.network.dropout(x, torch.tensor([[True, False]]))
    torch.testing.assert_close(dropped, torch.tensor([[[10.0, 0.0]]]))
    network, word = paper.network.StageNetwork(8, 2, seed=0), torch.randn(1, 8)
    assert torch.equal(paper.network.dropout(x, None), x)
    all_kept = network(word, torch.ones(1, 48, dtype=torch.bool))
    assert not torch.allclose(all_kept, network(word))  # in training the rest is scaled up
    assert not torch.allclose(network(word, keep[:1]), network(word, keep[1:2]))


def test_initial_weights_depend_on_the_seed_alone(paper):
    first, other = (paper.network.StageNetwork(8, 2, seed=seed).state_dict() for seed in (0, 1))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = paper.network.StageNetwork(8, 2, seed=0).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["ff.net.2.weight"], other["ff.net.2.weight"])


# The spectrum


def waves(*frequencies, amplitude=0.5, size=16):
    x = torch.arange(size) / size
    rows = [amplitude * torch.cos(2 * torch.pi * f * x).expand(size, size) for f in frequencies]
    return torch.stack([row.expand(3, size, size) for row in rows])


def test_power_of_waves_stands_at_their_frequency(paper):
    """A cosine of amplitude a has power a^2 / 2 (Parseval: the mean square); a diagonal one lies at its length."""
    power = paper.spectrum.radial_power(waves(0, 2, 7))
    expected = torch.zeros(3, 9, dtype=torch.float64)
    expected[0, 0], expected[1, 2], expected[2, 7] = 0.25, 0.125, 0.125
    torch.testing.assert_close(power, expected, atol=1e-6, rtol=1e-5)
    assert paper.spectrum.high_frequency_power(power).tolist() == pytest.approx([0, 0, 0.125], abs=1e-6)
    assert paper.spectrum.mean_frequency(power[1:]).tolist() == pytest.approx([2, 7], abs=1e-4)
    i = torch.arange(16) / 16
    diagonal = torch.cos(2 * torch.pi * (3 * i[:, None] + 4 * i)).expand(1, 3, 16, 16)
    assert paper.spectrum.radial_power(diagonal)[0, 5].item() == pytest.approx(0.5)


def test_what_stages_add(paper):
    """Six steps of three stages; each stage adds one wave. Differences are taken between firsts of stages, and last."""
    zero, low, middle, high = (picture[None] for picture in (*waves(2, 4, 7) * 0, *waves(2, 4, 7))[2:])
    steps = [zero, zero + low, zero + low, low + middle, low + middle, low + middle + high]
    timesteps = [950, 700, 650, 350, 300, 100]
    found = paper.spectrum.frequency_of_stages(timesteps, torch.stack(steps), [0, 334, 667])
    assert list(found) == [2, 1, 0]
    assert found == pytest.approx({2: 2.0, 1: 4.0, 0: 7.0}, abs=1e-4)
    detail = paper.spectrum.growth_of_detail(torch.stack(steps))
    assert detail[:5] == pytest.approx([0] * 5, abs=1e-6) and detail[5] == pytest.approx(0.125, abs=1e-6)


def test_predicted_clean_undoes_the_noise(paper):
    clean, noise, alpha_bar = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor(0.3)
    noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(paper.spectrum.predicted_clean(noisy, noise, alpha_bar), clean)

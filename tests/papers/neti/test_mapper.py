"""The neural mapper against numbers of the official code, and its size on Stable Diffusion.

The numbers are from NeuralTextualInversion/NeTI at 28edf30, run on a CPU with torch 2.13.0 after torch.manual_seed(0):
models/positional_encoding.py, `NeTIPositionalEncoding.encode` and `init_layer`, and models/neti_mapper.py,
`NeTIMapper.forward` in eval mode with two outputs of three numbers, norm_scale 0.7, the weights of `official_mapper`.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from common.backbones import load_backbone

TIMES, LAYERS = torch.tensor([0, 517, 999]), torch.tensor([0, 7, 15])
ENCODED_AT = [0, 1, 500, 1023, 1024, 1500, 2047]
ENCODED = [
    [0.0, 0.0, 0.0, 0.0, 0.03125, 0.03125, 0.03125],
    [-0.025648057, 0.015959393, 0.027183324, 0.029560203, -0.017853292, -0.031178797, -0.010136925],
    [0.022478536, -0.031075098, 0.0075078383, 0.031003784, 0.021708939, 0.019843400, 0.0039151097],
]
ANCHOR_ROWS, ANCHORS_AT = [0, 1, 16, 159], [0, 3, 1023, 1024, 2047]
ANCHORS = [
    [0.0, 0.0, 0.0, 0.03125, 0.03125],
    [-0.023204744, 0.027690396, 0.025737384, -0.020930894, -0.017724266],
    [0.0073045120, -0.025383528, 0.029910412, -0.030384317, 0.0090515139],
    [-0.026379440, -0.0082663344, 0.0036845915, -0.016753741, 0.031032022],
]
OUTPUTS = {
    None: [
        [0.50448269, -0.20477429, -0.30003893, -0.094096988, 0.29864037, 0.074169025],
        [0.51092315, -0.34173706, -0.23633771, -0.12824559, -0.18793176, 0.067472376],
        [0.53270924, -0.32860214, 0.011788581, -0.18342665, -0.25375029, -0.0082466360],
    ],
    64: [
        [0.13822299, 0.084527224, -0.59742206, -0.31628284, -0.012911690, 0.081455134],
        [0.13454738, -0.097901836, -0.47754279, -0.18642299, -0.41872695, 0.15549685],
        [0.27095529, -0.0081107039, -0.29466879, -0.22298621, -0.50831932, 0.14688902],
    ],
    5: [
        [-0.14944682, 0.40513343, 0.10925922, -0.45941517, -0.23175916, -0.16376902],
        [-0.13566521, 0.43659627, 0.073939554, -0.44331396, -0.24749513, -0.13315573],
        [-0.18056041, 0.33341628, 0.15638921, -0.47739443, -0.19149569, -0.23916075],
    ],
    0: [[-0.075272694, -0.48510876, -0.019228106, 0.15896571, 0.27664986, -0.38318208]] * 3,
}
BEFORE_SCALING = [
    [1.1933107, -0.48437616, -0.70971650, -0.22257841, 0.70640832, 0.17544051],
    [1.3554022, -0.90657698, -0.62696838, -0.34021625, -0.49855471, 0.17899407],
    [1.4213972, -0.87679005, 0.031454790, -0.48942673, -0.67706722, -0.022024003],
]


@pytest.fixture(scope="module")
def frequencies(paper):
    return paper.mapper.draw_frequencies(torch.Generator().manual_seed(0))


def make(paper, num_layers=16, width=3, length=0.7, **changes):
    settings = {"bypass": True, "normalise_halves": False, "seed": 0} | changes
    return paper.mapper.Mapper(num_layers, width, torch.tensor(length), **settings)


@pytest.fixture
def official_mapper(paper, frequencies):
    mapper = make(paper)
    with torch.no_grad():
        mapper.frequencies.copy_(frequencies)
        mapper.input_layer.weight.copy_(paper.mapper.anchor_encodings(16, frequencies))
        for i, (name, parameter) in enumerate(mapper.named_parameters()):
            if name != "input_layer.weight":
                values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i + 1)) * 0.2
                parameter.copy_(values + 1 if name in ("net.1.weight", "net.4.weight") else values)
    return mapper


def test_positional_encoding_is_the_official_one(paper, frequencies):
    encoded = paper.mapper.positional_encoding(TIMES, LAYERS, frequencies)
    assert encoded.shape == (3, 2048)
    torch.testing.assert_close(encoded[:, ENCODED_AT], torch.tensor(ENCODED), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(encoded.norm(dim=1), torch.ones(3))


def test_positional_encoding_by_hand(paper):
    """w = (0.5, 2): at t = 3, l = 1 the phase is 3.5; sine and cosine of one frequency have length 1 already."""
    encoded = paper.mapper.positional_encoding(torch.tensor([3]), torch.tensor([1]), torch.tensor([[0.5, 2.0]]))
    torch.testing.assert_close(encoded, torch.tensor([[-0.35078323, -0.93645669]]))


def test_positional_encoding_is_exact_under_autocast(paper, frequencies):
    with torch.autocast("cpu", torch.bfloat16):
        encoded = paper.mapper.positional_encoding(TIMES, LAYERS, frequencies)
    assert torch.equal(encoded, paper.mapper.positional_encoding(TIMES, LAYERS, frequencies))


def test_anchors_are_the_official_ones(paper, frequencies):
    anchors = paper.mapper.anchor_encodings(16, frequencies)
    assert anchors.shape == (160, 2048)
    torch.testing.assert_close(anchors[ANCHOR_ROWS][:, ANCHORS_AT], torch.tensor(ANCHORS), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep", [None, 64, 5, 0])
def test_mapper_is_the_official_one(official_mapper, keep):
    keeps = None if keep is None else torch.full((3,), keep)
    with torch.no_grad():
        words, bypass = official_mapper(TIMES, LAYERS, keeps)
    torch.testing.assert_close(torch.cat([words, bypass], 1), torch.tensor(OUTPUTS[keep]), rtol=1e-4, atol=1e-5)


def test_halves_can_be_scaled_apart(official_mapper):
    """Reference: the official outputs before scaling, each half brought to length 0.7."""
    official_mapper.normalise_halves = True
    with torch.no_grad():
        outputs = official_mapper(TIMES, LAYERS)
    for half, raw in zip(outputs, torch.tensor(BEFORE_SCALING).chunk(2, 1), strict=True):
        torch.testing.assert_close(half, 0.7 * normalize(raw, dim=1), rtol=1e-4, atol=5e-5)


def test_the_joint_length_is_that_of_the_super_category(paper):
    words, bypass = make(paper, 4, 8, 0.4)(TIMES, torch.tensor([0, 1, 3]))
    torch.testing.assert_close(torch.cat([words, bypass], 1).norm(dim=1), torch.full((3,), 0.4))
    assert (words.norm(dim=1) < 0.4).all()
    alone, nothing = make(paper, 4, 8, 0.4, bypass=False)(TIMES, torch.tensor([0, 1, 3]))
    torch.testing.assert_close(alone.norm(dim=1), torch.full((3,), 0.4))
    assert nothing is None


def test_truncation_by_hand(paper):
    hidden, keep = torch.arange(1.0, 7).view(2, 3), torch.tensor([1, 3])
    assert paper.mapper.truncate(hidden, keep).tolist() == [[1, 0, 0], [4, 5, 6]]


def test_truncations_are_drawn_per_sample_and_layer(paper):
    """Half of the calls stay whole; the others keep 0..127 units, each as likely. A sample's draws are its own."""
    keys = torch.arange(2000)
    keep = paper.mapper.draw_truncation(keys, 4, 0.5, seed=0)
    assert keep.shape == (2000, 4)
    cut = keep[keep < 128]
    assert len(cut) == pytest.approx(4000, abs=150)  # three standard deviations
    assert (cut.min().item(), cut.max().item()) == (0, 127)
    assert cut.double().mean().item() == pytest.approx(63.5, abs=2)
    assert (keep[:, 0] != keep[:, 1]).float().mean() > 0.7
    assert torch.equal(paper.mapper.draw_truncation(keys[5:7], 4, 0.5, seed=0), keep[5:7])
    assert (paper.mapper.draw_truncation(keys[:9], 4, 0.0, seed=0) == 128).all()
    assert (paper.mapper.draw_truncation(keys[:9], 4, 1.0, seed=0) < 128).all()


def test_the_seed_alone_decides_the_start(paper):
    torch.manual_seed(5)
    first = make(paper, 4).state_dict()
    after = torch.rand(1)
    torch.manual_seed(6)
    again, other = make(paper, 4).state_dict(), make(paper, 4, seed=1).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["frequencies"], other["frequencies"])
    assert not torch.equal(first["output_layer.weight"], other["output_layer.weight"])
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)  # the global generator was left alone


def test_size_on_stable_diffusion_1(paper):
    """The sheet's sum: 327,840 + 20,608 + 256 + 16,512 + 256 + 198,144, or 99,072 for the output without bypass."""
    backbone = load_backbone("sd15", weights="meta")
    for bypass, count in ((True, 563_616), (False, 464_544)):
        method = paper.method.NeTI(backbone, replace(paper.config.NeTIConfig(), bypass=bypass))
        assert method.num_layers == 16
        parameters = dict(method.parameters())
        assert sum(p.numel() for p in parameters.values()) == count
        assert sum(p.numel() * p.element_size() for p in parameters.values()) == 4 * count
        assert parameters["input_layer.weight"].shape == (160, 2048)
        assert sum(t.numel() for t in method.mapper.state_dict().values()) == count + 2048 + 1  # and w, and the length
        method.tokens.remove()

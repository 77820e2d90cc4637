import pytest
import torch
from diffusers import UNet2DConditionModel

from common.backbones.attention import AttentionHook, attend, attention_layers, attention_probabilities, install
from common.backbones.attention_hooks import (
    AddBranch,
    BranchProjections,
    RecordProbabilities,
    ReplaceProbabilities,
    ShareKeysValues,
    cross_attention,
    first_row_of_each_group,
)

TIMESTEPS = torch.tensor([5, 900])


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 8, 16, 16),
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=2,
        )
        .eval()
        .requires_grad_(False)
    )


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(unet, latents=None, context=None):
    latents = draw(2, 4, 16, 16) if latents is None else latents
    context = draw(len(latents), 5, 12, seed=2) if context is None else context
    with torch.no_grad():
        return unet(latents, TIMESTEPS[:1].expand(len(latents)), context).sample


def test_explicit_softmax_and_fused_kernel_agree(unet):
    query, key, value = draw(2, 3, 7, 4), draw(2, 3, 5, 4, seed=2), draw(2, 3, 5, 4, seed=3)
    bias = draw(2, 1, 1, 5, seed=4)
    for added in (None, bias):
        probabilities = attention_probabilities(query, key, added)
        torch.testing.assert_close(probabilities @ value, attend(query, key, value, added))
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, 7))
    everywhere = RecordProbabilities(lambda layer: True)
    expected = run(unet)
    with install(unet, [everywhere]):
        torch.testing.assert_close(run(unet), expected)
    assert len(everywhere.by_layer) == 32
    assert torch.equal(run(unet), expected)


def test_recorded_probabilities_match_queries_and_keys_by_hand(unet):
    """Reference: the layer's inputs caught by plain PyTorch hooks, and exp / sum written out for each head."""
    layer = next(layer for layer in attention_layers(unet) if layer.info.kind == "cross" and layer.info.index == 6)
    inputs = {}
    handles = [
        getattr(layer.module, name).register_forward_hook(
            lambda module, args, out, name=name: inputs.update({name: out})
        )
        for name in ("to_q", "to_k")
    ]
    recorder = RecordProbabilities(lambda info: info == layer.info, average_heads=False)
    averaged = RecordProbabilities()
    with install(unet, [recorder, averaged]):
        run(unet)
    for handle in handles:
        handle.remove()
    (probabilities,) = recorder.by_layer.values()
    heads, width = layer.module.heads, 16 // layer.module.heads
    assert probabilities.shape == (2, heads, 4, 5)
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        weights = (inputs["to_q"][..., columns] @ inputs["to_k"][..., columns].mT / width**0.5).exp()
        torch.testing.assert_close(probabilities[:, head], weights / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(averaged.by_layer[layer.info], probabilities.mean(1))
    assert len(averaged.by_layer) == 16
    for probs in averaged.by_layer.values():
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))


def test_maps_average_the_layers_of_one_resolution(unet):
    recorder = RecordProbabilities()
    with install(unet, [recorder]):
        run(unet)
    maps = recorder.maps((8, 8))
    found = [probs for layer, probs in recorder.by_layer.items() if layer.index in (2, 3, 10, 11, 12)]
    assert maps.shape == (2, 8, 8, 5)
    torch.testing.assert_close(maps.flatten(1, 2), sum(found) / 5)
    with pytest.raises(ValueError, match="recorded resolutions"):
        recorder.maps((5, 5))
    with install(unet, [recorder]):
        run(unet, draw(2, 4, 32, 32))
    with pytest.raises(ValueError, match="pass latent_size"):
        recorder.maps((8, 8))
    recorder = RecordProbabilities()
    with install(unet, [recorder], latent_size=(32, 24)):
        run(unet, draw(2, 4, 32, 24))
    assert recorder.maps((16, 12)).shape == (2, 16, 12, 5)


def test_recorded_probabilities_carry_gradients_to_the_context(unet):
    recorder, context = RecordProbabilities(), draw(2, 5, 12).requires_grad_()
    with install(unet, [recorder]):
        unet(draw(2, 4, 16, 16), TIMESTEPS, context)
    recorder.maps((4, 4))[..., 2].square().mean().backward()
    assert context.grad.abs().sum() > 0


def test_replacing_probabilities_by_their_own_changes_nothing_and_by_one_hot_selects_a_token(unet):
    recorder = RecordProbabilities(average_heads=False)
    with install(unet, [recorder]):
        expected = run(unet)
    with install(unet, [ReplaceProbabilities(lambda layer, probs: recorder.by_layer[layer])]):
        assert torch.equal(run(unet), expected)

    def first_token(layer, probs):
        return torch.nn.functional.one_hot(torch.zeros(probs.shape[:-1], dtype=torch.long), probs.shape[-1]).to(probs)

    context = draw(2, 5, 12, seed=2)
    with install(unet, [ReplaceProbabilities(first_token)]):
        selected = run(unet, context=context)
    torch.testing.assert_close(selected, run(unet, context=context[:, :1]), rtol=1e-4, atol=1e-5)


def test_sharing_leaves_the_reference_alone_and_doubles_its_weight_at_log_2(unet):
    """References: row 0 equals the base network; row 1 equals one layer that reads the reference's tokens twice."""
    latents, context = draw(4, 4, 16, 16), draw(4, 5, 12, seed=2)
    plain = run(unet, latents, context)
    share = ShareKeysValues(first_row_of_each_group(2), score_shift=0.7)
    with install(unet, [share]):
        shared = run(unet, latents, context)
    torch.testing.assert_close(shared[[0, 2]], plain[[0, 2]], rtol=1e-4, atol=1e-5)
    assert (shared[[1, 3]] - plain[[1, 3]]).abs().max() > 1e-3

    layer = next(layer for layer in attention_layers(unet) if layer.info.kind == "self")
    hidden = draw(2, 256, 8, seed=5)
    with install(unet, [ShareKeysValues(first_row_of_each_group(1), score_shift=torch.log(torch.tensor(2.0)).item())]):
        result = layer.module(hidden)
    tokens = torch.cat([hidden[1:], hidden[:1], hidden[:1]], dim=1)
    expected = layer.module(hidden[1:], encoder_hidden_states=tokens)
    torch.testing.assert_close(result[1:], expected, rtol=1e-5, atol=1e-6)


def test_sharing_matches_queries_and_keys_to_the_first_reference(unet):
    seen = {}

    def shift_mean(own, reference):
        seen["references"] = reference
        return own - own.mean(-2, keepdim=True) + reference.mean(-2, keepdim=True)

    class Catch(AttentionHook):
        def applies_to(self, layer):
            return layer.kind == "self" and layer.index == 0

        def projections(self, call, projections):
            seen["projections"] = projections
            return projections

    sharing = ShareKeysValues(
        first_row_of_each_group(1), match_query=shift_mean, match_key=shift_mean, where=Catch().applies_to
    )
    with install(unet, [sharing, Catch()]):
        run(unet)
    query, key, value, bias = seen["projections"]
    assert key.shape[2] == value.shape[2] == 512 and query.shape[2] == 256 and bias is None
    torch.testing.assert_close(query[1].mean(-2), query[0].mean(-2))
    torch.testing.assert_close(key[1, :, :256].mean(-2), key[1, :, 256:].mean(-2))
    torch.testing.assert_close(key[1, :, 256:], seen["references"][1])
    with pytest.raises(ValueError, match="3 rows does not split into 2"):
        first_row_of_each_group(2)(3)


def test_branch_adds_scaled_attention_to_its_own_tokens(unet):
    """Reference: copies of to_k and to_v on the text itself, scale 1, double every cross-attention output."""
    context = draw(2, 5, 12, seed=2)
    branches = BranchProjections(unet, token_dim=12)

    class Doubled(AttentionHook):
        def applies_to(self, layer):
            return layer.kind == "cross"

        def output(self, call, output):
            return 2 * output

    plain = run(unet, context=context)
    with install(unet, [Doubled()]):
        expected = run(unet, context=context)
    with install(unet, [AddBranch(branches, lambda call: context)]):
        torch.testing.assert_close(run(unet, context=context), expected)
    with install(unet, [AddBranch(branches, lambda call: context, scale=0.0)]):
        assert torch.equal(run(unet, context=context), plain)
    gate = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    with install(unet, [AddBranch(branches, lambda call: context, scale=lambda call: gate)]):
        gated = run(unet, context=context)
    torch.testing.assert_close(gated[0], plain[0])
    torch.testing.assert_close(gated[1], expected[1])


def test_branch_reads_image_tokens_that_travel_beside_the_text(unet):
    """A tuple (text, [image]) reaches the hook; only the branch of that layer gets gradients."""
    layer = next(layer for layer in attention_layers(unet) if layer.info.kind == "cross")
    branches = BranchProjections(unet, token_dim=7)
    text, image = draw(2, 5, 12), draw(2, 3, 7)
    with install(unet, [AddBranch(branches, lambda call: call.image_contexts[0], where=cross_attention)]):
        layer.module(draw(2, 256, 8), encoder_hidden_states=(text, [image])).square().sum().backward()
    assert branches.to_k[0].weight.grad.abs().sum() > 0 and branches.to_v[0].weight.grad.abs().sum() > 0
    assert branches.to_k[1].weight.grad is None


def test_branch_has_the_published_size_on_sd15():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    assert sum(parameter.numel() for parameter in BranchProjections(unet, 768).parameters()) == 19_169_280

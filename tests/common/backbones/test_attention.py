import copy
import time

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from diffusers.models.embeddings import ImageProjection

from common.backbones.attention import (
    AttentionHook,
    ChooseContext,
    attention_layers,
    conditioned,
    enable_gradient_checkpointing,
    install,
)

TIMESTEPS = torch.tensor([5, 900])


@pytest.fixture(scope="module")
def unet():
    """SD 1.x topology in miniature."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
    ).eval()


@pytest.fixture
def latents():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def contexts():
    """One context for each cross-attention layer, (16, 2, 5, 12)."""
    return torch.randn(16, 2, 5, 12, generator=torch.Generator().manual_seed(2))


class PerLayer:
    def __init__(self, keys, values=None):
        self.keys, self.values = keys, keys if values is None else values
        self.asked = []

    def for_layer(self, layer_index, timesteps):
        self.asked.append(layer_index)
        return self.keys[layer_index], self.values[layer_index]


class Doubled(AttentionHook):
    """Doubles the attention output of the layers it is told to work in."""

    def __init__(self, where=lambda layer: True):
        self.applies_to = where

    def output(self, call, output):
        return 2 * output


def processors(unet):
    return dict(unet.attn_processors)


def test_layers_of_sd1_are_numbered_in_call_order(unet, latents, contexts):
    """Reference: the order in which forward hooks on the attn2 modules fire, and the table in the P+ paper."""
    called = []
    names = {module: name for name, module in unet.named_modules()}
    handles = [
        module.register_forward_hook(lambda module, *_: called.append(names[module]))
        for name, module in unet.named_modules()
        if name.endswith("attn2")
    ]
    with torch.no_grad():
        unet(latents, TIMESTEPS, contexts[0])
    for handle in handles:
        handle.remove()
    cross = [layer.info for layer in attention_layers(unet) if layer.info.kind == "cross"]
    assert [info.name for info in cross] == called
    assert [info.index for info in cross] == list(range(16))
    assert [info.place for info in cross] == ["down"] * 6 + ["mid"] + ["up"] * 9
    sides = [16, 16, 8, 8, 4, 4, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16]
    assert [info.resolution for info in cross] == [(side, side) for side in sides]
    itself = [layer.info for layer in attention_layers(unet) if layer.info.kind == "self"]
    assert [info.name.replace("attn1", "attn2") for info in itself] == called


def test_deeper_transformers_are_numbered_in_call_order_too():
    """SDXL has several transformer blocks at one place. Reference: forward hooks on the attn2 modules."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 3),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    called, cross = [], [layer for layer in attention_layers(unet) if layer.info.kind == "cross"]
    for layer in cross:
        layer.module.register_forward_hook(lambda *_, index=layer.info.index: called.append(index))
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 0, torch.zeros(1, 5, 12))
    assert called == list(range(18)) and all(layer.info.resolution == (4, 4) for layer in cross)


def test_resolution_follows_the_latent_size_with_odd_sides_rounded_up(unet):
    """Reference: a stride-2 convolution with padding 1 maps n to ceil(n / 2)."""
    resolutions = [layer.info.resolution for layer in attention_layers(unet, (10, 24)) if layer.info.kind == "cross"]
    assert resolutions[0] == (10, 24) and resolutions[2] == (5, 12) and resolutions[4] == (3, 6)
    assert resolutions[6] == (2, 3) and resolutions[15] == (10, 24)


def test_video_unet_has_temporal_layers_and_repeats_contexts_over_frames():
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()
    infos = [layer.info for layer in attention_layers(unet)]
    assert sum(info.kind == "cross" for info in infos) == sum(info.kind == "self" for info in infos) == 16
    temporal = [info for info in infos if info.kind == "temporal"]
    assert len(temporal) == 34  # attn1 and attn2 of transformer_in and of 16 temporal transformers
    assert all("temp_attentions" in info.name or "transformer_in" in info.name for info in temporal)
    called = []
    for layer in attention_layers(unet):
        layer.module.register_forward_hook(lambda *_, name=layer.info.name: called.append(name))
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(2, 4, 3, 8, 8, generator=generator)
    context = torch.randn(2, 5, 12, generator=generator)
    with torch.no_grad():
        expected = unet(video, TIMESTEPS, context).sample
        assert called == [info.name for info in infos]
        with conditioned(unet, PerLayer([context] * 16), TIMESTEPS):
            result = unet(video, TIMESTEPS, torch.zeros_like(context)).sample
    assert torch.equal(result, expected)


def test_equal_contexts_give_the_base_output_and_leaving_restores_the_processors(unet, latents, contexts):
    before = processors(unet)
    conditioning = PerLayer([contexts[0]] * 16)
    with torch.no_grad():
        expected = unet(latents, TIMESTEPS, contexts[0]).sample
        with conditioned(unet, conditioning, TIMESTEPS):
            assert torch.equal(unet(latents, TIMESTEPS, torch.zeros_like(contexts[0])).sample, expected)
        assert torch.equal(unet(latents, TIMESTEPS, contexts[0]).sample, expected)
    assert conditioning.asked == list(range(16))
    assert all(processor is before[name] for name, processor in processors(unet).items())


def test_each_layer_reads_its_own_keys_and_values(unet, latents, contexts):
    """Reference: to_k and to_v replaced by functions that project the wanted context, whatever comes in."""
    values = contexts.flip(0)
    reference = copy.deepcopy(unet)
    for layer in attention_layers(reference):
        if layer.info.kind == "cross":
            for projection, wanted in (
                (layer.module.to_k, contexts[layer.info.index]),
                (layer.module.to_v, values[layer.info.index]),
            ):
                projection.register_forward_pre_hook(lambda module, args, wanted=wanted: (wanted,))
    with torch.no_grad():
        expected = reference(latents, TIMESTEPS, contexts[0]).sample
        with conditioned(unet, PerLayer(contexts, values), TIMESTEPS):
            result = unet(latents, TIMESTEPS, contexts[0]).sample
        assert not torch.equal(result, unet(latents, TIMESTEPS, contexts[0]).sample)
    assert torch.equal(result, expected)


def test_gradients_reach_the_context_of_every_layer(unet, latents, contexts):
    contexts = contexts.clone().requires_grad_()
    with conditioned(unet, PerLayer(contexts), TIMESTEPS):
        unet(latents, TIMESTEPS, torch.zeros(2, 5, 12)).sample.square().mean().backward()
    assert (contexts.grad.flatten(1).abs().sum(1) > 0).all()


def test_hooks_compose_and_are_removed_in_reverse_order(unet, latents, contexts):
    before = processors(unet)
    with torch.no_grad():
        plain = unet(latents, TIMESTEPS, contexts[0]).sample
        outer = install(unet, [Doubled(lambda layer: layer.kind == "cross")])
        doubled = unet(latents, TIMESTEPS, contexts[0]).sample
        with conditioned(unet, PerLayer([contexts[0]] * 16), TIMESTEPS):
            both = unet(latents, TIMESTEPS, torch.zeros(2, 5, 12)).sample
            with pytest.raises(RuntimeError, match="remove what was installed later first"):
                outer.remove()
        assert torch.equal(both, doubled) and not torch.equal(doubled, plain)
        assert torch.equal(unet(latents, TIMESTEPS, contexts[0]).sample, doubled)
        outer.remove()
        outer.remove()
        assert torch.equal(unet(latents, TIMESTEPS, contexts[0]).sample, plain)
    assert all(processor is before[name] for name, processor in processors(unet).items())


def test_processors_come_back_after_an_error(unet):
    before = processors(unet)
    with pytest.raises(KeyError), conditioned(unet, PerLayer([]), TIMESTEPS):
        raise KeyError
    assert processors(unet) == before


def test_double_output_matches_the_hand_written_formula(unet):
    """Reference: softmax(QK^T/sqrt(d))V, written out for one layer."""
    layer = next(layer for layer in attention_layers(unet) if layer.info.kind == "cross")
    attn, generator = layer.module, torch.Generator().manual_seed(3)
    hidden, context = torch.randn(2, 256, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    head_dim = 8 // attn.heads
    heads = []
    for head in range(attn.heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        q, k = hidden @ attn.to_q.weight[rows].T, context @ attn.to_k.weight[rows].T
        v = context @ attn.to_v.weight[rows].T
        weights = (q @ k.mT / head_dim**0.5).exp()
        heads.append(2 * (weights / weights.sum(-1, keepdim=True)) @ v)
    expected = torch.cat(heads, -1) @ attn.to_out[0].weight.T + attn.to_out[0].bias
    with install(unet, [Doubled()]):
        torch.testing.assert_close(attn(hidden, encoder_hidden_states=context), expected, rtol=1e-5, atol=1e-6)
        extra = attn(hidden, encoder_hidden_states=(context, [context]), unknown_kwarg=1)
    torch.testing.assert_close(extra, expected, rtol=1e-5, atol=1e-6)


def test_attention_mask_hides_tokens_as_in_the_base(unet, latents, contexts):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    changed = contexts[0].clone()
    changed[0, 3:] = 9.0
    with torch.no_grad():
        expected = unet(latents, TIMESTEPS, contexts[0], encoder_attention_mask=mask).sample
        with conditioned(unet, PerLayer([contexts[0]] * 16), TIMESTEPS):
            assert torch.equal(unet(latents, TIMESTEPS, changed, encoder_attention_mask=mask).sample, expected)
        with conditioned(unet, PerLayer([changed] * 16), TIMESTEPS):
            hidden = unet(latents, TIMESTEPS, contexts[0], encoder_attention_mask=mask).sample
    torch.testing.assert_close(hidden, expected)


def with_ip_adapter(unet):
    """The same UNet with an IP-Adapter of 4 image tokens, loaded by diffusers' own function."""
    unet = copy.deepcopy(unet)
    torch.manual_seed(5)
    weights = {}
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            attn = unet.get_submodule(name.removesuffix(".processor"))
            for projection in ("k", "v"):
                weights[f"{number}.to_{projection}_ip.weight"] = torch.randn(attn.inner_dim, 12)
    projection = ImageProjection(image_embed_dim=6, cross_attention_dim=12, num_image_text_embeds=4)
    state = {
        f"{old}.{kind}": tensor
        for old, part in (("proj", projection.image_embeds), ("norm", projection.norm))
        for kind, tensor in part.state_dict().items()
    }
    unet._load_ip_adapter_weights([{"image_proj": state, "ip_adapter": weights}])
    return unet.eval()


def set_ip_scale(unet, scale):
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [scale]


@pytest.mark.parametrize("masked", [False, True])
def test_ip_adapter_keeps_working_under_hooks(unet, latents, contexts, masked):
    """Reference: diffusers' IPAdapterAttnProcessor2_0 itself."""
    unet = with_ip_adapter(unet)
    before, state = processors(unet), list(unet.state_dict())
    images = {"image_embeds": [torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(6))]}
    kwargs = {}
    if masked:
        mask = torch.zeros(1, 2, 16, 16)
        mask[:, 0, :, :8], mask[:, 1, :, 8:] = 1, 1
        kwargs = {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
    with torch.no_grad():
        set_ip_scale(unet, 0.0)
        text_only = unet(latents, TIMESTEPS, contexts[0], added_cond_kwargs=images).sample
        set_ip_scale(unet, [0.7, 0.4] if masked else 0.7)
        expected = unet(latents, TIMESTEPS, contexts[0], added_cond_kwargs=images, **kwargs).sample
        with conditioned(unet, PerLayer([contexts[0]] * 16), TIMESTEPS):
            result = unet(latents, TIMESTEPS, torch.zeros(2, 5, 12), added_cond_kwargs=images, **kwargs).sample
        again = unet(latents, TIMESTEPS, contexts[0], added_cond_kwargs=images, **kwargs).sample
    assert not torch.equal(expected, text_only)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert torch.equal(again, expected)
    assert all(processor is before[name] for name, processor in processors(unet).items())
    assert list(unet.state_dict()) == state


def test_gradient_checkpointing_recomputes_with_the_hooks_of_the_forward_pass(unet, latents, contexts):
    """Reference: the gradient without checkpointing. The backward pass runs after `conditioned` has ended."""
    unet = copy.deepcopy(unet).requires_grad_(False)

    def gradient():
        leaf = contexts.clone().requires_grad_()
        with conditioned(unet, PerLayer(leaf), TIMESTEPS):
            loss = unet(latents.clone().requires_grad_(), TIMESTEPS, contexts[0] + 1).sample.square().mean()
        loss.backward()
        return leaf.grad

    expected, before = gradient(), processors(unet)
    enable_gradient_checkpointing(unet)
    torch.testing.assert_close(gradient(), expected, rtol=1e-5, atol=1e-8)
    assert processors(unet) == before
    unet.enable_gradient_checkpointing()
    with pytest.raises(RuntimeError, match="enable_gradient_checkpointing"):
        gradient()
    assert processors(unet) == before


def test_errors_name_the_way_out(unet, latents, contexts):
    with pytest.raises(ValueError, match="applies to none of the 32"):
        install(unet, [Doubled(lambda layer: layer.kind == "temporal")])
    with pytest.raises(TypeError, match="expected a diffusers UNet"):
        install(torch.nn.Linear(2, 2), [Doubled()])
    with pytest.raises(ValueError, match="2 rows, but its context has batch size 4"), torch.no_grad():
        with install(unet, [ChooseContext(lambda layer: (torch.cat([contexts[0]] * 2),) * 2)]):
            unet(latents, TIMESTEPS, contexts[0])
    other = copy.deepcopy(unet)
    other.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(
        CustomDiffusionAttnProcessor(True, True, 16, 12)
    )
    before = processors(other)
    with pytest.raises(TypeError, match="CustomDiffusionAttnProcessor"):
        install(other, [Doubled()])
    assert processors(other) == before


def test_conditioned_costs_less_than_a_millisecond(unet, contexts):
    conditioning, costs_s = PerLayer(contexts), []
    for _ in range(50):
        start = time.perf_counter()
        with conditioned(unet, conditioning, TIMESTEPS):
            pass
        costs_s.append(time.perf_counter() - start)
    assert min(costs_s) < 1e-3

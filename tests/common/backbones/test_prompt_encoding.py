"""`Backbone.encode_prompt`. Reference: what the stock diffusers pipelines and a manual pass compute."""

import copy

import pytest
import torch

from common.backbones import PlaceholderTokens, load_backbone

PROMPTS = ["a photo of a red dog", "", "A Painting, in the style of SKS!"]


def manual_pass(text_encoder, ids, causal: bool):
    """The text encoder step by step from its modules; without the mask it is silently bidirectional."""
    mask = torch.full((1, 1, 77, 77), torch.finfo(torch.float32).min).triu(1) if causal else None
    embeds = text_encoder.embeddings.token_embedding(ids)
    hidden = text_encoder.embeddings(inputs_embeds=embeds)
    hidden = text_encoder.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
    return text_encoder.final_layer_norm(hidden)


def test_equals_the_stock_pipeline(tiny_sd):
    expected, negative = tiny_sd.to_pipeline().encode_prompt(PROMPTS, "cpu", 1, True, [""] * 3)
    got = tiny_sd.encode_prompt(PROMPTS)
    assert got.prompt_embeds.shape == (3, 77, 32)
    assert torch.equal(got.prompt_embeds, expected)
    assert torch.equal(tiny_sd.encode_prompt([""] * 3).prompt_embeds, negative)
    assert torch.equal(
        tiny_sd.encode_prompt(PROMPTS[0]).prompt_embeds, tiny_sd.encode_prompt(PROMPTS[:1]).prompt_embeds
    )


def test_equals_the_stock_sdxl_pipeline(tiny_xl):
    expected, _, pooled, _ = tiny_xl.to_pipeline().encode_prompt(
        PROMPTS, device="cpu", do_classifier_free_guidance=False
    )
    got = tiny_xl.encode_prompt(PROMPTS)
    assert torch.equal(got.prompt_embeds, expected)
    assert torch.equal(got.pooled_prompt_embeds, pooled)
    assert got.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    assert tiny_xl.predict(torch.zeros(3, 4, 8, 8), 5, got).shape == (3, 4, 8, 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_attention_is_causal(tiny_sd, attention):
    """The trap: a pass without an explicit mask lets every word see the later ones."""
    tiny_sd.text_encoder.set_attn_implementation(attention)
    PlaceholderTokens(tiny_sd).add("<r>", initializer_token="dog")
    ids = tiny_sd.tokenizer("a red dog", padding="max_length", return_tensors="pt").input_ids
    got = tiny_sd.encode_prompt("a red dog").prompt_embeds
    torch.testing.assert_close(got, manual_pass(tiny_sd.text_encoder, ids, causal=True), rtol=1e-5, atol=1e-5)
    assert (got - manual_pass(tiny_sd.text_encoder, ids, causal=False)).abs().max() > 1e-2
    one, other = tiny_sd.encode_prompt(["a red <r>", "a red table"]).prompt_embeds
    torch.testing.assert_close(one[:3], other[:3], rtol=0, atol=1e-6)  # start, a, red
    assert (one[3] - other[3]).abs().max() > 1e-3


def test_the_placeholder_of_largest_id_does_not_take_the_pooled_place(tiny_xl):
    """Reference: the hidden state at the first end token, through norm and projection."""
    tokens = PlaceholderTokens(tiny_xl)
    tokens.add("<r>", initializer_token="dog")
    encoder = tiny_xl.text_encoder_2
    ids = tiny_xl.tokenizer_2("a <r> here", padding="max_length", return_tensors="pt").input_ids
    end = ids[0].tolist().index(tiny_xl.tokenizer_2.eos_token_id)
    assert ids.argmax() != end
    expected = encoder.text_projection(encoder.text_model(ids).last_hidden_state[:, end])
    torch.testing.assert_close(tiny_xl.encode_prompt("a <r> here").pooled_prompt_embeds, expected)


def test_a_prompt_that_is_too_long_raises_instead_of_being_cut(tiny_sd):
    assert tiny_sd.encode_prompt("dog " * 75).prompt_embeds.shape == (1, 77, 32)
    with pytest.raises(ValueError, match="78 tokens, but tiny reads 77"):
        tiny_sd.encode_prompt(["dog", "dog " * 76])


def test_an_architecture_without_tokenizer_says_so():
    backbone = load_backbone("sd15", weights="meta")
    assert backbone.tokenizer is None
    with pytest.raises(ValueError, match="sd15 .* no tokenizer"):
        backbone.encode_prompt("a dog")


def test_gradients_reach_a_text_encoder_that_is_trained(tiny_sd):
    trained = copy.copy(tiny_sd)
    trained.text_encoder.requires_grad_(True)
    trained.encode_prompt("a dog").prompt_embeds.sum().backward()
    assert trained.text_encoder.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0

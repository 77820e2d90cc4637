"""Placeholder tokens: what they change, and that nothing else changes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.backbones import PlaceholderTokens, load_backbone


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def all_parameters(backbone) -> dict[str, torch.Tensor]:
    return {f"{i}.{k}": p for i, m in enumerate(backbone.modules) for k, p in m.named_parameters()}


def snapshot(backbone) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in all_parameters(backbone).items()}


def test_a_placeholder_that_starts_as_a_word_reads_as_the_word(tiny_sd):
    expected = tiny_sd.encode_prompt("a photo of a dog on a table").prompt_embeds
    tokens = PlaceholderTokens(tiny_sd)
    (vector,) = tokens.add("<r>", initializer_token="dog")
    assert vector.shape == (1, 32)
    assert torch.equal(tiny_sd.encode_prompt("a photo of a <r> on a table").prompt_embeds, expected)
    with torch.no_grad():
        vector += 1
    changed = tiny_sd.encode_prompt("a photo of a <r> on a table").prompt_embeds
    assert torch.equal(changed[:, :5], expected[:, :5])
    assert not torch.allclose(changed[:, 5], expected[:, 5])
    assert torch.equal(tiny_sd.encode_prompt("a photo of a dog on a table").prompt_embeds, expected)


@pytest.mark.parametrize("name", ["<r>", "<R>", "S*", "<Cat-Toy>", "zqx"])
@pytest.mark.parametrize("num_vectors", [1, 3])
def test_every_vector_is_used_in_upper_and_lower_case(tiny_sd, name, num_vectors):
    """The trap: diffusers silently uses the first vector only where the name has upper-case letters.

    Reference: the manual pass on hand-made embeddings, start a v1 .. vV dog end end ...
    """
    tokens = PlaceholderTokens(tiny_sd)
    vectors = randn(num_vectors, 32)
    tokens.add(name, num_vectors, initial_vectors=vectors)
    encoder = tiny_sd.text_encoder
    ids = tiny_sd.tokenizer("a dog", padding="max_length").input_ids
    row = encoder.embeddings.token_embedding.weight[ids]
    embeds = torch.cat([row[:2], vectors, row[2:]])[None, :77]
    mask = torch.full((1, 1, 77, 77), torch.finfo(torch.float32).min).triu(1)
    hidden = encoder.encoder(inputs_embeds=encoder.embeddings(inputs_embeds=embeds), attention_mask=mask)
    expected = encoder.final_layer_norm(hidden.last_hidden_state)
    got = tiny_sd.encode_prompt(f"A {name} dog").prompt_embeds
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_several_concepts_in_one_prompt(tiny_sd):
    tokens = PlaceholderTokens(tiny_sd)
    tokens.add("<r>", 2, initializer_token="dog")
    tokens.add("<r2>", initializer_token="red")
    tokens.add("ab", 2, initializer_token="table")
    assert tokens.expand("<r2> and <r>, <r>. abc ab's") == "<r2> and <r> <r>_1, <r> <r>_1. abc ab ab_1's"
    got = tiny_sd.encode_prompt("a <r2> <r> on a ab").prompt_embeds
    assert torch.equal(got, tiny_sd.encode_prompt("a red dog dog on a table table").prompt_embeds)
    assert len(tokens.parameters()) == 3
    assert tokens.parameters("<r2>")[0] is tokens.parameters()[1]


def test_a_word_placeholder_does_not_match_inside_longer_words(tiny_sd):
    prompt = "the zqxs dog, xzqx"
    expected = tiny_sd.encode_prompt(prompt).prompt_embeds
    PlaceholderTokens(tiny_sd).add("zqx", 2, initializer_token="dog")
    assert torch.equal(tiny_sd.encode_prompt(prompt).prompt_embeds, expected)


def test_training_moves_the_vectors_and_nothing_else(tiny_sd):
    """The trap: weight decay on the embedding table edits every word; so the optimizer must not see the table."""
    before, rows = snapshot(tiny_sd), tiny_sd.text_encoder.embeddings.token_embedding.weight.shape
    tokens = PlaceholderTokens(tiny_sd)
    (vector,) = tokens.add("<r>", 2, initializer_token="dog")
    start = vector.detach().clone()
    optimizer = torch.optim.AdamW(tokens.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(3):
        conditioning = tiny_sd.encode_prompt("a photo of <r>")
        loss = (tiny_sd.predict_noise(randn(1, 4, 8, 8, seed=step), 500, conditioning) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert vector.grad.abs().amin(1).min() > 0  # both vectors
        assert all(parameter.grad is None for parameter in all_parameters(tiny_sd).values())
        optimizer.step()
    assert ((vector - start).abs() > 1e-3).all()
    assert tiny_sd.text_encoder.embeddings.token_embedding.weight.shape == rows
    after = snapshot(tiny_sd)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_gradient_equals_a_finite_difference(tiny_sd):
    tiny_sd.to(dtype=torch.float64)
    (vector,) = PlaceholderTokens(tiny_sd).add("<r>", initializer_token="dog")
    weights = randn(77, 32).double()

    def value():
        return (tiny_sd.encode_prompt("a <r> and <r>").prompt_embeds * weights).sum()

    value().backward()
    with torch.no_grad():
        vector[0, 3] += 2**-10
        high = value()
        vector[0, 3] -= 2**-9
        low = value()
    torch.testing.assert_close(vector.grad[0, 3].double(), (high - low) / 2**-9, rtol=1e-3, atol=1e-6)


def test_vectors_stay_float32_on_a_half_precision_backbone(tiny_sd):
    """The trap: half-precision masters do not move under small updates."""
    tokens = PlaceholderTokens(tiny_sd.to(dtype=torch.bfloat16))
    (vector,) = tokens.add("<r>", initializer_token="dog")
    conditioning = tiny_sd.encode_prompt("a <r>")
    assert conditioning.prompt_embeds.dtype == torch.bfloat16
    conditioning.prompt_embeds.float().sum().backward()
    assert vector.dtype == vector.grad.dtype == torch.float32
    before = vector.detach().clone()
    torch.optim.SGD([vector], lr=1e-6 / vector.grad.abs().max().item()).step()
    assert (vector != before).any()


def test_removing_restores_everything(tiny_sd):
    prompt = "a <r> dog"
    expected, tokenizer = tiny_sd.encode_prompt(prompt).prompt_embeds, tiny_sd.tokenizer
    before, vocabulary = snapshot(tiny_sd), dict(tokenizer.get_vocab())
    tokens = PlaceholderTokens(tiny_sd)
    tokens.add("<r>", 2, initializer_token="dog")
    assert not torch.equal(tiny_sd.encode_prompt(prompt).prompt_embeds, expected)
    tokens.remove()
    assert tiny_sd.tokenizer is tokenizer and tokenizer.get_vocab() == vocabulary
    assert torch.equal(tiny_sd.encode_prompt(prompt).prompt_embeds, expected)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(tiny_sd).items())
    table = tiny_sd.text_encoder.embeddings.token_embedding
    assert not table._forward_hooks and not table._forward_pre_hooks
    PlaceholderTokens(tiny_sd)  # there is room for the next


def test_bad_placeholders_and_initializers_raise(tiny_sd):
    tokens = PlaceholderTokens(tiny_sd)
    tokens.add("<r>", 2, initializer_token="dog")
    for name in ("<r>", "<r>_1", "dog", "Dog", "*"):
        with pytest.raises(ValueError, match="vocabulary already"):
            tokens.add(name)
    with pytest.raises(ValueError, match="without spaces"):
        tokens.add("a b")
    with pytest.raises(ValueError, match=r"'zqxv' splits into \['z"):
        tokens.add("<s>", initializer_token="zqxv")
    with pytest.raises(ValueError, match="'red dog' splits into"):
        tokens.add("<s>", initializer_token="red dog")
    with pytest.raises(ValueError, match="is a placeholder"):
        tokens.add("<s>", initializer_token="<r>")
    with pytest.raises(ValueError, match="num_vectors"):
        tokens.add("<s>", 0)
    with pytest.raises(ValueError, match=r"\(2, 32\).*\(1, 32\)"):
        tokens.add("<s>", 2, initial_vectors=randn(1, 32))
    with pytest.raises(ValueError, match="no placeholder '<s>'"):
        tokens.parameters("<s>")
    with pytest.raises(ValueError, match="already"):
        PlaceholderTokens(tiny_sd)
    assert tokens.placeholder_tokens == ["<r>"]  # nothing half-added


def test_expansion_beyond_77_tokens_raises(tiny_sd):
    PlaceholderTokens(tiny_sd).add("<r>", 10, initializer_token="dog")
    tiny_sd.encode_prompt("dog " * 65 + "<r>")
    with pytest.raises(ValueError, match="78 tokens"):
        tiny_sd.encode_prompt("dog " * 66 + "<r>")


def test_random_start_has_the_statistics_of_the_table(tiny_sd):
    tokens = PlaceholderTokens(tiny_sd)
    table = tiny_sd.text_encoder.embeddings.token_embedding.weight
    with torch.no_grad():
        table.mul_(3).add_(1)
    (first,) = tokens.add("<a>", 60, seed=5)
    (same,) = tokens.add("<b>", 60, seed=5)
    (other,) = tokens.add("<c>", 60, seed=6)
    assert torch.equal(first, same) and not torch.equal(first, other)
    torch.testing.assert_close(first.mean(), table.mean(), rtol=0.01, atol=0)
    torch.testing.assert_close(first.std(), table.std(), rtol=0.1, atol=0)


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_stock_diffusers_reads_the_export_and_gives_the_same_embeddings(tiny_sd, tmp_path, num_vectors):
    tokens = PlaceholderTokens(tiny_sd)
    tokens.add("<r>", num_vectors, initial_vectors=randn(num_vectors, 32))
    prompt = ["a photo of a <r> dog, <r>"]
    expected = tiny_sd.encode_prompt(prompt).prompt_embeds.detach()
    installed, _ = tiny_sd.to_pipeline().encode_prompt(prompt, "cpu", 1, False)
    assert torch.equal(installed, expected)
    tokens.export_learned_embeds(tmp_path / "learned_embeds.safetensors", metadata={"backbone": "tiny"})
    assert list(load_file(tmp_path / "learned_embeds.safetensors")) == ["<r>"]
    tokens.remove()
    pipeline = tiny_sd.to_pipeline()
    pipeline.load_textual_inversion(str(tmp_path))
    assert torch.equal(pipeline.encode_prompt(prompt, "cpu", 1, False)[0], expected)


def test_an_upper_case_name_is_exported_so_that_stock_diffusers_uses_all_vectors(tiny_sd, tmp_path):
    tokens = PlaceholderTokens(tiny_sd)
    tokens.add("<R>", 3, initial_vectors=randn(3, 32))
    expected = tiny_sd.encode_prompt("a <R>").prompt_embeds.detach()
    with pytest.warns(UserWarning, match="<R> will be called <r>"):
        tokens.export_learned_embeds(tmp_path / "learned_embeds.safetensors")
    tokens.remove()
    again = PlaceholderTokens(tiny_sd)
    assert again.load_learned_embeds(tmp_path / "learned_embeds.safetensors") == "<R>"
    assert torch.equal(tiny_sd.encode_prompt("a <R>").prompt_embeds, expected)
    again.remove()
    pipeline = tiny_sd.to_pipeline()
    pipeline.load_textual_inversion(str(tmp_path))
    assert torch.equal(pipeline.encode_prompt(["a <r>"], "cpu", 1, False)[0], expected)


def test_sdxl_has_vectors_for_both_encoders_and_stock_diffusers_reads_them(tiny_xl, tmp_path):
    tokens = PlaceholderTokens(tiny_xl)
    tokens.add("<r>", 2, initial_vectors=(randn(2, 32), randn(2, 16, seed=1)))
    with torch.no_grad():
        expected = tiny_xl.encode_prompt("a <r> dog")
    path = tmp_path / "learned_embeds.safetensors"
    tokens.export_learned_embeds(path)
    tokens.remove()
    again = PlaceholderTokens(tiny_xl)
    again.load_learned_embeds(path, "<other>")
    assert torch.equal(tiny_xl.encode_prompt("a <other> dog").prompt_embeds, expected.prompt_embeds)
    again.remove()
    pipeline, embeds = tiny_xl.to_pipeline(), load_file(path)
    for key, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(embeds[key], token="<r>", text_encoder=encoder, tokenizer=tokenizer)
    got, _, pooled, _ = pipeline.encode_prompt("a <r> dog", device="cpu", do_classifier_free_guidance=False)
    assert torch.equal(got, expected.prompt_embeds)
    assert torch.equal(pooled, expected.pooled_prompt_embeds)


def test_export_and_load_name_what_is_wrong(tiny_sd, tmp_path):
    tokens = PlaceholderTokens(tiny_sd)
    path = tmp_path / "learned_embeds.safetensors"
    with pytest.raises(ValueError, match="say which placeholder_token"):
        tokens.export_learned_embeds(path)
    save_file({"<r>": randn(2, 48)}, path)
    with pytest.raises(ValueError, match=r"learned_embeds.safetensors .*\[48\].*\[32\]"):
        tokens.load_learned_embeds(path)
    save_file({"<r>": randn(2, 32), "<s>": randn(2, 32)}, path)
    with pytest.raises(ValueError, match="one tensor"):
        tokens.load_learned_embeds(path)
    save_file({"<r>": randn(32)}, path)  # one vector, as some tools write it
    assert tokens.load_learned_embeds(path) == "<r>"
    assert tokens.parameters()[0].shape == (1, 32)
    with pytest.raises(ValueError, match="vocabulary already"):
        tokens.load_learned_embeds(path)


def test_sizes_on_stable_diffusion_1_5():
    """One vector of SD 1.x is 768 numbers, 3,072 bytes in float32."""
    tokens = PlaceholderTokens(load_backbone("sd15", weights="meta"))
    tokens.add("<cat-toy>", 2)
    assert [p.shape for p in tokens.parameters()] == [(2, 768)]

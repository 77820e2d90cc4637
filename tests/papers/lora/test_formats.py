"""The layouts of diffusers and of kohya's sd-scripts, against diffusers' own conversion and loader."""

import copy
import dataclasses

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.utils import convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict

from common.io import atomic_save_safetensors, load_safetensors

PROMPT, SEED = "a photo of a sks dog", 3
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")  # linears and 1 x 1


def make_method(paper, backbone, **changes):
    settings = {"rank": 4, "alpha": 1.0, "layers": LAYERS, "text_encoder_learning_rate": 1e-4, **changes}
    config = dataclasses.replace(paper.config.LoRAConfig.tiny("dog"), num_inference_steps=3, **settings)
    method = paper.method.LoRA(backbone, config)
    for i, group in enumerate(method.parameters()):
        for j, (_, parameter) in enumerate(group["params"]):
            generator = torch.Generator().manual_seed(1000 * i + j)
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return method


def sample(pipe, method):
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": method.config.guidance_scale, "output_type": "pt"}
    return pipe(PROMPT, generator=torch.Generator().manual_seed(SEED), **settings).images * 2 - 1


def test_kohya_file_has_the_names_and_values_of_diffusers_conversion(paper, backbone, tmp_path):
    """Reference: diffusers.utils.convert_state_dict_to_kohya, which knows only alpha = r."""
    method = make_method(paper, backbone, alpha=None, text_encoder_learning_rate=0.0)
    state = get_peft_model_state_dict(backbone.unet, adapter_name="default")
    expected = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
    paper.formats.write_kohya(method.factors(), tmp_path / "kohya.safetensors")
    written, header = load_safetensors(tmp_path / "kohya.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key].float(), expected[key].float()) for key in expected)
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4.0")


def test_kohya_file_is_read_by_diffusers_as_it_was_meant(paper, backbone, tmp_path):
    """Reference: diffusers' reader of kohya files, for the U-Net's names and those of the text encoder."""
    method = make_method(paper, backbone)
    paper.formats.write_kohya(method.factors(), tmp_path / "kohya.safetensors")
    state, alphas = _convert_non_diffusers_lora_to_diffusers(load_safetensors(tmp_path / "kohya.safetensors")[0])
    assert set(alphas.values()) == {1.0} and len(state) == 2 * len(method.factors())
    key = "text_encoder.text_model.encoder.layers.1.self_attn.to_k_lora.down.weight"
    pair = method.factors()["text_encoder.encoder.layers.1.self_attn.k_proj"]
    assert torch.equal(state[key], pair.down)


def test_kohya_file_gives_our_image_in_a_stock_pipeline(paper, backbone, tmp_path):
    """alpha 1 at rank 4: read as if alpha were the rank, it would be four times as strong."""
    untuned = copy.deepcopy(backbone)
    method = make_method(paper, backbone)
    ours = method.generate(PROMPT, seeds=[SEED])
    pipe = untuned.to_pipeline()
    base = sample(pipe, method)
    paper.formats.write_kohya(method.factors(), tmp_path / "kohya.safetensors")
    pipe.load_lora_weights(tmp_path / "kohya.safetensors")
    torch.testing.assert_close(sample(pipe, method), ours, rtol=0, atol=1e-5)
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(pipe, method), base, rtol=0, atol=0)

    tensors, _ = load_safetensors(tmp_path / "kohya.safetensors")
    without_alpha = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    atomic_save_safetensors(without_alpha, tmp_path / "plain.safetensors")
    read = paper.formats.read_kohya(tmp_path / "plain.safetensors", method.factors())
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    delta = paper.method.weight_delta
    torch.testing.assert_close(delta(read[name]), 4 * delta(method.factors()[name]))


def test_kohya_file_is_read_back(paper, backbone, tmp_path):
    path, other = tmp_path / "kohya.safetensors", copy.deepcopy(backbone)
    method = make_method(paper, backbone)
    pairs = method.factors()
    paper.formats.write_kohya(pairs, path)
    read = paper.formats.read_kohya(path, pairs)
    assert read.keys() == pairs.keys()
    for name, pair in pairs.items():
        assert torch.equal(read[name].down, pair.down) and torch.equal(read[name].up, pair.up)
        assert read[name].alpha == pair.alpha == 1.0
    reader = make_method(paper, other)
    reader.load_factors(read)
    assert torch.equal(reader.generate(PROMPT, seeds=[SEED]), method.generate(PROMPT, seeds=[SEED]))

    attention = [name for name in pairs if "attn" in name]
    with pytest.raises(ValueError, match="kohya.safetensors.*not adapted here.*lora_"):
        paper.formats.read_kohya(path, attention)
    tensors, _ = load_safetensors(path)
    first = next(key for key in tensors if key.endswith("lora_up.weight"))
    atomic_save_safetensors({key: tensor for key, tensor in tensors.items() if key != first}, path)
    with pytest.raises(ValueError, match="lacks one half"):
        paper.formats.read_kohya(path, pairs)
    with pytest.raises(ValueError, match="a layer is in one of"):
        paper.formats.kohya_name("vae.encoder")


def test_diffusers_file_is_read_back_and_others_are_refused(paper, backbone, tmp_path):
    method = make_method(paper, backbone)
    method.save(tmp_path)
    read = paper.formats.read_diffusers(tmp_path / paper.method.ARTIFACT)
    pairs = method.factors()
    assert read.keys() == pairs.keys()
    assert all(torch.equal(read[name].up, pair.up) and read[name].alpha == 1.0 for name, pair in pairs.items())
    paper.formats.write_kohya(pairs, tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match="kohya.safetensors is no LoRA in the layout of diffusers"):
        paper.formats.read_diffusers(tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match="was not written by this method"):
        paper.method.load_method(tmp_path / "kohya.safetensors")
    with pytest.raises(FileNotFoundError):
        paper.method.load_method(tmp_path / "nowhere")

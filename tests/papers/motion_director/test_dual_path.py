"""Which layers have pairs, how many numbers these are, what they compute, and who learns."""

import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, UNetMotionModel
from torch import nn

from common.backbones import load_backbone
from common.backbones.video import VideoBackbone
from common.io import load_safetensors


def dual_path(paper, unet, **changes):
    return paper.dual_path.DualPath(unet, **({"rank": 2, "dropout": 0.0, "num_spatial": 2} | changes))


def numbers(paths, path):
    return len(paths.pairs(path)) // 2, sum(parameter.numel() for _, parameter in paths.pairs(path))


def test_layers_are_those_of_the_official_code(paper, video_backbone):
    """showlab/MotionDirector 0146a50, utils/lora.py, _find_modules_v2 on this network: 18 layers in the transformers
    within frames, 40 in those across frames, in the order of named_modules."""
    spatial, temporal = (
        f(video_backbone.unet) for f in (paper.dual_path.spatial_layers, paper.dual_path.temporal_layers)
    )
    assert (len(spatial), len(temporal)) == (18, 40)
    assert spatial[:6] == [
        f"up_blocks.1.attentions.0.transformer_blocks.0.{layer}"
        for layer in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    ]
    assert not any("attn2" in name or "proj_in" in name for name in spatial)
    assert temporal[:10] == [
        f"transformer_in.transformer_blocks.0.{layer}"
        for layer in (
            *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
            *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"),
        )
    ]  # fmt: skip


def test_numbers_on_modelscope(paper):
    """At rank 32 as counted on the diffusers class; the paper says about 9 M and 12 M."""
    method = paper.method.MotionDirector(
        load_backbone("modelscope", weights="meta"), paper.config.MotionDirectorConfig()
    )
    assert numbers(method.paths, "spatial_000") == (96, 8_785_920)
    assert numbers(method.paths, "temporal") == (170, 12_472_320)
    assert sum(parameter.numel() for _, parameter in method.parameters()) == 8_785_920 + 12_472_320
    assert method.backbone.latent_shape == (4, 16, 48, 48)  # 384 px


def test_numbers_on_animatediff(paper):
    paths = dual_path(paper, load_backbone("animatediff", weights="meta").unet, rank=32, num_spatial=1)
    assert numbers(paths, "spatial_000") == (96, 8_785_920)
    assert numbers(paths, "temporal") == (210, 18_124_800)


def test_a_layer_computes_what_the_official_one_does(paper):
    """showlab/MotionDirector 0146a50, utils/lora.py, LoraInjectedLinear(6, 4, bias=True, r=3, dropout_p=0.0): weight,
    bias, lora_down, lora_up and x drawn in this order by torch.randn with generator seed 0."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

    block, generator = Block(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (block.layer.weight, block.layer.bias):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    paper.dual_path._inject(block, "temporal", ["layer"], 3, 0.1, 0)
    block.eval()
    with torch.no_grad():
        for pair in (block.layer.lora_A, block.layer.lora_B):
            pair["temporal"].weight.copy_(torch.randn(pair["temporal"].weight.shape, generator=generator))
        found = block.layer(torch.randn(2, 6, generator=generator))
    expected = [
        [-2.9236583709716797, -0.9915689826011658, -4.1814680099487305, 4.2535786628723145],
        [1.4463542699813843, 3.017841100692749, 0.07834982872009277, -0.5864663124084473],
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_pairs_start_as_in_the_code(paper, video_backbone):
    """D ~ N(0, 1/r^2), U = 0; a clip's pairs are its own draw, and a seed gives them again."""
    paths = dual_path(paper, video_backbone.unet, rank=8)
    down = torch.cat([p.flatten() for name, p in paths.pairs("temporal") if name.endswith("lora_A")])
    assert down.std().item() == pytest.approx(1 / 8, rel=0.02) and abs(down.mean().item()) < 1e-2
    assert all(not p.any() for path in paths.paths for name, p in paths.pairs(path) if name.endswith("lora_B"))
    first, second = (paths.pairs(f"spatial_00{k}")[0][1] for k in (0, 1))
    assert first.shape == second.shape and not torch.equal(first, second)
    again = dual_path(paper, load_backbone(video_backbone.name).unet, rank=8)
    assert torch.equal(again.pairs("spatial_001")[0][1], second)


def test_fresh_pairs_and_strength_0_change_no_bit(paper, video_backbone, predict):
    before = predict(video_backbone)
    paths = dual_path(paper, video_backbone.freeze().unet)
    assert torch.equal(predict(video_backbone), before)
    with paths.using({"temporal": 1.0, "spatial_001": 1.0}):
        assert torch.equal(predict(video_backbone), before)
    for path in paths.paths:
        for i, (_, parameter) in enumerate(paths.pairs(path)):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    assert torch.equal(predict(video_backbone), before)
    with paths.using({"temporal": 0.0, "spatial_000": 0.0}):
        assert torch.equal(predict(video_backbone), before)
    found = {}
    for path in paths.paths:
        with paths.using({path: 1.0}):
            found[path] = predict(video_backbone)
        assert (found[path] - before).abs().max() > 1e-3
    with paths.using({"temporal": 1.0}):
        assert torch.equal(predict(video_backbone, temporal=False), predict_alone(video_backbone, paths, predict))
    with paths.using({"temporal": 0.5}):
        half = predict(video_backbone)
    assert not torch.equal(half, before) and not torch.equal(half, found["temporal"])


def predict_alone(backbone, paths, predict):
    """Without the layers across frames, and so without what is in them."""
    with paths.using({}):
        return predict(backbone, temporal=False)


def test_gradients_reach_the_learning_path_alone(paper, video_backbone):
    paths = dual_path(paper, video_backbone.freeze().unet)
    told = video_backbone.encode_prompt("a duck")
    latents = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with paths.using({"temporal": 1.0, "spatial_000": 1.0}, learning=["temporal"]):
        loss = video_backbone.predict(latents, 500, told).square().mean()
    loss.backward()  # after the block, as the training loop does
    touched = {path for path in paths.paths if any(p.grad is not None for _, p in paths.pairs(path))}
    assert touched == {"temporal"}
    assert all(p.grad is not None for _, p in paths.pairs("temporal"))
    others = {name for name, p in video_backbone.unet.named_parameters() if "lora_" not in name and p.grad is not None}
    assert others == set() and all(p.requires_grad for path in paths.paths for _, p in paths.pairs(path))
    with pytest.raises(ValueError, match="there is no path 'spatial_007'"), paths.using({"spatial_007": 1.0}):
        pass


def test_pairs_drop_out_only_where_something_learns(paper, video_backbone, predict):
    paths = dual_path(paper, video_backbone.freeze().unet, dropout=0.5)
    for _, parameter in paths.pairs("temporal"):
        parameter.data.fill_(0.05)
    with paths.using({"temporal": 1.0}):
        assert torch.equal(predict(video_backbone), predict(video_backbone))
    with paths.using({"temporal": 1.0}, learning=["temporal"]):
        assert not torch.equal(predict(video_backbone), predict(video_backbone))


def test_a_network_takes_one_set_of_paths(paper, video_backbone):
    dual_path(paper, video_backbone.unet)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        dual_path(paper, video_backbone.unet)


def test_files_are_read_again_and_others_refused(paper, video_backbone, tmp_path):
    paths = dual_path(paper, video_backbone.unet)
    for _, parameter in paths.pairs("spatial_001"):
        parameter.data.normal_()
    paths.save("spatial_001", tmp_path, {"slug": paper.slug})
    file = tmp_path / "spatial_001_lora.safetensors"
    tensors, header = load_safetensors(file)
    assert len(tensors) == 36 and header["slug"] == paper.slug
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert tensors[key].shape == (2, 32)
    paths.load("spatial_000", file)
    for (_, ours), (_, theirs) in zip(paths.pairs("spatial_000"), paths.pairs("spatial_001"), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="spatial_001_lora.safetensors does not fit: it has 36 tensors"):
        paths.load("temporal", file)
    with pytest.raises(ValueError, match="Another rank or backbone"):
        dual_path(paper, load_backbone(video_backbone.name).unet, rank=3).load("spatial_000", file)


@pytest.fixture(scope="module")
def adapter():
    """Motion modules for tiny-sd."""
    return MotionAdapter(
        block_out_channels=tuple(load_backbone("tiny-sd", weights="meta").unet.config.block_out_channels),
        motion_num_attention_heads=4, motion_max_seq_length=8, motion_norm_num_groups=32,
    )  # fmt: skip


def test_a_step_on_animatediff_teaches_both_paths(paper, small, batch, adapter):
    image = load_backbone("tiny-sd", weights="random")
    unet = UNetMotionModel.from_unet2d(image.unet, adapter).eval()
    parts = (image.vae, image.text_encoder, image.tokenizer, image.noise_scheduler)
    backbone = VideoBackbone("small-animatediff", unet, *parts)
    method = paper.method.MotionDirector(backbone, small(spatial_off_share=0.0))
    method.training_loss(batch()).backward()
    assert method.last_losses.keys() == {"spatial_loss", "temporal_loss"}
    assert all(pair.grad.abs().max() > 0 for name, pair in method.parameters() if name.endswith("lora_B"))


def test_stock_animatediff_reads_a_path(paper, adapter, tmp_path):
    image = load_backbone("tiny-sd", weights="random")
    ours, stock = (UNetMotionModel.from_unet2d(image.unet, adapter).eval().requires_grad_(False) for _ in range(2))
    paths, generator = dual_path(paper, ours, num_spatial=1), torch.Generator().manual_seed(0)
    for _, parameter in paths.pairs("temporal"):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    paths.save("temporal", tmp_path, {})
    inputs = {
        "sample": torch.randn(1, 4, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(4, 77, 256, generator=generator),
    }
    with torch.no_grad(), paths.using({"temporal": 1.0}):
        expected = ours(**inputs).sample
    plain = ours(**inputs).sample.detach()

    pipe = AnimateDiffPipeline(image.vae, image.text_encoder, image.tokenizer, stock, None, image.noise_scheduler)
    pipe.load_lora_weights(tmp_path, weight_name="temporal_lora.safetensors")
    with torch.no_grad():
        found = stock(**inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-2

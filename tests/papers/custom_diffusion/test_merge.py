"""Merging: the closed form against other solutions of the same problem, features, and whole artifacts."""

import dataclasses

import numpy as np
import pytest
import torch

from common.backbones import load_backbone


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(rows, columns, a, b):
    return torch.tensor(
        [[(a * i + b * j + i * j) % 7 - 3 for j in range(columns)] for i in range(rows)], dtype=torch.float64
    )


def test_merge_solves_the_constrained_least_squares_problem(paper):
    """References: the KKT system of the same problem; and numpy's lstsq in the null space of the constraint."""
    weight, reg, target, values = randn(5, 8, seed=0), randn(40, 8, seed=1), randn(3, 8, seed=2), randn(3, 5, seed=3)
    ours = paper.merge.merge_concepts(weight, reg, target, values)
    gram, kkt = reg.T @ reg, torch.zeros(11, 11, dtype=torch.float64)
    kkt[:8, :8], kkt[:8, 8:], kkt[8:, :8] = gram, target.T, target
    expected = torch.linalg.solve(kkt, torch.cat([gram @ weight.T, values]))[:8].T
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)

    c = target.numpy()
    particular = np.linalg.lstsq(c, values.numpy(), rcond=None)[0]  # (dim, out): W^T = particular + null z
    null = np.linalg.svd(c)[2][3:].T
    wanted = reg.numpy() @ (weight.numpy().T - particular)
    z = np.linalg.lstsq(reg.numpy() @ null, wanted, rcond=None)[0]
    np.testing.assert_allclose(ours.numpy(), (particular + null @ z).T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours @ target.T, values.T, rtol=1e-9, atol=1e-9)


def test_merge_equals_the_official_code(paper):
    """gdupdateWexact of adobe-research/custom-diffusion, src/diffusers_composenW.py, 7c19c9a, on whole numbers."""
    official = torch.tensor(
        [[0.207600281492, 1.295214637579, -0.453377902885, -0.209535538353],
         [-0.876847290640, -0.310344827586, 1.096059113300, -1.012315270936],
         [0.590429275158, -0.226249120338, -0.544159042928, 0.029732582688]], dtype=torch.float64,
    )  # fmt: skip
    ours = paper.merge.merge_concepts(grid(3, 4, 2, 3) / 4, grid(9, 4, 3, 5), grid(2, 4, 5, 2), grid(2, 3, 1, 4))
    torch.testing.assert_close(ours, official, rtol=1e-9, atol=1e-11)


def test_merge_changes_nothing_where_nothing_is_asked_and_refuses_few_captions(paper):
    weight, reg, target = randn(5, 8, seed=0), randn(40, 8, seed=1), randn(3, 8, seed=2)
    merged = paper.merge.merge_concepts(weight, reg, target, target @ weight.T)
    torch.testing.assert_close(merged, weight, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="dim=8"):
        paper.merge.merge_concepts(weight, reg[:7], target, target @ weight.T)


def test_distinct_rows_are_the_first_of_equal_ones(paper):
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [1.0, 2.0 + 1e-6], [3.0, 4.0]])
    assert paper.merge.distinct_rows(features).tolist() == [0, 1, 3]


def test_features_are_those_of_the_words_and_the_end(paper, backbone):
    """ "a cat" has start, a, cat, end: 3 rows; "photo of a cat" loses start, photo, of, a: 2 rows, as in the code."""
    embeds = backbone.encode_prompt(["a cat", "photo of a cat", "a photo of a cat"]).prompt_embeds.double()
    features = paper.merge.text_features(backbone, ["a cat", "photo of a cat", "a photo of a cat"])
    assert torch.equal(features, torch.cat([embeds[0, 1:4], embeds[1, 4:6], embeds[2, 5:7]]))


def trained(paper, folder, noun, path, seed, **changes):
    """An artifact with random changes."""
    config = dataclasses.replace(paper.config.CustomDiffusionConfig.tiny(noun), num_inference_steps=2, **changes)
    method = paper.method.CustomDiffusion(load_backbone(folder), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in method.parameters():
            for _, parameter in group["params"]:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    method.save(path)
    return method


CAPTIONS = [f"a photo of a {c} {n} {p}" for c in ("red", "blue") for n in ("car", "house", "vase", "fish")
            for p in ("in the snow", "at night", "on the beach")]  # fmt: skip


def test_merged_artifact_knows_both_concepts(paper, backbone_folder, tmp_path):
    first = trained(paper, backbone_folder, "dog", tmp_path / "dog", 1)
    second = trained(paper, backbone_folder, "teapot", tmp_path / "teapot", 2)
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(CAPTIONS) + "\n")
    paper.merge.main(
        ["--artifacts", str(tmp_path / "dog"), str(tmp_path / "teapot"), "--captions", str(captions),
         "--output", str(tmp_path / "both")]
    )  # fmt: skip
    merged = paper.method.load_method(tmp_path / "both")
    assert [merged.config.words(i) for i in range(2)] == ["<new1> dog", "<new2> teapot"]
    for token, method in (("<new1>", first), ("<new2>", second)):
        assert torch.equal(merged.tokens.parameters(token)[0], method.tokens.parameters("<new1>")[0])
    for i, method in enumerate((first, second)):
        features = paper.merge.text_features(merged.backbone, paper.merge.target_captions(merged.config, i)).float()
        for name, weight in merged.weights().items():
            wanted = features @ method.weights()[name].T  # W C^T = V^T
            assert ((features @ weight.T - wanted).norm() / wanted.norm()).item() < 1e-4
            assert not torch.allclose(weight, method.weights()[name], atol=1e-3)
    assert merged.generate("a <new1> dog next to a <new2> teapot", seeds=[0]).isfinite().all()


def test_one_artifact_merged_alone_keeps_its_outputs_and_bad_merges_raise(paper, backbone_folder, tmp_path):
    trained(paper, backbone_folder, "dog", tmp_path / "dog", 1)
    with pytest.raises(ValueError, match="of 32 dimensions"):
        paper.merge.merge_artifacts(load_backbone(backbone_folder), [tmp_path / "dog"], CAPTIONS[:1])
    flat = load_backbone(backbone_folder)
    with torch.no_grad():
        flat.text_encoder.final_layer_norm.bias.zero_()  # all features sum to 0, up to rounding
    with pytest.raises(ValueError, match="31 of 32 dimensions"):
        paper.merge.merge_artifacts(flat, [tmp_path / "dog"], CAPTIONS)
    trained(paper, backbone_folder, "cat", tmp_path / "cat", 1, trained="crossattn")
    with pytest.raises(ValueError, match="crossattn_kv"):
        paper.merge.merge_artifacts(load_backbone(backbone_folder), [tmp_path / "dog", tmp_path / "cat"], CAPTIONS)
    trained(paper, backbone_folder, "fish", tmp_path / "fish", 1).save(tmp_path / "fish", share=1.0)
    merged = paper.merge.merge_artifacts(load_backbone(backbone_folder), [tmp_path / "fish"], CAPTIONS)
    (name, weight), *_ = merged.weights().items()
    features = paper.merge.text_features(merged.backbone, ["<new1> fish"]).float()
    own = paper.method.load_method(tmp_path / "fish").weights()[name]
    torch.testing.assert_close(features @ weight.T, features @ own.T, rtol=1e-3, atol=1e-4)

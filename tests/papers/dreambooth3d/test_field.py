"""The final field's loss, artifacts, settings, the command, the claims."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.backbones import load_backbone
from common.training.seeding import keys_of_step, seeded_generator


def test_reconstruction_looks_at_a_pseudo_view_and_distillation_at_random_cameras(paper, make_method):
    method = make_method()
    first = method.first_field()
    views = method.pseudo_views(first)

    def losses(**changes):
        config = replace(method.config, **changes)
        field = paper.subject_field.SubjectField(method.tune_partial(), config, 3, views=views)
        loss = field.training_loss({"step": 0, "sample_keys": keys_of_step(0, 1)})
        return loss.item(), field

    weighted, field = losses(recon_weight=100.0)
    plain, without = losses(recon_weight=0.0)
    assert "recon" not in without.losses and weighted - plain == pytest.approx(field.losses["recon"], rel=1e-3)
    assert sum(field.losses.values()) == pytest.approx(weighted, rel=1e-4)

    generator = seeded_generator(0, "draw")
    index = int(torch.randint(4, (), generator=seeded_generator(0, "draw")))
    error = field.reconstruction_loss(generator).item()
    others = [(field.side_views(4).rgb[k] - field.targets[index]).square().mean().item() for k in range(4)]
    assert 0 < error < 2 * max(others)
    with torch.no_grad():
        field.targets[:] = 1.0
        field.field.grid[:, 0] = -50.0  # empty: white, as the targets are now
        field.occupancy.update(field.field)
    assert field.reconstruction_loss(generator).item() < 1e-8


def test_fields_come_back_with_their_config(paper, make_method, backbone_folder):
    method = make_method(context="in the snow")
    final = method.run()
    again = paper.method.load_method(method.folder, backbone_folder)
    assert again.config == method.config and torch.equal(again.field.grid, final.field.grid)
    first = paper.method.load_method(method.folder / "first_field" / "field.safetensors", backbone_folder)
    assert not torch.equal(first.field.grid, final.field.grid)
    prompt = "a photo of a sks bear in the snow"
    assert again.generate(prompt, seeds=[0, 1]).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="another prompt needs a new run"):
        again.generate("a cat", seeds=[0])


def test_another_architectures_unet_is_refused(paper, make_method):
    method = make_method()
    method.tune_partial()
    with pytest.raises(ValueError, match="does not fit the U-Net of tiny-sd"):
        paper.tuning.load_unet(load_backbone("tiny-sd"), method.folder / "partial")


def test_settings_are_checked(paper):
    make, tuning, field = (getattr(paper.config, f"{name}Config") for name in ("DreamBooth3D", "Tuning", "Field"))
    cases = [
        (make, {"class_noun": "dog", "first_steps": 0}), (make, {"class_noun": ""}),
        (make, {"class_noun": "dog", "strength": 0.0}), (make, {"class_noun": "dog", "prompt_template": "no slot"}),
        (tuning, {"full_steps": 100}), (tuning, {"learning_rate": 0.0}), (field, {"highest_timestep": 1.0}),
        (field, {"fov_low": 50.0}),
    ]  # fmt: skip
    for kind, wrong in cases:
        with pytest.raises(ValueError, match=list(wrong)[-1].split("_")[0]):
            kind(**wrong)
    assert make(class_noun="dog").tuning.full_steps == 800


def test_train_makes_an_object_and_resumes(paper, backbone_folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for folder in ("photos", "masks"):
        (tmp_path / folder).mkdir()
    for k in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{k}.png")
        mask = np.zeros((40, 40), dtype=np.uint8)
        mask[10:30, 10:30] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{k}.png")
    photos = paper.train.read_photos(tmp_path / "photos", tmp_path / "masks", 32)
    assert (photos[:, :, :6] == 1).all() and (photos[:, :, 16, 16] < 1).any()

    def arguments(run):
        return [
            *("--backbone", backbone_folder, "--images", str(tmp_path / "photos"), "--masks", str(tmp_path / "masks")),
            *("--output", str(tmp_path / run), "--class-noun", "bear", "--first-steps", "2"),
            *("--final-steps", "2", "--num-pseudo-views", "2", "--num-inference-steps", "4"),
            *("--tuning.partial-steps", "1", "--tuning.full-steps", "2"),
            *("--tuning.multi-steps", "1", "--tuning.prior-loss-weight", "0", "--field.kind"),
            *("voxels", "--field.resolution", "8", "--field.render-px", "16"),
            *("--field.num-samples", "8"),
        ]  # fmt: skip

    paper.train.main(arguments("run"))
    assert "making 'a photo of sks bear' from 3 photos" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "run" / "final_field").iterdir()}
    assert {"field.safetensors", "turntable.mp4", "normals.gif"} <= names
    with pytest.raises(RuntimeError, match="--resume"):
        paper.train.main(arguments("run"))


def test_claims_of_made_up_scores(paper):
    """Every claim holds when the scores are as the paper says, and none when they are the other way."""
    plan, reproduce, names = paper.experiments.Plan.full(), paper.reproduce, paper.experiments
    everyone = (
        names.PROPOSAL,
        names.NAIVE,
        names.SDS_ONLY,
        names.PSEUDO,
        names.RENDERS,
        names.UNTUNED,
        "partial",
        "full",
    )
    better = {names.PROPOSAL: 1.0, names.PSEUDO: 1.0, "full": 1.0}

    def scores(sign):
        table = {}
        for score in (names.PSNR, names.DEPTH, names.JANUS, names.POSE, names.SATURATION, names.COLOR,
                      names.CONSISTENCY, names.SIMILARITY):  # fmt: skip
            lower = score in (names.DEPTH, names.JANUS, names.SATURATION, names.COLOR)
            table[score] = {
                name: {noun: sign * (-1 if lower else 1) * better.get(name, 0.0) + 0.001 * k
                       for k, noun in enumerate("abcd")}
                for name in everyone
            }  # fmt: skip
        levels = {names.UNTUNED: 2.0, "partial": 1.0, "full": 0.0}
        table[names.ENTROPY] = {
            name: {noun: sign * level + 0.001 * k for k, noun in enumerate("abcd")} for name, level in levels.items()
        }
        return table

    def found(sign):
        rows = reproduce.claims(scores(sign), plan, "tiny-sd")
        return [row.holds for row in rows if row.holds != "not run"]

    assert set(found(1)) == {"yes"} and set(found(-1)) == {"no"}

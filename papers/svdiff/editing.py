"""Single-image editing at equal reconstruction error: shifts against full fine-tuning.

Both are trained on one photo with its true description until they explain it equally well, then the photo is edited in
the same way; the judge says whether the attribute that the new description asks for is there.
"""

from dataclasses import replace
from pathlib import Path

import torch

from common.backbones import load_backbone
from common.evaluation.baselines import FullFineTuning
from common.evaluation.class_samples import save_samples
from common.evaluation.study import PLAIN_PROMPT, Scores, folder_name
from common.toyworld.benchmark import Subject, photo_session
from common.toyworld.captions import BACKGROUND_PHRASES
from common.toyworld.judge import Judge
from common.toyworld.vocabulary import BACKGROUNDS, COLORS
from common.training.losses import fixed_noise_validation
from common.training.optimize import default_device, make_accelerator, make_train_state, optimizer_step
from common.training.seeding import keys_of_step

from .cutmix import CutMixDataset, encode_pictures
from .experiments import FULL, PROPOSAL, Plan
from .method import SVDiff, edit_image
from .train import fit_config

CHECK_EVERY = 5  # steps between looks at the reconstruction error
NUM_EDITS = 2  # of the background, and as many of the colour


def description_and_edits(subject: Subject, number: int) -> tuple[str, list[tuple[str, str, str]]]:
    """What the subject's first photo shows, without article, and (edited description, attribute, label) of each edit.

    Args: number: of the subject in the benchmark, which decides its photos.
    """
    place, color = photo_session(subject.entity, number)[0].background, subject.attributes["color"]
    places = [BACKGROUNDS[(BACKGROUNDS.index(place) + 3 * k) % len(BACKGROUNDS)] for k in range(1, NUM_EDITS + 1)]
    colors = [name for name in ("blue", "green", "red") if name != color][:NUM_EDITS]
    assert set(colors) <= set(COLORS)

    def words(color: str, place: str) -> str:
        return f"{color} {subject.class_noun} {BACKGROUND_PHRASES[place][0]}"

    edits = [(words(color, new), "background", new) for new in places]
    return words(color, place), edits + [(words(new, place), "color", new) for new in colors]


def measure_edits(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """ "edit success", the share of edits whose attribute is right; "reconstruction", the error that training reached,
    of the untuned model's; "edit steps"; by method and subject."""
    judge = Judge.load()
    scores: Scores = {name: {PROPOSAL: {}, FULL: {}} for name in ("edit success", "reconstruction", "edit steps")}
    for number, subject in enumerate(plan.subjects()):
        words, edits = description_and_edits(subject, number)
        for name in (PROPOSAL, FULL):
            method, error, steps = learn_photo(backbone_name, plan, subject, words, name)
            with method.merged() if name == PROPOSAL else torch.no_grad():
                pictures = torch.cat([
                    edit_image(
                        method.backbone, subject.images[:1], PLAIN_PROMPT.format(new), seeds=[0],
                        num_inference_steps=plan.config.num_inference_steps, guidance_scale=plan.config.guidance_scale,
                    )
                    for new, _, _ in edits
                ])  # fmt: skip
            save_samples(pictures, runs / "edits" / folder_name(name) / subject.name)
            read = judge.read(pictures)
            right = [
                judge.labels[attribute][int(read[attribute][i].argmax())] == label
                for i, (_, attribute, label) in enumerate(edits)
            ]
            for score, value in (
                ("edit success", sum(right) / len(right)), ("reconstruction", error), ("edit steps", float(steps)),
            ):  # fmt: skip
                scores[score][name][subject.name] = value
    return scores


def learn_photo(
    backbone_name: str, plan: Plan, subject: Subject, words: str, name: str
) -> tuple[SVDiff | FullFineTuning, float, int]:
    """Train on the first photo until its denoising loss is `plan.edit_error` of the untuned model's.

    Returns: the method, the error that it reached as such a share, and its steps.
    """
    backbone = load_backbone(backbone_name, device=default_device()).freeze()
    config = replace(plan.config, description=PLAIN_PROMPT.format(words), train_steps=plan.edit_steps)
    dataset = CutMixDataset([encode_pictures(backbone, subject.images[:1])], None, config)
    photo = dataset.subjects[0].whole.to(backbone.device)
    untuned = fixed_noise_validation(backbone, photo, backbone.encode_prompt(config.description))
    settings = fit_config(config)
    if name == PROPOSAL:
        method = SVDiff(backbone, config)
    else:
        baseline = plan.baseline()
        method = FullFineTuning(backbone, subject.class_noun, baseline)
        method.words = words
        settings = replace(settings, learning_rate=baseline.learning_rate, weight_decay=0.0)
    accelerator, state = make_accelerator(backbone.device, "no"), make_train_state(method.parameters(), settings)
    error = 1.0
    for step in range(plan.edit_steps):
        keys = keys_of_step(step, config.batch_size)
        batch = {"latents": photo.expand(len(keys), -1, -1, -1), "prompt": [config.description] * len(keys)}
        batch |= {"instance": dict(batch), "sides": torch.full((len(keys), 1), -1)}
        accelerator.backward(method.training_loss({**batch, "sample_keys": keys, "step": step}))
        optimizer_step(accelerator, state, max_grad_norm=settings.max_grad_norm)
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == plan.edit_steps:
            error = method.validation_loss(photo) / untuned
            if error <= plan.edit_error:
                break
    return method, error, step + 1

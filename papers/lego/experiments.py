"""What reproduce.py measures: Lego, its ablations and baselines in the study of states, and concepts of two words."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev

from common.backbones import load_backbone
from common.data.image_folder import ImageFolder
from common.data.latent_cache import LatentCache
from common.evaluation.baselines import BaselineConfig, captioned_full_fine_tuning, captioned_token_inversion
from common.evaluation.exemplar_study import ExemplarStudy, pictures, run_exemplar_study
from common.evaluation.trials import Candidate, Learned, Scores, folder_name
from common.sampling.images import save_png, to_pil
from common.toyworld.benchmark import Prompt, photo_session
from common.toyworld.exemplar_tasks import Task, state_tasks
from common.toyworld.judge import HELD_OUT_JUDGE, Judge
from common.toyworld.render import render
from common.training.config import flat_config
from common.training.loop import fit
from common.training.optimize import default_device

from .config import LegoConfig
from .method import Lego, load_method
from .readings import joint_accuracy, reconstruction_loss, subject_noun, subject_probability
from .train import fit_config, pair_dataset
from .variants import PlainWords, unseparated_prompts
from .words import toy_concept

PROPOSAL, INVERSION, FINE_TUNING = "Lego", "Textual Inversion", "DreamBooth"
UNSEPARATED, PLAIN_WORDS, ONE_VECTOR = "no separation", "plain words", "one vector"
NO_CONTEXT, STRONG_CONTEXT = "no Context Loss", "ten times lambda"
SUBJECT, GAP, LOSS, JOINT, SPREAD = "subject probability", "cosine gap", "set C loss", "joint accuracy", "seed spread"
FINE_TUNING_LEARNING_RATE = 2e-4  # suits tiny-sd
IMAGES_EACH = 3  # of set C and of set S
TWO_WORDS = {"melting": "desert", "frozen": "snow", "burning": "night"}  # a state and a place
PAIRS_SEED = 4000  # of the photo sessions of two-word concepts

Prompts = tuple[list[str], list[str]]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    study: ExemplarStudy
    config: LegoConfig  # with any concept and class noun
    num_ablation_tasks: int  # the first ones of the study
    num_pairs: int  # two-word concepts
    seeds: tuple[int, ...]  # of training, where its spread is measured; the first is the study's

    @classmethod
    def full(cls) -> "Plan":
        return cls(ExemplarStudy(), LegoConfig.tiny(), num_ablation_tasks=3, num_pairs=3, seeds=(0, 1, 2))

    @classmethod
    def quick(cls) -> "Plan":
        config = replace(LegoConfig.tiny(), train_steps=2, num_inference_steps=2)
        return cls(ExemplarStudy.quick(), config, num_ablation_tasks=1, num_pairs=1, seeds=(0, 1))

    @property
    def tasks(self) -> list[Task]:
        """States of one subject each: "melting"."""
        return state_tasks(self.study.num_tasks, IMAGES_EACH)

    @property
    def ablation_tasks(self) -> list[Task]:
        return self.tasks[: self.num_ablation_tasks]

    @property
    def pairs(self) -> list[Task]:
        """States in one place: "melting desert"."""
        of_states = {task.name: task for task in state_tasks(images_each=IMAGES_EACH)}
        chosen = list(TWO_WORDS.items())[: self.num_pairs]
        return [in_one_place(of_states[state], place, PAIRS_SEED + i) for i, (state, place) in enumerate(chosen)]


def in_one_place(task: Task, place: str, seed: int) -> Task:
    """The same subject in the same state; all pictures of set C, and what the prompts ask for, are in one place."""
    count = len(task.images)
    session = photo_session(task.scenes[0].placed[0].entity, seed, count + len(task.held_out))
    scenes = [replace(scene, background=place) for scene in session]
    images = render(scenes).images * 2 - 1
    return replace(
        task,
        name=f"{task.name} {place}",
        images=images[:count],
        scenes=tuple(scenes[:count]),
        held_out=images[count:],
        prompts=tuple(
            Prompt(p.text, {"state": task.name, "class": p.expected["class"], "background": place})
            for p in task.prompts
        ),
    )


def measure(backbone_name: str, plan: Plan, runs: Path) -> Scores:
    """The study's scores, and SUBJECT, GAP, LOSS, JOINT and SPREAD where they are asked for.

    score -> candidate -> task; two-word concepts are tasks with names of their own, "melting desert".
    """
    one_vector = {ONE_VECTOR: lego(backbone_name, plan.config, first_word_only=True)}
    parts = [
        (compared(backbone_name, plan), plan.tasks, runs),
        (ablations(backbone_name, plan), plan.ablation_tasks, runs),
        ({PROPOSAL: lego(backbone_name, plan.config)} | one_vector, plan.pairs, runs / "pairs"),
    ]
    if two_words := [task for task in plan.tasks if len(toy_concept(task.name)) > 1]:
        parts.append((one_vector, two_words, runs))
    scores: Scores = {}
    for candidates, tasks, folder in parts:
        study = replace(plan.study, num_tasks=len(tasks))
        found = run_exemplar_study(backbone_name, candidates, tasks, study, folder)
        read = read_pictures(candidates, tasks, study, folder)
        learned = read_artifacts(backbone_name, candidates, tasks, folder)
        for score, values in (found | read | learned).items():
            for name, by_task in values.items():
                scores.setdefault(score, {}).setdefault(name, {}).update(by_task)
    scores[SPREAD] = {
        name: spread_over_seeds(scores, name, plan.seeds, plan.ablation_tasks) for name in (PROPOSAL, NO_CONTEXT)
    }
    return scores


def compared(backbone_name: str, plan: Plan) -> dict[str, Candidate]:
    """The candidates of all tasks."""
    baseline = BaselineConfig.like(plan.config, plan.config.learning_rate)
    fine_tuning = replace(baseline, learning_rate=FINE_TUNING_LEARNING_RATE)
    return {
        PROPOSAL: lego(backbone_name, plan.config),
        UNSEPARATED: lego(backbone_name, plan.config, prompts_of=unseparated_prompts),
        INVERSION: token_inversion(backbone_name, baseline),
        FINE_TUNING: captioned_full_fine_tuning(backbone_name, fine_tuning),
        PLAIN_WORDS: plain_words(backbone_name, plan.config),
    }


def ablations(backbone_name: str, plan: Plan) -> dict[str, Candidate]:
    """The Context Loss off and stronger, and further seeds of training with it and without it."""
    config = plan.config
    weights = {NO_CONTEXT: 0.0, STRONG_CONTEXT: 10 * config.context_weight}
    candidates = {name: replace(config, context_weight=weight) for name, weight in weights.items()}
    for seed in plan.seeds[1:]:
        candidates[of_seed(PROPOSAL, seed)] = replace(config, seed=seed)
        candidates[of_seed(NO_CONTEXT, seed)] = replace(config, seed=seed, context_weight=0.0)
    return {name: lego(backbone_name, changed) for name, changed in candidates.items()}


def of_seed(name: str, seed: int) -> str:
    """A candidate trained with another seed."""
    return f"{name} seed {seed}"


def lego(
    backbone_name: str,
    config: LegoConfig,
    *,
    first_word_only: bool = False,
    prompts_of: Callable[[LegoConfig], Prompts] = lambda config: (config.subject_prompts(), config.concept_prompts()),
) -> Candidate:
    """Lego as a candidate of the study.

    Args:
        first_word_only: one vector, which starts at the first word of the phrase and has its lists.
        prompts_of: what the two sets are told.
    """

    def learn(task: Task, photos: Path, run: Path) -> Lego:
        concept = toy_concept(task.name)[: 1 if first_word_only else None]
        own = replace(config, concept=concept, class_noun=subject_noun(task))
        method = Lego(load_backbone(backbone_name, device=default_device()), own)
        plain = photos.parent.parent / "subjects" / photos.name  # the study writes set C only
        for i, image in enumerate(to_pil(task.others)):
            save_png(image, plain / f"{i:02d}.png")
        side = method.backbone.resolution_px
        latents = [LatentCache(ImageFolder(root, resolution_px=side), method.backbone) for root in (plain, photos)]
        dataset = pair_dataset(*latents, prompts_of(own), seed=own.seed)
        fit(method, dataset, fit_config(own, keep_checkpoints=1), run, resume=True)
        return method

    lists = {phrase: toy_concept(phrase) for phrase in known_phrases()}
    settings = flat_config(config=config, first_word_only=first_word_only, words=lists, prompts=prompts_of(config))
    return Candidate(words=config.placeholder, settings=settings, train=learn)


def known_phrases() -> list[str]:
    """All phrases of the study."""
    return [*(task.name for task in state_tasks(images_each=1)), *(f"{s} {p}" for s, p in TWO_WORDS.items())]


def token_inversion(backbone_name: str, config: BaselineConfig) -> Candidate:
    """Textual Inversion of set C alone, whose captions have the class noun, from the word that Lego begins with."""

    def of_word(word: str) -> Candidate:
        return captioned_token_inversion(backbone_name, config, word)

    def learn(task: Task, photos: Path, run: Path) -> Learned:
        return of_word(toy_concept(task.name)[0].word).train(task, photos, run)

    first_words = {phrase: toy_concept(phrase)[0].word for phrase in known_phrases()}
    settings = {**of_word("").settings, "initializer_tokens": first_words}
    return Candidate(words=of_word("").words, settings=settings, train=learn)


def plain_words(backbone_name: str, config: LegoConfig) -> Candidate:
    """The natural-language baseline; it learns nothing."""

    def learn(task: Task, photos: Path, run: Path) -> PlainWords:
        return PlainWords(load_backbone(backbone_name, device=default_device()).freeze(), config, task.name)

    return Candidate(words=config.placeholder, settings=flat_config(config=config), train=learn)


def read_pictures(candidates: Iterable[str], tasks: Sequence[Task], study: ExemplarStudy, runs: Path) -> Scores:
    """SUBJECT and JOINT of each candidate and task, from the pictures that the study has made."""
    judge = Judge.load(HELD_OUT_JUDGE)
    scores: Scores = {SUBJECT: {}, JOINT: {}}
    for name in candidates:
        for task in tasks:
            made = [pictures(runs / folder_name(name), task, k, study) for k in range(study.num_prompts)]
            scores[SUBJECT].setdefault(name, {})[task.name] = subject_probability(judge, task, made)
            scores[JOINT].setdefault(name, {})[task.name] = joint_accuracy(judge, task, made)
    return scores


def read_artifacts(backbone_name: str, candidates: Iterable[str], tasks: Sequence[Task], runs: Path) -> Scores:
    """GAP and LOSS of what Lego has learned, with separation; LOSS is that of set C under the prompt of training."""
    scores: Scores = {GAP: {}, LOSS: {}}
    for name in candidates:
        if name in (UNSEPARATED, INVERSION, FINE_TUNING, PLAIN_WORDS):
            continue
        for task in tasks:
            method = load_method(runs / folder_name(name) / "artifacts" / folder_name(task.name), backbone_name)
            scores[GAP].setdefault(name, {})[task.name] = method.cosines()["cosine_gap"]
            scores[LOSS].setdefault(name, {})[task.name] = reconstruction_loss(method, task.images)
    return scores


def spread_over_seeds(scores: Scores, name: str, seeds: Sequence[int], tasks: Sequence[Task]) -> dict[str, float]:
    """Standard deviation of concept accuracy over seeds of training, for each task."""
    names = [name, *(of_seed(name, seed) for seed in seeds[1:])]
    return {task.name: stdev(scores["learned"][trained][task.name] for trained in names) for task in tasks}


def with_one_vector(scores: Scores, score: str) -> dict[str, float]:
    """A score of Lego with one vector in all tasks of the study, as Textual Inversion has it: task -> value."""
    of_lego, of_one = scores[score][PROPOSAL], scores[score][ONE_VECTOR]
    return {task: of_one.get(task, of_lego[task]) for task in scores[score][INVERSION]}


def of_tasks(scores: Scores, score: str, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """One score of the candidates that were measured on all of these tasks: candidate -> task -> value."""
    names = [task.name for task in tasks]
    return {
        candidate: {name: values[name] for name in names}
        for candidate, values in scores[score].items()
        if all(name in values for name in names)
    }

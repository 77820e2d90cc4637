"""Stages of generation, and which words each of them is told. Index 0 is the END of generation, the last its start."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

# Where the code's examples put S* to take over one attribute of its picture, of 10 stages; elsewhere are plain words.
ATTRIBUTE_STAGES = {"layout": (9,), "content": tuple(range(8)), "material": tuple(range(5))}


def stage_of(timesteps: Tensor, num_stages: int, num_train_timesteps: int = 1000) -> Tensor:
    """i = floor(t n / 1000), (B,) int64, for each timestep t of a batch, (B,) int64."""
    return timesteps * num_stages // num_train_timesteps


def first_timesteps(num_stages: int, num_train_timesteps: int = 1000) -> list[int]:
    """The smallest timestep of each stage: 0, 100, ..., 900 for ten."""
    if not 1 <= num_stages <= num_train_timesteps:
        raise ValueError(f"num_stages must be in 1..{num_train_timesteps}, got {num_stages}")
    return [-(-stage * num_train_timesteps // num_stages) for stage in range(num_stages)]


def stage_names(num_stages: int, num_train_timesteps: int = 1000) -> list[str]:
    """Labels for figures: "0: t 0-99, end", ..., "9: t 900-999, start"."""
    starts = first_timesteps(num_stages, num_train_timesteps)
    ends = [start - 1 for start in (*starts[1:], num_train_timesteps)]
    remarks = [", end", *[""] * (num_stages - 2), ", start"] if num_stages > 1 else [""]
    rows = enumerate(zip(starts, ends, remarks, strict=True))
    return [f"{stage}: t {start}-{end}{remark}" for stage, (start, end, remark) in rows]


def stage_fills(stages: Mapping[str, Iterable[int]], elsewhere: str, num_stages: int = 10) -> list[str]:
    """What stands in the gap of the prompt at each stage.

    `stage_fills({"<bear>": ATTRIBUTE_STAGES["layout"]}, "corgi")` has the layout of <bear> and else says "corgi".

    Args:
        stages: words -> stages that are told them.   elsewhere: words of all other stages.
    Raises: ValueError for a stage that does not exist, or one that is given twice.
    """
    fills = [elsewhere] * num_stages
    given: set[int] = set()
    for words, chosen in stages.items():
        for stage in chosen:
            if not 0 <= stage < num_stages:
                raise ValueError(f"stage must be in 0..{num_stages - 1} (0 = end of generation), got {stage}")
            if stage in given:
                raise ValueError(f"stage {stage} is given twice, the second time to {words!r}")
            given.add(stage)
            fills[stage] = words
    return fills


def stage_prompts(prompt: str, placeholder: str, fills: Sequence[str | int]) -> list[tuple[str, int]]:
    """For each stage the prompt that it is told, and the stage whose p_i stands for the concepts in it.

    Args:
        prompt: the main prompt, with S* in it: "a photo of a <bear>", or "<bear>" alone as in the code's examples.
        fills: one per stage; a text takes the place of S* and may hold S* itself; a whole number j leaves the main
            prompt as it is, with p_j for S*.
    Raises: ValueError if a number is no stage, or the prompt has no gap to fill.
    """
    if placeholder not in prompt:
        raise ValueError(f"the prompt has no {placeholder} to put words in the place of: {prompt!r}")
    told = []
    for stage, fill in enumerate(fills):
        if isinstance(fill, str):
            told.append((prompt.replace(placeholder, fill), stage))
        elif 0 <= fill < len(fills):
            told.append((prompt, fill))
        else:
            raise ValueError(f"item {stage} of fills must be words or a stage in 0..{len(fills) - 1}, got {fill}")
    return told

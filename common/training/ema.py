"""Moving average of the trained parameters: diffusers' EMAModel, and a way to look at the average while training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch.nn import Parameter


def make_ema(parameters: Iterable[Parameter], decay: float) -> EMAModel:
    """Average of the parameters: average <- d * average + (1 - d) * parameter after each step.

    The first step copies; n steps later d = min(decay, (1 + n) / (10 + n)), so that short runs are averaged too.
    """
    return EMAModel(list(parameters), decay=decay, foreach=True)


@contextmanager
def averaged_weights(ema: EMAModel | None, parameters: Iterable[Parameter]) -> Iterator[None]:
    """Let the parameters hold their average inside the block, and their own values, bit for bit, after it.

    Without an average (None) nothing changes.
    """
    parameters = list(parameters)
    if ema is None:
        yield
        return
    with torch.no_grad():
        own_values = [parameter.detach().clone() for parameter in parameters]
        ema.copy_to(parameters)
        try:
            yield
        finally:
            torch._foreach_copy_([parameter.data for parameter in parameters], own_values)

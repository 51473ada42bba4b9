"""AdamW over named parameters, and its learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor
from torch.optim import AdamW

from ltf.config.schema import Optimizer


def adamw(parameters: Iterable[tuple[str, Tensor]], settings: Optimizer) -> AdamW:
    """Matrices decay, vectors (norms) do not. The update of all parameters is one fused kernel."""
    decays: list[Tensor] = []
    keeps: list[Tensor] = []
    for _, parameter in parameters:
        (decays if parameter.ndim > 1 else keeps).append(parameter)
    groups = [
        {"params": decays, "weight_decay": settings.weight_decay},
        {"params": keeps, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def learning_rate(step: int, steps: int, settings: Optimizer) -> float:
    """Of step number `step`, counted from 0, in a run of `steps`.

    Grows linearly over the warm-up so that its last step has the peak, stays, and falls over the decay steps
    so that the run's last step has `final_fraction` of the peak.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    length = settings.decay_steps or max(1, steps - settings.warmup_steps)
    gone = (step + 1 - (steps - length)) / length
    if settings.decay == "constant" or gone <= 0:
        return settings.lr
    gone = min(1.0, gone)
    left = 1 - gone if settings.decay == "linear" else (1 + math.cos(math.pi * gone)) / 2
    return settings.lr * (settings.final_fraction + (1 - settings.final_fraction) * left)

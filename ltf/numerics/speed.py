"""How long a forward and a backward pass takes, of several candidates in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch

from ltf.model.args import ModelArgs
from ltf.numerics.candidates import Candidate
from ltf.numerics.shape import Text
from ltf.numerics.subject import Subject

WARM = 2


def measure(
    args: ModelArgs, candidates: Sequence[Candidate], text: Text, device: torch.device, rounds: int
) -> dict[str, float]:
    """Median milliseconds by name. Candidates take turns, so that what slows the machine slows all."""
    subjects = {
        candidate: Subject(
            args,
            seed=0,
            device=device,
            master=torch.float32,
            compute=candidate.torch_dtype,
            compiled=candidate.compiled,
        )
        for candidate in candidates
    }
    taken: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for turn in range(WARM + rounds):
        for candidate, subject in subjects.items():
            with candidate.kernels():
                _wait(device)
                began = time.perf_counter()
                subject.gradients(text)
                _wait(device)
            if turn >= WARM:
                taken[candidate.name].append((time.perf_counter() - began) * 1e3)
    return {name: median(times) for name, times in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

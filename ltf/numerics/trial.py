"""One candidate against the reference: operator by operator, in sequence, and over steps of the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ltf.config.schema import Dtype, Optimizer
from ltf.model.args import ModelArgs
from ltf.model.decoder import Decoder
from ltf.numerics.candidates import Candidate
from ltf.numerics.compare import Quantity, Row, Stage, difference, limits, maker, owner, reader
from ltf.numerics.shape import Text
from ltf.numerics.subject import Steps, Subject, by_layer
from ltf.numerics.taps import Level, Seen

Around = Callable[[Decoder], AbstractContextManager[object]]
"""What to hold open while a candidate's model runs: a kernel to try, or a planted fault."""


@dataclass(frozen=True)
class Flips:
    """Of the routers' choices, the share that is not the reference's: legitimate where scores nearly tie.

    `isolated`: given the reference's inputs. `accumulated`: given the candidate's own. `steps`: in the
    last step of training. None where a compiled layer hides them, or without routers. In all comparisons
    of values the reference's choices are imposed.
    """

    isolated: float | None = None
    accumulated: float | None = None
    steps: float | None = None


@dataclass(frozen=True)
class Trial:
    """`error`: why it could not run. `milliseconds`: median of a forward and backward pass, if measured."""

    candidate: Candidate
    rows: list[Row] = field(default_factory=list)
    flips: Flips = Flips()
    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)
    error: str | None = None
    milliseconds: float | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def first(self) -> Row | None:
        """What diverges first.

        Of the operators that fail given right inputs, the first in the forward pass, else the first that the
        backward pass comes to. Where none does, the first that fails behind the others.
        """
        for stage in Stage:
            failed = [row for row in self.rows if row.stage is stage and not row.passed]
            forward = [row for row in failed if row.quantity is Quantity.OUTPUT]
            if forward:
                return min(forward, key=lambda row: row.place)
            if failed:
                return max(failed, key=lambda row: row.place)
        return None


class Reference:
    """The same model, weights and text in fp64 on the CPU by the plainest kernels; computed once."""

    def __init__(
        self,
        args: ModelArgs,
        texts: list[Text],
        optimizer: Optimizer,
        *,
        seed: int,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.args, self.texts, self.optimizer, self.seed = args, texts, optimizer, seed
        self._dtype = dtype
        subject = self._subject()
        self.seen = {level: subject.watch(texts[0], level=level) for level in Level}
        self.choices = by_layer(self.seen[Level.OPERATORS].choices)
        self.steps: Steps = subject.train(texts[1:], optimizer, trusted=True)

    def answer(self, to: Seen, level: Level, compute: torch.dtype) -> Seen:
        """What every operator should have returned to a candidate, given the same rounded inputs."""
        exact = self.seen[level]
        rounded = Seen(
            {name: x.to(to.values.get(name, x).dtype) for name, x in exact.values.items()},
            {
                name: None if x is None else x.to(to.values.get(name, x).dtype)
                for name, x in exact.gradients.items()
            },
        )
        subject = self._subject(rounded_to=compute)
        return subject.feed(self.texts[0], rounded, self.choices, level)

    def _subject(self, rounded_to: torch.dtype | None = None) -> Subject:
        subject = Subject(
            self.args, seed=self.seed, device=torch.device("cpu"), master=self._dtype, compute=self._dtype
        )
        if rounded_to is not None:
            subject.round(rounded_to)
        return subject


def attempt(
    reference: Reference, candidate: Candidate, device: torch.device, around: Around | None = None
) -> Trial:
    """Run a candidate and compare everything. What torch refuses to run becomes the trial's `error`."""
    try:
        with candidate.kernels():
            subject = build(reference, candidate, device)
            with around(subject.model) if around else nullcontext():
                fed = subject.feed(
                    reference.texts[0], reference.seen[subject.level], reference.choices, subject.level
                )
                walked = subject.watch(reference.texts[0], reference.choices)
                steps = subject.train(
                    reference.texts[1:], reference.optimizer, imposed=reference.steps.choices
                )
    except RuntimeError as error:
        return Trial(candidate, error=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    answer = reference.answer(fed, subject.level, candidate.torch_dtype)
    exact = reference.seen[subject.level]
    dtype = candidate.dtype
    rows = [
        *_compared(fed, answer, Stage.ISOLATED, dtype, subject.level),
        *_compared(walked, exact, Stage.ACCUMULATED, dtype, subject.level),
        *_moved(steps, reference.steps, dtype),
    ]
    flips = Flips(
        _flipped(fed.choices, answer.choices),
        _flipped(walked.choices, exact.choices),
        _flipped(steps.choices[-1], reference.steps.choices[-1]) if steps.choices else None,
    )
    return Trial(candidate, rows, flips, steps.losses, reference.steps.losses)


def build(reference: Reference, candidate: Candidate, device: torch.device) -> Subject:
    """The candidate's model with the reference's weights."""
    return Subject(
        reference.args,
        seed=reference.seed,
        device=device,
        master=torch.float32,
        compute=candidate.torch_dtype,
        compiled=candidate.compiled,
    )


def _compared(found: Seen, right: Seen, stage: Stage, dtype: Dtype, level: Level) -> list[Row]:
    """One row for each operator and quantity: that of the worst of its tensors."""
    whole = level is Level.LAYERS
    rows: list[Row] = []

    def add(operator: str, quantity: Quantity, place: int, c: Tensor, r: Tensor) -> None:
        allowed = limits(stage, dtype, operator, quantity)
        rows.append(Row(operator, quantity, stage, place, difference(c, r), allowed))

    places = {name: place for place, name in enumerate(right.values)}
    for name, place in places.items():
        layer = name.rpartition(".")[0] or name
        # An operator that was put in the place of others may hide what is inside of it.
        if name in found.values:
            add(
                layer if whole else maker(name),
                Quantity.OUTPUT,
                place,
                found.values[name],
                right.values[name],
            )
        c, r = found.gradients.get(name), right.gradients.get(name)
        if c is not None and r is not None:
            add(layer if whole else reader(name), Quantity.INPUT_GRADIENT, place, c, r)
    for name, r in right.weights.items():
        c = found.weights.get(name)
        if c is not None and r is not None:
            place = places.get(f"{owner(name)}.out", places.get(_layer(name) + ".out", 0))
            add(owner(name), Quantity.WEIGHT_GRADIENT, place, c, r)
    return rows


def _moved(found: Steps, right: Steps, dtype: Dtype) -> list[Row]:
    rows = []
    for place, name in enumerate(right.updates):
        for quantity, c, r in (
            (Quantity.UPDATE, found.updates[name], right.updates[name]),
            (Quantity.PARAMETER, found.parameters[name], right.parameters[name]),
        ):
            allowed = limits(Stage.STEPS, dtype, owner(name), quantity)
            rows.append(Row(owner(name), quantity, Stage.STEPS, place, difference(c, r), allowed))
    return rows


def _layer(parameter: str) -> str:
    return ".".join(parameter.split(".")[:2])


def _flipped(found: dict[str, Tensor], right: dict[str, Tensor]) -> float | None:
    kept = total = 0
    for name, chosen in found.items():
        kept += int((chosen.cpu().unsqueeze(-1) == right[name].unsqueeze(-2)).any(-1).sum())
        total += right[name].numel()
    return 1 - kept / total if total else None

"""How far two tensors are apart, what is permitted, and which operator is to blame."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ltf.config.schema import Dtype

COSINE = 0.99


@dataclass(frozen=True)
class Difference:
    """Of a candidate c from a reference r.

    `cosine`: <c, r> / (|c| |r|). `error`: the largest |c - r| / max(|r|, rms(r)) of an element, so that
    elements near zero count by the tensor's scale. `gain`: <c, r> / <r, r> - 1, the uniform factor that
    neither of the others shows well: it averages rounding away. Two tensors of zeros are equal; NaN and
    infinity are never.
    """

    cosine: float
    error: float
    gain: float


def difference(candidate: Tensor, reference: Tensor) -> Difference:
    """Computed in fp64 on the CPU."""
    c = candidate.detach().cpu().double().flatten()
    r = reference.detach().cpu().double().flatten()
    if not bool(torch.isfinite(c).all()):
        return Difference(math.nan, math.inf, math.nan)
    size = float(r.norm())
    if size == 0:
        same = not bool(c.any())
        return Difference(1.0 if same else 0.0, 0.0 if same else math.inf, 0.0 if same else math.inf)
    dot = float(c @ r)
    rms = size / math.sqrt(r.numel())
    error = float(((c - r).abs() / r.abs().clamp_min(rms)).max())
    length = float(c.norm())
    return Difference(dot / (length * size) if length else 0.0, error, dot / size**2 - 1)


class Stage(StrEnum):
    """ISOLATED: given the reference's inputs. ACCUMULATED: behind all that came before it, first step.
    STEPS: after the optimizer's steps."""

    ISOLATED = "isolated"
    ACCUMULATED = "accumulated"
    STEPS = "steps"


class Quantity(StrEnum):
    OUTPUT = "output"
    INPUT_GRADIENT = "input gradient"
    WEIGHT_GRADIENT = "weight gradient"
    UPDATE = "update"
    PARAMETER = "parameter"


@dataclass(frozen=True)
class Limits:
    """`cosine` at least; `error` and the size of `gain` at most."""

    cosine: float
    error: float
    gain: float

    def allow(self, found: Difference) -> bool:
        return found.cosine >= self.cosine and found.error <= self.error and abs(found.gain) <= self.gain


# Measured on clean runs of many shapes, then at least four times wider; see docs/ltf-numerics.md.
LIMITS = {
    (Stage.ISOLATED, Dtype.FP32): Limits(COSINE, 1e-4, 1e-5),
    (Stage.ISOLATED, Dtype.BF16): Limits(COSINE, 0.1, 0.01),
    (Stage.ACCUMULATED, Dtype.FP32): Limits(COSINE, 1e-3, 1e-4),
    (Stage.ACCUMULATED, Dtype.BF16): Limits(COSINE, math.inf, 0.05),
    (Stage.STEPS, Dtype.FP32): Limits(COSINE, math.inf, 1e-2),
    (Stage.STEPS, Dtype.BF16): Limits(COSINE, math.inf, 0.1),
}


@dataclass(frozen=True)
class Row:
    """One comparison. `place`: order of execution in the forward pass."""

    operator: str
    quantity: Quantity
    stage: Stage
    place: int
    difference: Difference
    limits: Limits

    @property
    def passed(self) -> bool:
        return self.limits.allow(self.difference)


# AdamW moves an element by its gradient's sign more than by its size: of a norm's few elements, one whose
# gradient is near zero weighs much: one of 16 that turns round leaves a cosine of 0.875.
VECTOR_UPDATE = Limits(0.8, math.inf, 0.3)


def limits(stage: Stage, dtype: Dtype, operator: str, quantity: Quantity) -> Limits:
    """A router computes in fp32 whatever the dtype around it, and is held to that where that can be seen."""
    if quantity is Quantity.UPDATE and dtype is Dtype.BF16 and operator.endswith("norm"):
        return VECTOR_UPDATE
    exact = stage is Stage.ISOLATED and quantity is Quantity.OUTPUT and operator.endswith(".router")
    return LIMITS[stage, Dtype.FP32 if exact else dtype]


def maker(tap: str) -> str:
    """The operator that makes the value at a tap."""
    stem, _, end = tap.rpartition(".")
    match end:
        case "logits" if stem:
            return stem
        case "weights":
            return stem
        case "q" | "k" | "v" if stem.endswith(".kernel"):
            return stem.removesuffix("kernel") + ("split" if end == "v" else "rope")
        case "in":
            return _before(stem)
        case "out" if stem.endswith(".ffn"):
            return f"{stem}.combine"
        case "out" if stem.rpartition(".")[0] == "layers":
            return f"{stem}.ffn.residual"
        case "out":
            return stem
        case _:
            return tap


def reader(tap: str) -> str:
    """The operator through which the gradient at a tap comes back."""
    stem, _, end = tap.rpartition(".")
    match end:
        case "in" | "logits" | "q" | "k" | "v" if stem:
            return stem
        case "weights":
            return _parent(stem) + ".combine"
        case "out":
            return _after(stem)
        case _:
            return "loss"


def owner(weight: str) -> str:
    """The operator that a parameter belongs to."""
    return _parent(weight)


def _before(operator: str) -> str:
    parent, _, name = operator.rpartition(".")
    match name:
        case "down":
            return f"{parent}.activation"
        case "experts":
            return f"{parent}.dispatch"
        case "o":
            return f"{parent}.merge"
        case "q_norm" | "k_norm":
            return f"{parent}.split"
        case "ffn_norm":
            return f"{parent}.attention.residual"
        case _:
            return f"{operator}.input"


def _after(operator: str) -> str:
    parent, _, name = operator.rpartition(".")
    match name:
        case "q_norm" | "k_norm":
            return f"{parent}.rope"
        case "q" | "k" | "v":
            return f"{parent}.split"
        case "gate_up":
            return f"{parent}.activation"
        case "experts" | "shared":
            return f"{parent}.combine"
        case "kernel":
            return f"{parent}.merge"
        case "ffn_norm":
            return f"{parent}.ffn.dispatch"
        case _:
            return f"{operator}.residual"


def _parent(name: str) -> str:
    return name.rpartition(".")[0]

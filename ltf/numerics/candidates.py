"""What may be tried: dtype, kernels, compiled or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product

import torch

from ltf import kernels
from ltf.config.schema import AttentionKernel, Config, Dtype, ExpertsKernel
from ltf.model.args import ModelArgs
from ltf.model.attention import attend, document_mask
from ltf.model.experts import can_group

TORCH = {Dtype.FP32: torch.float32, Dtype.BF16: torch.bfloat16}


@dataclass(frozen=True)
class Candidate:
    """Master weights are fp32 in all of them; `dtype` is that of products and activations."""

    dtype: Dtype
    attention: AttentionKernel = AttentionKernel.AUTO
    experts: ExpertsKernel = ExpertsKernel.AUTO
    compiled: bool = False

    @property
    def name(self) -> str:
        return "/".join((self.dtype, self.attention, self.experts, "compiled" if self.compiled else "eager"))

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH[self.dtype]

    def kernels(self) -> AbstractContextManager[None]:
        return kernels.chosen(self.attention, self.experts)

    def settings(self) -> str:
        """The lines of a configuration that set it."""
        return (
            f"precision:\n  compute: {self.dtype}\n  attention_kernel: {self.attention}\n"
            f"  experts_kernel: {self.experts}\nparallel:\n  compile: {str(self.compiled).lower()}"
        )


@dataclass(frozen=True)
class Unavailable:
    """A kernel that this device does not have for this model, and why."""

    name: str
    why: str


def configured(config: Config) -> Candidate:
    """The combination that the configuration asks for."""
    precision = config.precision
    return Candidate(
        precision.compute, precision.attention_kernel, precision.experts_kernel, config.parallel.compile
    )


def available(
    args: ModelArgs, device: torch.device, *, documents: bool
) -> tuple[list[Candidate], list[Unavailable]]:
    """All combinations that the device has; each kernel is tried on the model's own head size and dtype."""
    found: list[Candidate] = []
    missing: list[Unavailable] = []
    for dtype in Dtype:
        attentions = []
        for kernel in AttentionKernel:
            if kernel is AttentionKernel.AUTO:
                continue
            why = _refusal(args, device, Candidate(dtype, kernel), documents=documents)
            if why is None:
                attentions.append(kernel)
            else:
                missing.append(Unavailable(f"{dtype}/{kernel}", why))
        experts = list(_experts(args, dtype, device))
        if args.moe is not None and ExpertsKernel.GROUPED not in experts:
            missing.append(Unavailable(f"{dtype}/*/grouped", "grouped_mm does not take this shape and dtype"))
        for attention, expert, compiled in product(attentions, experts, (False, True)):
            found.append(Candidate(dtype, attention, expert, compiled))
    return found, missing


def select(wanted: str, everything: list[Candidate], own: Candidate) -> list[Candidate]:
    """`all`, `configured`, or comma-separated names with wildcards (`bf16/*`); the configured one always.

    ValueError names a pattern that fits none.
    """
    if wanted == "configured":
        return [own]
    chosen = {own.name: own}
    for pattern in ["*"] if wanted == "all" else wanted.split(","):
        fitting = [candidate for candidate in everything if fnmatch(candidate.name, pattern.strip())]
        if not fitting:
            names = ", ".join(candidate.name for candidate in everything)
            raise ValueError(
                f"--candidates: {pattern!r} fits none; expected all, configured, or some of {names}"
            )
        chosen |= {candidate.name: candidate for candidate in fitting}
    return list(chosen.values())


def _experts(args: ModelArgs, dtype: Dtype, device: torch.device) -> Iterator[ExpertsKernel]:
    if args.moe is None:
        yield ExpertsKernel.AUTO
        return
    x = torch.empty(1, args.width, dtype=TORCH[dtype], device=device)
    shapes = ((2 * args.moe.expert_width, args.width), (args.width, args.moe.expert_width))
    if all(can_group(x, torch.empty(1, *shape, dtype=x.dtype, device=device)) for shape in shapes):
        yield ExpertsKernel.GROUPED
    yield ExpertsKernel.LOOP


def _refusal(args: ModelArgs, device: torch.device, candidate: Candidate, *, documents: bool) -> str | None:
    """Run the kernel forward and backward; None if it works."""
    length = 32
    options = {"dtype": candidate.torch_dtype, "device": device, "requires_grad": True}
    q = torch.randn(1, args.heads, length, args.head_dim, **options)  # type: ignore[call-overload]
    k, v = (torch.randn(1, args.kv_heads, length, args.head_dim, **options) for _ in "kv")  # type: ignore[call-overload]
    mask = document_mask(torch.arange(length, device=device).unsqueeze(0) // 16) if documents else None
    try:
        with candidate.kernels():
            torch.autograd.backward(attend(q, k, v, mask).sum())
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None

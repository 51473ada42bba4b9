"""Passes of a rank that holds part of the model's depth: torch's pipeline schedules over decoder stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from ltf.config.schema import PipelineSchedule
from ltf.data.loader import Batch
from ltf.model.aux_loss import add_counts, attach_loss
from ltf.model.decoder import Decoder, DecoderOutput
from ltf.model.router import RoutingStats
from ltf.parallel import stages
from ltf.parallel.shard import settle
from ltf.passes import Passed, Totals, cross_entropy_sum, router_share

IGNORED = -100
"""A label that does not count."""


class PipelinePasses:
    """See `ltf.passes.Passes`; every rank of a pipeline gives the same micro-batches of its data rank.

    Only the rank with the last stage has a share of the cross-entropy; each has that of its own layers in
    the router losses. The number of micro-batches may change between steps, for all ranks of the pipeline
    together, within `stages.check`. A stage that raises leaves the others waiting until the group's timeout.
    """

    def __init__(
        self,
        parts: Sequence[Decoder],
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        schedule: PipelineSchedule,
        samples: int,
        length: int,
        dtype: torch.dtype,
        masked: bool,
    ) -> None:
        """`parts`: this rank's stages in order (`stages.stages`), sharded if they are to be.

        `group`: the pipeline's ranks in order. A micro-batch has (samples, length) tokens. `dtype`: of hidden
        states between stages. `masked`: documents are told apart by the batches' document ids.
        """
        self.parts = tuple(parts)
        self.masked = masked
        self._group, self._device, self._kind = group, device, schedule
        self._shape, self._dtype = (samples, length), dtype
        self._numbers = stages.placement(group.size(), len(parts), schedule)[group.rank()]
        self._count = group.size() * len(parts)
        for part, number in zip(parts, self._numbers, strict=True):
            if (part.stage.embed, part.stage.head) != (number == 0, number == self._count - 1):
                raise ValueError(f"layers {part.stage.layers} are not stage {number} of {self._count}")
        self._built: tuple[int, _Schedule] | None = None
        # NCCL makes a group's communicator in its first operation, in which all of its ranks must then take
        # part; the schedules begin with some of them.
        dist.all_reduce(torch.zeros((), device=device), group=group)

    def __call__(self, batches: Sequence[Batch], totals: Totals) -> Passed:
        """Gradients are summed over data ranks once. StagesError where the schedule cannot run so many."""
        sums = _Sums(torch.zeros((), device=self._device), torch.zeros((), device=self._device))
        with self._handing_on(totals, sums):
            loss = self._run(batches, totals, train=True)
        return Passed(loss, sums.balance, sums.z, sums.counts)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], totals: Totals) -> Tensor:
        """This rank's share of the mean cross-entropy in nats a label; forward passes alone."""
        with self._handing_on(totals, None):
            loss = self._run(batches, totals, train=False)
        for part in self.parts:
            settle(part)
        return loss

    def _run(self, batches: Sequence[Batch], totals: Totals, *, train: bool) -> Tensor:
        self._check(batches)
        schedule = self._schedule(len(batches))
        inputs = [torch.cat([batch.tokens for batch in batches])] if 0 in self._numbers else []
        losses: list[Tensor] = []
        options: dict[str, Any] = {
            "target": _targets(batches) if self._count - 1 in self._numbers else None,
            "losses": losses,
            "loss_kwargs": {"loss_tokens": totals.loss_tokens},
            # Outputs would keep every micro-batch's logits.
            "return_outputs": False,
        }
        if self.masked:
            options["document_ids"] = torch.cat([batch.document_ids for batch in batches])
        try:
            (schedule.step if train else schedule.eval)(*inputs, **options)
        except BaseException:
            # What was under way would be taken for the next step's.
            self._built = None
            raise
        if not losses:
            return torch.zeros((), device=self._device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    def _check(self, batches: Sequence[Batch]) -> None:
        # Buffers are made for one shape; torch would wait for bytes that never come.
        for batch in batches:
            if tuple(batch.tokens.shape) != self._shape:
                found = tuple(batch.tokens.shape)
                raise ValueError(f"a micro-batch of {found} tokens: the pipeline is made for {self._shape}")
        stages.check(len(batches), self._group.size(), self._kind, len(self.parts))

    def _schedule(self, micro_batches: int) -> _Schedule:
        # One at a time: each holds a receive buffer for every micro-batch.
        if self._built is None or self._built[0] != micro_batches:
            self._built = None
            self._built = (micro_batches, self._build(micro_batches))
        return self._built[1]

    def _build(self, micro_batches: int) -> _Schedule:
        held: list[Any] = [
            self._stage(part, number) for part, number in zip(self.parts, self._numbers, strict=True)
        ]
        match self._kind:
            case PipelineSchedule.ONE_F_ONE_B:
                return Schedule1F1B(held[0], micro_batches, _loss, scale_grads=False)
            case PipelineSchedule.INTERLEAVED:
                return ScheduleInterleaved1F1B(held, micro_batches, _loss, scale_grads=False)
            case PipelineSchedule.ZERO_BUBBLE if stages.is_v(len(held), self._kind):
                return ScheduleZBVZeroBubble(held, micro_batches, _loss, scale_grads=False)
            case PipelineSchedule.ZERO_BUBBLE:
                return ScheduleInterleavedZeroBubble(held, micro_batches, _loss, scale_grads=False)

    def _stage(self, part: Decoder, number: int) -> PipelineStage:
        """With all shapes given, so that torch does not run the model to find them."""
        hidden = torch.empty(
            *self._shape, part.args.width, dtype=self._dtype, device="meta", requires_grad=True
        )
        tokens = torch.empty(self._shape, dtype=torch.int64, device="meta")
        logits = hidden.new_empty(*self._shape, part.args.vocab_size)
        return _Stage(
            part,
            number,
            self._count,
            self._device,
            input_args=tokens if part.stage.embed else hidden,
            output_args=logits if part.stage.head else hidden,
            group=self._group,
        )

    @contextmanager
    def _handing_on(self, totals: Totals, sums: _Sums | None) -> Iterator[None]:
        """While it lasts, parts return the tensor that goes to the next stage, router losses attached."""

        def hand_on(part: nn.Module, _: Any, output: DecoderOutput) -> Tensor:
            assert isinstance(part, Decoder)
            moe = part.args.moe
            if moe is None or sums is None or not output.routing:
                return output.out
            term, balance, z = router_share(output.routing, moe, totals)
            sums.add(output.routing, balance, z)
            out = attach_loss(output.out, term)
            # The zero-bubble schedules detach what a stage hands on in place, which a view cannot be.
            return out.clone() if self._kind is PipelineSchedule.ZERO_BUBBLE and not part.stage.head else out

        with ExitStack() as hooks:
            for part in self.parts:
                # A hook rather than a module around it: torch leaves FSDP's reduction to the end of the step
                # only where the stage's module is FSDP's own.
                hooks.callback(part.register_forward_hook(hand_on).remove)
            yield


class _Stage(PipelineStage):
    """What torch 2.13 leaves out for the zero-bubble schedules."""

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """FSDP turns gradients into its reduction's dtype only where a whole backward pass ends: those of
        several micro-batches in a row would be added up in the dtype that they were computed in."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        for module in self.submod.modules():
            if self.has_backward and isinstance(module, FSDPModule):
                for group in fully_shard.state(module)._fsdp_param_groups:  # type: ignore[attr-defined]
                    group.post_backward()

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        """Nothing in `eval`, where the V schedule asks for gradients between two stages of one rank too."""
        if not self.has_backward:
            return ()
        gradients: tuple[Tensor | None, ...] = super().get_local_bwd_output(mb_index)  # type: ignore[no-untyped-call]
        return gradients

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


_Schedule = Schedule1F1B | ScheduleInterleaved1F1B | ScheduleInterleavedZeroBubble | ScheduleZBVZeroBubble


@dataclass
class _Sums:
    """Over the micro-batches and stages of one step."""

    balance: Tensor
    z: Tensor
    counts: dict[int, Tensor] = field(default_factory=dict)

    def add(self, routing: dict[int, RoutingStats], balance: Tensor, z: Tensor) -> None:
        self.balance = self.balance + balance
        self.z = self.z + z
        self.counts |= add_counts(self.counts, routing)


def _targets(batches: Sequence[Batch]) -> Tensor:
    kept = [torch.where(batch.loss_mask.bool(), batch.labels, IGNORED) for batch in batches]
    return torch.cat(kept)


def _loss(logits: Tensor, target: Tensor, *, loss_tokens: int) -> Tensor:
    return cross_entropy_sum(logits, target, target != IGNORED) / loss_tokens

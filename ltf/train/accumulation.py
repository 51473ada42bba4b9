"""Passes of a rank that holds the model's whole depth: micro-batch after micro-batch, gradients add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ltf.data.loader import Batch
from ltf.model.aux_loss import add_counts
from ltf.model.decoder import Decoder
from ltf.parallel.shard import set_last, settle
from ltf.passes import Passed, Totals, cross_entropy_sum, router_share


class Accumulation:
    """See `ltf.passes.Passes`.

    `masked`: documents are told apart by the batches' document ids. `between`: called before each
    micro-batch; what it raises ends the step there.
    """

    def __init__(self, model: Decoder, *, masked: bool, between: Callable[[], None] = lambda: None) -> None:
        self.model = model
        self.masked = masked
        self._between = between

    def __call__(self, batches: Sequence[Batch], totals: Totals) -> Passed:
        moe = self.model.args.moe
        loss = torch.zeros((), device=batches[0].tokens.device)
        balance, z = torch.zeros_like(loss), torch.zeros_like(loss)
        counts: dict[int, Tensor] = {}
        for number, batch in enumerate(batches):
            self._between()
            set_last(self.model, number == len(batches) - 1)
            out = self.model(batch.tokens, document_ids=batch.document_ids if self.masked else None)
            own = cross_entropy_sum(out.out, batch.labels, batch.loss_mask) / totals.loss_tokens
            objective = own
            if moe is not None and out.routing:
                router, balanced, z_loss = router_share(out.routing, moe, totals)
                objective = own + router
                balance, z = balance + balanced, z + z_loss
                counts = add_counts(counts, out.routing)
            objective.backward()  # type: ignore[no-untyped-call]
            loss = loss + own.detach()
        return Passed(loss, balance, z, counts)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], totals: Totals) -> Tensor:
        """This rank's share of the mean cross-entropy in nats a label."""
        loss = torch.zeros((), device=batches[0].tokens.device)
        for batch in batches:
            self._between()
            out = self.model(batch.tokens, document_ids=batch.document_ids if self.masked else None)
            loss = loss + cross_entropy_sum(out.out, batch.labels, batch.loss_mask) / totals.loss_tokens
        settle(self.model)
        return loss

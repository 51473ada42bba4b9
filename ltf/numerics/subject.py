"""A model in given numbers: master weights, and the copy in the compute dtype that runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltf.config.schema import Optimizer
from ltf.model.args import ModelArgs
from ltf.model.aux_loss import router_losses
from ltf.model.decoder import Decoder
from ltf.model.init import init_weights
from ltf.model.router import Router
from ltf.numerics.shape import Text
from ltf.numerics.taps import Feeding, Level, Passing, Seen, Watching, routed, tapped
from ltf.optim import adamw
from ltf.passes import cross_entropy_sum


@dataclass(frozen=True)
class Steps:
    """`updates`: last parameters minus first, fp64 on the CPU. `losses`: before each step, in nats.

    `choices`: for each step, the experts by router that its logits want.
    """

    losses: list[float]
    parameters: dict[str, Tensor]
    updates: dict[str, Tensor]
    choices: list[dict[str, Tensor]]


class Subject:
    """Runs in the mixed precision of the trainer: weights are cast for each pass, gradients come back in the
    compute dtype, and AdamW works on the master copy."""

    def __init__(
        self,
        args: ModelArgs,
        *,
        seed: int,
        device: torch.device,
        master: torch.dtype,
        compute: torch.dtype,
        compiled: bool = False,
    ) -> None:
        self._args = args
        self._device = device
        self._master = Decoder(args)
        init_weights(self._master, seed)
        self._master.to(device, master)
        self.model = Decoder(args).to(device, compute)
        self.routers: dict[int, Router] = self.model.routers()
        self._pairs = [
            (name, kept, run)
            for (name, kept), run in zip(
                self._master.named_parameters(), self.model.parameters(), strict=True
            )
        ]
        self.level = Level.LAYERS if compiled else Level.OPERATORS
        if compiled:
            for index, layer in list(self.model.layers.items()):
                self.model.layers[index] = torch.compile(layer)  # type: ignore[assignment]

    @torch.no_grad()
    def round(self, dtype: torch.dtype) -> None:
        """Keep the weights' dtype and give them the values that `dtype` has."""
        for _, kept, _ in self._pairs:
            kept.copy_(kept.to(dtype))

    def watch(self, text: Text, choices: dict[int, Tensor] | None = None, level: Level | None = None) -> Seen:
        """One pass as it is, except that routers follow `choices` where they are given."""
        tap = Watching()
        self._observe(tap, text, choices, level)
        return tap.seen

    def feed(self, text: Text, reference: Seen, choices: dict[int, Tensor], level: Level) -> Seen:
        """One pass in which every operator is given the reference's inputs and gradients."""
        tap = Feeding(reference.values, reference.gradients)
        self._observe(tap, text, choices, level)
        return tap.seen

    def train(
        self,
        texts: list[Text],
        settings: Optimizer,
        *,
        imposed: list[dict[str, Tensor]] | None = None,
        trusted: bool = False,
    ) -> Steps:
        """A step of AdamW for each text, at the peak learning rate.

        `imposed`: what routers choose in each step; none: they choose for themselves. `trusted`: by the
        plainest of torch's implementations.
        """
        begun = {name: kept.detach().cpu().double().clone() for name, kept, _ in self._pairs}
        optimizer = adamw([(name, kept) for name, kept, _ in self._pairs], settings)
        if trusted:
            for group in optimizer.param_groups:
                group["fused"], group["foreach"] = False, False
        losses, choices = [], []
        for step, text in enumerate(texts):
            tap = Passing()
            forced = by_layer(imposed[step]) if imposed else {}
            with tapped(self.model, tap, tap.seen, self.level), routed(self.routers, forced):
                losses.append(float(self.gradients(text)))
            choices.append(tap.seen.choices)
            for _, kept, run in self._pairs:
                kept.grad = None if run.grad is None else run.grad.to(kept.dtype)
            if settings.clip is not None:
                torch.nn.utils.clip_grad_norm_([kept for _, kept, _ in self._pairs], settings.clip)
            optimizer.step()
        ended = {name: kept.detach().cpu().double() for name, kept, _ in self._pairs}
        return Steps(losses, ended, {name: ended[name] - begun[name] for name in ended}, choices)

    def gradients(self, text: Text) -> Tensor:
        """A forward and a backward pass; the loss."""
        self._cast()
        loss = self._loss(text.to(self._device), None)
        torch.autograd.backward(loss)
        return loss.detach()

    def _observe(
        self,
        tap: Watching | Feeding,
        text: Text,
        choices: dict[int, Tensor] | None,
        level: Level | None,
    ) -> None:
        self._cast()
        with (
            tapped(self.model, tap, tap.seen, level or self.level),
            routed(self.routers, choices or {}),
        ):
            loss = self._loss(text.to(self._device), tap)
            tap.finish(loss)
        tap.seen.weights = {
            name: None if run.grad is None else run.grad.detach().clone() for name, _, run in self._pairs
        }

    @torch.no_grad()
    def _cast(self) -> None:
        for _, kept, run in self._pairs:
            run.copy_(kept)
            run.grad = None

    def _loss(self, text: Text, tap: Watching | Feeding | None) -> Tensor:
        tokens, labels = text.tokens[:, :-1], text.tokens[:, 1:]
        out = self.model(tokens, document_ids=text.documents)
        logits = out.out if tap is None else tap("logits", out.out)
        loss = cross_entropy_sum(logits, labels, torch.ones_like(labels)) / labels.numel()
        if out.routing and self._args.moe is not None:
            loss = loss + router_losses(out.routing, self._args.moe).total
        return loss if tap is None else tap("loss", loss)


def by_layer(choices: dict[str, Tensor]) -> dict[int, Tensor]:
    """Routers' names to the layers that they are in."""
    return {int(name.split(".")[1]): chosen for name, chosen in choices.items()}

"""Where in a step something was seen: places that every rank numbers alike, in order of cause and effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Phase(IntEnum):
    """BUCKET: gradients of parameters before their reduction over ranks. REDUCED: after it."""

    FORWARD = 0
    BACKWARD = 1
    BUCKET = 2
    REDUCED = 3


class Segment(IntEnum):
    """Stretches of computation, in forward order inside a layer. A point is what a stretch put out.

    RECEIVED: hidden states from the pipeline stage before. EXPERTS_IN: rows as they arrive at the experts,
    from this rank and from others. FFN: what the feed-forward network adds to the stream; of a mixture of
    experts the experts' results, come back and summed, plus the shared experts. BLOCK: a compiled layer, seen
    from outside, or all of a layer's parameters but the experts'. HEAD: last norm and logits. MODEL:
    parameters that belong to none of these. LOSS: this rank's share of the step's loss.
    """

    RECEIVED = 0
    EMBED = 1
    ATTENTION = 2
    ROUTER = 3
    EXPERTS_IN = 4
    EXPERTS = 5
    FFN = 6
    BLOCK = 7
    HEAD = 8
    MODEL = 9
    LOSS = 10


@dataclass(frozen=True)
class Point:
    """`layer`: index in the whole model; -1 for the embedding, the number of layers for the head.

    In the BACKWARD phase it is the gradient with respect to what the segment put out. `micro_batch` counts
    from 0 in each step; of a bucket, how often it was reduced before in this step.
    """

    phase: Phase
    micro_batch: int
    layer: int
    segment: Segment

    @property
    def order(self) -> tuple[int, ...]:
        """Sorts points of one unit of ranks by cause and effect.

        Micro-batches of a step don't touch one another before their gradients are added, so each is a chain
        of its own; the parameters' gradients follow all chains.
        """
        if self.phase is Phase.FORWARD:
            return 0, self.micro_batch, 0, self.layer, self.segment
        if self.phase is Phase.BACKWARD:
            return 0, self.micro_batch, 1, -self.layer, -self.segment
        return self.phase, -self.layer, -self.segment, self.micro_batch

    @property
    def place(self) -> tuple[int, int, int]:
        """The same whatever the micro-batch."""
        return self.phase, self.layer, self.segment

    def words(self) -> list[float]:
        """As four floats, for a gather."""
        return [float(self.phase), float(self.micro_batch), float(self.layer), float(self.segment)]


NOWHERE = [-1.0, 0.0, 0.0, 0.0]
"""The words of no point."""

WORDS = 4


def from_words(words: Sequence[float]) -> Point | None:
    """The inverse of `Point.words`; None for NOWHERE."""
    if words[0] < 0:
        return None
    return Point(Phase(int(words[0])), int(words[1]), int(words[2]), Segment(int(words[3])))


def maker(point: Point, layers: int) -> str:
    """What computed the value at a point, in words; `layers`: how many the whole model has."""
    layer = f"layer {point.layer}"
    match point.phase:
        case Phase.FORWARD:
            return _forward(point.segment, layer)
        case Phase.BACKWARD:
            return _backward(point, layers)
        case Phase.BUCKET if point.segment is Segment.LOSS:
            return "loss"
        case Phase.BUCKET:
            return f"gradients of the parameters of {_parameters(point.segment, layer)}"
        case Phase.REDUCED:
            return f"reduction of the gradients of {_parameters(point.segment, layer)}"


def _forward(segment: Segment, layer: str) -> str:
    names = {
        Segment.RECEIVED: f"transfer from the pipeline stage before {layer}",
        Segment.EMBED: "embedding",
        Segment.ATTENTION: f"{layer} attention",
        Segment.ROUTER: f"{layer} router",
        Segment.EXPERTS_IN: f"{layer} exchange towards the experts",
        Segment.EXPERTS: f"{layer} experts",
        Segment.FFN: f"{layer} feed-forward network (beyond its experts)",
        Segment.BLOCK: layer,
        Segment.HEAD: "head",
        Segment.MODEL: "model",
        Segment.LOSS: "loss",
    }
    return names[segment]


def _backward(point: Point, layers: int) -> str:
    layer, following = f"layer {point.layer}", point.layer + 1
    after = "head and loss" if following >= layers else f"layer {following} attention"
    names = {
        Segment.RECEIVED: f"{layer} attention",
        Segment.EMBED: f"layer {following} attention",
        Segment.ATTENTION: f"{layer} feed-forward network",
        Segment.ROUTER: f"{layer} router",
        Segment.EXPERTS_IN: f"{layer} experts",
        Segment.EXPERTS: f"{layer} exchange back from the experts",
        Segment.FFN: after,
        Segment.BLOCK: "head and loss" if following >= layers else f"layer {following}",
        Segment.HEAD: "loss",
        Segment.MODEL: "model",
        Segment.LOSS: "loss",
    }
    return names[point.segment]


def _parameters(segment: Segment, layer: str) -> str:
    names = {Segment.EMBED: "the embedding", Segment.HEAD: "the head", Segment.EXPERTS: f"{layer} experts"}
    return names.get(segment, layer if segment is Segment.BLOCK else "the rest of the model")

"""What a rank's guards see of a step: begun before its passes, finished after them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ltf.guard.buckets import Buckets, reduced
from ltf.guard.digest import Record, Recorder
from ltf.guard.drill import Drill
from ltf.guard.finite import Finite, FiniteAndDigested, Report, report
from ltf.guard.point import Phase, Point, Segment
from ltf.guard.segments import Observer, Segments
from ltf.passes import Passed


class Watch:
    """Attached once, after sharding and before the first pass, to the parts of the model on this rank.

    Between `begin` and `finish` lie a step's passes and nothing else, in particular no evaluation. Neither
    has a collective; `finish` waits for the device, where the step would read its loss anyway.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        layers: int,
        *,
        finite: bool = True,
        corruption: bool = True,
        state: Callable[[], Iterable[Tensor]] = tuple,
        drill: Drill | None = None,
    ) -> None:
        """`layers`: of the whole model. `state`: the optimizer's tensors, looked at only after a finding.

        `corruption`: digest the gradients before every reduction, so that a replay on suspicion has something
        of the original to compare with.
        """
        tamper = None if drill is None else drill.tamper
        self.parameters = tuple(pair for part in parts for pair in part.named_parameters())
        """By name in the whole model, as this rank holds them outside of passes."""
        self.layers = layers
        self.record = Record()
        """Digests of the last finished step."""
        self._drill = drill
        self._look_finite = finite
        self._look_bits = corruption
        self._state = state
        self._segments = Segments(parts, tamper)
        self._buckets = Buckets(parts, layers, tamper)
        self._finite: Finite | None = None
        self._recorder: Recorder | None = None
        self._whole = False

    def begin(self, step: int, *, digests: bool = False) -> None:
        """`digests`: of every segment too, for a replay of this step that says where a difference began."""
        if self._drill is not None:
            self._drill.begin(step)
        self._finite = Finite() if self._look_finite else None
        self._recorder = Recorder() if self._look_bits or digests else None
        self._whole = digests
        seeing: list[Observer] = [o for o in (self._finite, self._recorder) if o is not None]
        if self._finite is not None and self._recorder is not None:
            self._buckets.begin([FiniteAndDigested(self._finite, self._recorder)])
        else:
            self._buckets.begin(seeing)
        self._segments.begin([o for o in seeing if digests or o is self._finite], everything=digests)

    def finish(self, passed: Passed) -> Report:
        """Its `words` go into the step's gather; `finite.attribute` makes a finding of all ranks'."""
        self._buckets.end()
        self._segments.end()
        if self._recorder is not None:
            self._recorder.see(Point(Phase.BUCKET, 0, self.layers, Segment.LOSS), (passed.loss,))
            if self._whole:
                for (layer, segment), shards in reduced(self.parameters, self.layers).items():
                    self._recorder.see(Point(Phase.REDUCED, 0, layer, segment), shards)
            self.record = self._recorder.record()
        seen = Report()
        if self._finite is not None:
            seen = self._report(passed.loss)
        self._finite = self._recorder = None
        return seen

    def _report(self, loss: Tensor) -> Report:
        assert self._finite is not None
        return report(self._finite, loss, chain((p for _, p in self.parameters), self._state()))


class Gradients:
    """The gradients that passes left, taken out of the parameters so that others can be computed."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._held = [(parameter, parameter.grad) for parameter in parameters]
        for parameter, _ in self._held:
            parameter.grad = None

    def put_back(self) -> None:
        for parameter, gradient in self._held:
            parameter.grad = gradient


def device_kind(device: torch.device) -> str:
    """Devices with the same kind, given the same work, choose the same kernels."""
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"cpu {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    module = torch.get_device_module(device)
    name = getattr(module, "get_device_name", lambda _: "")(device)
    return f"{device.type} {name}, torch {torch.__version__}"

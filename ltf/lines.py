"""What people read while a run goes on: plain lines on rank 0, the same on a terminal and in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ltf.config.errors import ConfigError, Mistake
from ltf.events import Where
from ltf.findings import Finding, Severity
from ltf.metrics import MFU_FORMULA, Peak

_UNKNOWN = "-"


@dataclass(frozen=True)
class Start:
    """What the run is. `layout`: sizes by dimension; `token_flops`: for training, of one token."""

    run: str
    attempt: int
    first_step: int
    steps: int
    parameters: int
    active_parameters: int
    layout: Mapping[str, int]
    world: int
    device: str
    dtype: str
    samples: int
    micro: int
    seq_len: int
    token_flops: float
    peak: Peak | None


@dataclass(frozen=True)
class Progress:
    """One step's figures; None: not known, shown as `-`. Seconds, bytes and tokens are of this step alone.

    `expert_load`: tokens of the fullest expert relative to the mean, the worst layer's; `balance`: the
    balance loss. Both None for a dense model, and then without a column.
    """

    step: int
    loss: float
    norm: float | None
    lr: float
    tokens: int
    seconds: float
    mfu: float | None
    memory: int
    data_stall: float
    checkpoint_stall: float
    balance: float | None = None
    expert_load: float | None = None
    skipped: bool = False


class Lines:
    """Writes them. Between two lines of progress the rates and stalls of the steps come together."""

    def __init__(self, log_every: int, steps: int, devices: int, out: TextIO | None = None) -> None:
        """`devices`: over which tokens/s is also told for one."""
        self._out = sys.stdout if out is None else out
        self._every, self._steps, self._devices = log_every, steps, devices
        self._since: list[Progress] = []
        reconfigure = getattr(self._out, "reconfigure", None)
        if reconfigure is not None:
            # A pipe would hold lines back by the block, and lose them with the process.
            reconfigure(line_buffering=True)

    def start(self, start: Start) -> None:
        for line in banner(start):
            self.say(line)

    def progress(self, progress: Progress) -> None:
        """Call it every step; it writes at multiples of `log_every`, at the last and at skipped steps."""
        self._since.append(progress)
        if progress.step % self._every == 0 or progress.step == self._steps or progress.skipped:
            self.say(progress_line(self._since, self._steps, self._devices))
            self._since = []

    def finding(self, finding: Finding, where: Sequence[Where] = ()) -> None:
        for line in finding_lines(finding, where):
            self.say(line)

    def say(self, text: str) -> None:
        """One line; characters that would steer a terminal are shown escaped."""
        self._out.write("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) + "\n")


def banner(start: Start) -> list[str]:
    """The lines that a run begins with."""
    layout = " x ".join(f"{name} {size}" for name, size in start.layout.items() if size > 1)
    left = f"steps {start.first_step} to {start.steps}"
    if start.first_step > start.steps:
        left = f"all {start.steps} steps are done (run.steps)"
    peak = start.peak
    return [
        f"run {start.run}, attempt {start.attempt}: {left}",
        f"  model    {count(start.parameters)} parameters, {count(start.active_parameters)} active a token, "
        f"{_si(start.token_flops)}FLOP a token",
        f"  layout   {start.world} rank{'s' * (start.world != 1)}" + (f": {layout}" if layout else ""),
        f"  device   {start.device}, {start.dtype}, "
        + (f"peak {_si(peak.flops)}FLOP/s ({peak.source})" if peak else "peak unknown: no MFU"),
        f"  batch    {start.samples} samples of {start.seq_len} tokens, "
        f"{start.samples * start.seq_len} tokens a step, micro-batches of {start.micro}",
        *([f"  {MFU_FORMULA}"] if peak else []),
    ]


def progress_line(steps: Sequence[Progress], total: int, devices: int) -> str:
    """The last step's values and the rates of all; columns keep their places from line to line.

    Stalls are shares of the time; loss, norm and lr are the last step's. MFU is there where the device's peak
    is known, which is so for all steps of a run or for none.
    """
    last = steps[-1]
    seconds = sum(each.seconds for each in steps)
    rate = sum(each.tokens for each in steps) / seconds if seconds > 0 else float("nan")
    used = [each.mfu for each in steps if each.mfu is not None]
    data, checkpoint = (
        _share(sum(stalls) / seconds if seconds > 0 else 0.0)
        for stalls in ([each.data_stall for each in steps], [each.checkpoint_stall for each in steps])
    )
    parts = [
        f"step {last.step:>{len(str(total))}}/{total}",
        f"loss {last.loss:7.4f}",
        f"norm {_number(last.norm, '8.3g')}",
        f"lr {last.lr:.2e}",
        f"tok/s {count(rate):>5}" + (f" ({count(rate / devices):>5}/device)" if devices > 1 else ""),
        *([f"mfu {sum(used) / len(used):>5.1%}"] if used else []),
        f"mem {size(last.memory):>8}",
        f"stall data {data:>5} ckpt {checkpoint:>5}",
    ]
    if last.balance is not None or last.expert_load is not None:
        parts.append(f"balance {_number(last.balance, '6.3f')} load {_number(last.expert_load, '5.2f')}")
    if last.skipped:
        parts.append("SKIPPED")
    return "  ".join(parts)


def finding_lines(finding: Finding, where: Sequence[Where] = ()) -> list[str]:
    """Hard to overlook, and one line for each rank that the evidence names."""
    mark = {Severity.INFO: "---", Severity.WARNING: "!!!", Severity.ERROR: "!!!!!!"}[finding.severity]
    step = f" at step {finding.step}" if finding.step >= 0 else ""
    head = f"{mark} {finding.severity.upper()} {finding.kind}{step}: {finding.message}"
    return [head, *(f"{mark}   rank {each.rank}, node {each.node}, device {each.device}" for each in where)]


def count(number: float) -> str:
    """Three digits and a decimal suffix, as `1.23B`; `-` for what is no number."""
    if not number < float("inf"):
        return _UNKNOWN
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # What rounds up to 1000 belongs to the next suffix.
        if number >= limit * 0.9995:
            return f"{_digits(number / limit)}{suffix}"
    return _digits(number)


def size(number: int) -> str:
    """Bytes in a binary unit."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{_digits(value)} {unit}"
        value /= 1024
    return f"{_digits(value)} TiB"


class Board:
    """TensorBoard files; the same figures, every step. ConfigError when its package is missing."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                [
                    Mistake(
                        where="",
                        field="output.tensorboard",
                        found="true",
                        expected="the package `tensorboard` to be installed",
                        fix="`pip install tensorboard`, or set it to false",
                    )
                ]
            ) from error
        self._writer: Any = SummaryWriter(str(folder))

    def progress(self, progress: Progress) -> None:
        rate = progress.tokens / progress.seconds if progress.seconds > 0 else None
        for name, value in (
            ("loss", progress.loss),
            ("gradient_norm", progress.norm),
            ("lr", progress.lr),
            ("tokens_per_second", rate),
            ("mfu", progress.mfu),
            ("memory_bytes", progress.memory),
            ("stall/data_seconds", progress.data_stall),
            ("stall/checkpoint_seconds", progress.checkpoint_stall),
            ("router/balance_loss", progress.balance),
            ("router/expert_load", progress.expert_load),
        ):
            if value is not None:
                self._writer.add_scalar(name, value, progress.step)

    def close(self) -> None:
        self._writer.close()


def _share(part: float) -> str:
    """In at most five characters."""
    return f"{part:.1%}" if part < 0.9995 else f"{part:.0%}"


def _si(number: float) -> str:
    """As `count`, with the unit prefix G for a billion."""
    return count(number).replace("B", "G")


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _number(value: float | None, form: str) -> str:
    width = form.split(".", maxsplit=1)[0]
    return f"{_UNKNOWN:>{width}}" if value is None else f"{value:{form}}"

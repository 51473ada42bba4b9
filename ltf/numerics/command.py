"""``python -m ltf numerics``: is this device right, and which right combination is fastest."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from ltf.config.errors import ConfigError
from ltf.config.read import read
from ltf.config.schema import Config
from ltf.model.args import ModelArgs
from ltf.model.count import count_parameters
from ltf.numerics import candidates, shape, speed
from ltf.numerics.report import Report, json_of, text
from ltf.numerics.trial import Around, Reference, Trial, attempt

# Parameters of the model that speed is measured on, for each candidate at a time.
MOST_ON_CPU = 20_000_000
MOST_ON_ACCELERATOR = 100_000_000
MOST_TOKENS = 8192


def main(argv: Sequence[str] | None = None) -> int:
    """0: the configured combination passes. 1: it does not. 2: the request was wrong."""
    options = _parser().parse_args(argv)
    try:
        config = read(options.config, options.set)
        report = validate(
            config,
            wanted=options.candidates,
            steps=options.steps,
            rounds=options.rounds,
            device=options.device,
        )
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(json_of(report)) if options.json else text(report, details=options.details))
    return 0 if report.passed else 1


def validate(
    config: Config,
    *,
    wanted: str = "all",
    steps: int = 10,
    rounds: int = 10,
    device: str | None = None,
    around: Around | None = None,
) -> Report:
    """Try the combinations that `wanted` names (see `select`), and time those that pass.

    `rounds`: timed passes of each; 0: none are. `around`: held open while a candidate's model runs.
    ValueError: `wanted` or `device` names nothing that is there.
    """
    place = _device(device or config.run.device)
    args = shape.small(config.model)
    texts = shape.texts(config, args, steps + 1)
    documents = config.data.mask_boundaries
    everything, missing = candidates.available(args, place, documents=documents)
    own = candidates.configured(config)
    chosen = candidates.select(wanted, everything, own)
    reference = Reference(args, texts, config.optimizer, seed=config.run.seed)
    trials = [attempt(reference, candidate, place, around) for candidate in chosen]
    most = MOST_ON_CPU if place.type == "cpu" else MOST_ON_ACCELERATOR
    timed = shape.timed(config.model, most)
    if rounds:
        trials = _timed(trials, timed, config, place, rounds)
    return Report(
        _name(place),
        "cpu fp64, plain kernels",
        _shape(args),
        _shape(timed),
        steps,
        own,
        trials,
        [] if wanted == "configured" else missing,
    )


def _timed(
    trials: list[Trial], args: ModelArgs, config: Config, device: torch.device, rounds: int
) -> list[Trial]:
    passing = [trial.candidate for trial in trials if trial.passed]
    if device.type == "cpu":
        batch = shape.texts(config, args, 1)[0]
    else:
        # Few tokens would measure how fast kernels are launched.
        rows = max(1, min(config.batch.micro, MOST_TOKENS // config.data.seq_len))
        batch = shape.texts(config, args, 1, rows=rows, longest=MOST_TOKENS)[0]
    taken = speed.measure(args, passing, batch, device, rounds)
    return [replace(trial, milliseconds=taken.get(trial.candidate.name)) for trial in trials]


def _device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch built without CUDA asserts.
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"run.device: found {name!r}, expected a device that torch has here ({why})"
        ) from error
    return device


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    named = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return str(device) if named is None else f"{device}, {named(device)}"


def _shape(args: ModelArgs) -> str:
    moe = args.moe
    experts = "" if moe is None else f", {moe.experts} experts of {moe.expert_width}, top-{moe.top_k}"
    total = count_parameters(args).total
    return (
        f"{args.layers} layers of {args.width}, {args.heads}/{args.kv_heads} heads of {args.head_dim}"
        f"{experts}, {total / 1e6:.2f}M parameters"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ltf numerics",
        description="Compare this device, its dtypes and kernels with a trusted reference by operator.",
    )
    parser.add_argument(
        "config", nargs="?", default="tiny", metavar="CONFIG", help="a file or a preset (default: tiny)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument(
        "--candidates",
        default="all",
        metavar="NAMES",
        help="all (default), configured, or names with wildcards: 'bf16/*/*/eager,fp32/math/*'",
    )
    parser.add_argument("--steps", type=_positive, default=10, help="of the optimizer (default 10)")
    parser.add_argument("--rounds", type=_whole, default=10, help="timed passes (default 10; 0: no timing)")
    parser.add_argument("--device", help="a torch device in place of run.device")
    parser.add_argument("--details", action="store_true", help="show every comparison of the configured one")
    parser.add_argument("--json", action="store_true")
    return parser


def _positive(text: str) -> int:
    if (number := _whole(text)) < 1:
        raise argparse.ArgumentTypeError("expected a whole number above 0, got '0'")
    return number


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)

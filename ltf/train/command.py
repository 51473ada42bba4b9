"""``python -m ltf train CONFIG [--set a.b=VALUE]``: one process of a run, alone or one of torchrun's."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ltf.config.errors import ConfigError
from ltf.config.read import read
from ltf.config.schema import Config


def main(argv: Sequence[str]) -> int:
    """0: all steps done. 1: failed, or stopped by a guard. 2: a wrong request. 130, 143: told to end."""
    parser = argparse.ArgumentParser(
        prog="python -m ltf train",
        description="Train a model, or go on where an earlier start of the same run was.",
        epilog="example: torchrun --nproc-per-node 8 -m ltf train run.yaml --set optimizer.lr=1e-4",
    )
    parser.add_argument("config", help="a YAML file, or the name of a preset")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, as model.layers=4",
    )
    options = parser.parse_args(argv)
    try:
        config = read(options.config, options.set)
    except ConfigError as error:
        return _refused(error)
    return train(config)


def train(config: Config) -> int:
    """Join the other ranks and train; the exit status of `main`."""
    # Before torch is imported: kernels with fixed results need it when CUDA's library starts.
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from ltf.train.process import run

    return run(config)


def _refused(error: Exception) -> int:
    """The same file is wrong for every rank: one of each node says so."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return 2

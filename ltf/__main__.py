"""``python -m ltf COMMAND``: the trainer's command line."""

from __future__ import annotations

import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module

from ltf.config.errors import ConfigError
from ltf.data.errors import DataError

COMMANDS = {
    "train": ("ltf.train.command", "train a model; under torchrun, or alone on one process"),
    "estimate": ("ltf.estimate", "parameters, memory and operations of a configuration, by arithmetic"),
    "data": ("ltf.data.command", "prepare, check and make token files"),
    "numerics": ("ltf.numerics.command", "compare this device's arithmetic with a trusted reference"),
    "checkpoint": ("ltf.checkpoint.command", "list a run's checkpoints, or read every byte of them"),
    "export": ("ltf.export", "a checkpoint as a folder that transformers loads"),
}
"""Modules whose `main(argv)` gives the exit status; imported when asked for, as most need torch."""

EXTRA = ("torch", "numpy", "safetensors", "tokenizers", "zstandard")

USAGE = """\
usage: python -m ltf COMMAND ...

commands:
{commands}

examples:
  python -m ltf data prepare books/ -o corpus/books --held-out 0.01
  python -m ltf estimate qwen3-30b-a3b --world 64
  python -m ltf numerics run.yaml --candidates configured
  torchrun --nproc-per-node 2 -m ltf train tiny --set data.sources.0.prefix=corpus/books
  python -m ltf checkpoint verify ltf-run
  python -m ltf export ltf-run exported

`python -m ltf COMMAND --help` has the options. CONFIG is a YAML file or a preset's name.

exit status:
  0    done
  1    the run failed, or a guard stopped it
  2    the request, the configuration or the data is wrong; stderr says how
  75   another run holds the output folder
  130  interrupted (Ctrl-C); training is saved first
  143  stopped by SIGTERM, after saving
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status, as the usage lists them. A bug in the program is a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else None
    if name in ("-h", "--help"):
        print(_usage(), end="")
        return 0
    if name is None:
        print(_usage(), end="", file=sys.stderr)
        return 2
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}"
        print(f"error: no command {name!r}; {advice}", file=sys.stderr)
        return 2
    try:
        command: Callable[[Sequence[str]], int] = import_module(COMMANDS[name][0]).main
        status = command(arguments[1:])
        sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        print(f"error: {name} needs {error.name}: pip install 'ltpctl[train]'", file=sys.stderr)
        return 2
    except (ConfigError, DataError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who read it has seen enough (`| head`). What is left in the buffer must not fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {meaning}" for name, (_, meaning) in COMMANDS.items())
    return USAGE.format(commands="\n".join(lines))


def _end(status: int) -> None:
    """End the process. A thread that waits in torch for a rank that is gone cannot be ended, and Python's own
    end, which lets it run into a closed interpreter, would abort (status 134 in place of ours)."""
    if any(thread.daemon for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    _end(main())

"""``python -m ltf COMMAND``: the trainer's command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """\
usage: python -m ltf COMMAND ...

commands:
  data    prepare, check and make token files
"""


def main(argv: Sequence[str] | None = None) -> int:
    """0: done. 2: the request was wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    match arguments[0] if arguments else None:
        case "data":
            from ltf.data import command as data

            return data.main(arguments[1:])
        case "-h" | "--help":
            print(USAGE, end="")
            return 0
        case None:
            print(USAGE, end="", file=sys.stderr)
        case command:
            print(f"error: no command {command!r}; expected data", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""Finds the jump host in arguments for ``ssh``, as Ansible inventories carry them."""

from __future__ import annotations

import getopt
import re
import shlex
from pathlib import Path

OPTIONS = "46AaCfGgKkMNnqsTtVvXxYyB:b:c:D:E:e:F:I:i:J:L:l:m:O:o:P:p:Q:R:S:W:w:"
"""ssh(1): a letter that takes an argument is followed by a colon."""


def jump_of(arguments: str) -> str | None:
    """The hops of ``-J``, ``-o ProxyJump=`` or of a ProxyCommand that is ``ssh -W``; None if there are none.

    Raises ValueError for arguments that ssh itself would refuse.
    """
    for flag, value in _options(shlex.split(arguments))[0]:
        if flag == "-J":
            return _hops(value)
        if flag == "-o" and (found := re.fullmatch(r"\s*(\w+)\s*[= ]\s*(.*?)\s*", value, re.DOTALL)):
            if found[1].lower() == "proxyjump":
                return _hops(found[2])
            if found[1].lower() == "proxycommand":
                return _through(shlex.split(found[2]))
    return None


def _hops(text: str) -> str:
    return "none" if text.lower() == "none" else text


def _through(command: list[str]) -> str | None:
    """The host that ``ssh -W %h:%p HOST`` goes through."""
    if not command or Path(command[0]).name != "ssh":
        return None
    options, rest = _options(command[1:])
    said = dict(options)
    if "-W" not in said or not rest:
        return None
    user = f"{said['-l']}@" if "-l" in said and "@" not in rest[0] else ""
    port = f":{said['-p']}" if "-p" in said else ""
    return f"{user}{rest[0]}{port}"


def _options(words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    try:
        return getopt.gnu_getopt(words, OPTIONS)
    except getopt.GetoptError as error:
        raise ValueError(str(error)) from None

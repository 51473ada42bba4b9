"""From configuration to the objects of the layers below."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from inventory.errors import UsageError

if TYPE_CHECKING:
    from inventory.fleet import Node
    from inventory.transport import Limits
    from inventory.transport.settings import SshSettings
    from ltpctl.settings import SshSection

_PASSWORD = re.compile(r"(://[^:/@]*:)[^@]*@")
_PARAMETER = re.compile(r"([?&](?:[^=&]*password[^=&]*|passphrase)=)[^&]*", re.IGNORECASE)


def ssh_settings(section: SshSection, accept_new: bool) -> SshSettings:
    from inventory.transport import Retry
    from inventory.transport.settings import SshSettings

    return SshSettings(
        known_hosts=_expanded(section.known_hosts),
        accept_new=accept_new or section.accept_new,
        config_files=None if section.config is None else _expanded(section.config),
        user=section.user,
        identities=_expanded(section.identity),
        retry=Retry(attempts=section.attempts),
    )


def limits(section: SshSection, command: float = 60.0) -> Limits:
    """The configured limits of the connecting phases; `command` seconds for what runs then."""
    from inventory.transport import Limits

    return Limits(
        resolve=section.resolve,
        connect=section.connect,
        banner=section.banner,
        handshake=section.handshake,
        auth=section.auth,
        command=command,
    )


def refuse_missing_keys(nodes: Iterable[Node]) -> None:
    """A private key that the inventory names and that is not there is said before any node is asked."""
    for node in nodes:
        if node.identity is not None and not Path(node.identity).expanduser().is_file():
            place = f"{node.origin}: " if node.origin else ""
            raise UsageError(f"{place}{node.name}: identity: there is no key file {node.identity}")


def without_password(value: object) -> object:
    """A setting as it may be shown: the passwords in a database URL are masked."""
    if not isinstance(value, str) or "://" not in value:
        return value
    return _PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1***@", value))


def _expanded(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(Path(name).expanduser()) for name in names)

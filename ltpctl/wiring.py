"""From configuration to the objects of the layers below."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inventory.transport import Limits
    from inventory.transport.settings import SshSettings
    from ltpctl.settings import SshSection

_PASSWORD = re.compile(r"(://[^:/@]*:)[^@]*@")


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


def without_password(value: object) -> object:
    """A setting as it may be shown: the password of a database URL is masked."""
    return _PASSWORD.sub(r"\1***@", value) if isinstance(value, str) else value


def _expanded(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(Path(name).expanduser()) for name in names)

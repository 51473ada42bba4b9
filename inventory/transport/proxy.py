"""ssh_config's ProxyCommand: a program whose stdin and stdout are the connection."""

from __future__ import annotations

import asyncio
import socket

from inventory.transport import Ending, Phase
from inventory.transport.phases import PhaseClock, PhaseError


async def open_proxy(command: tuple[str, ...], clock: PhaseClock) -> socket.socket:
    """Our end of a socket pair whose other end is the program's; the program ends when we close ours.

    Raises PhaseError when the program cannot be started.
    """
    clock.enter(Phase.CONNECT)
    ours, theirs = socket.socketpair()
    try:
        await asyncio.create_subprocess_exec(
            *command, stdin=theirs.fileno(), stdout=theirs.fileno(), start_new_session=True
        )
    except OSError as error:
        ours.close()
        message = f"ProxyCommand {command[0]} cannot be started: {error.strerror}"
        raise PhaseError(Ending.FAILED, Phase.CONNECT, message) from error
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    ours.setblocking(False)
    return ours

"""Why a node did not answer everything: from how its command ended to one line for a person. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from inventory.transport import Ending, Outcome, Phase

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit statuses of a shell that cannot start a program (POSIX, Shell Command Language, 2.8.2)."""

AGENT_LINE = "ltp agent: "
"""What the agent begins its complaints on stderr with."""

SHOWN = 200
"""Characters of a node's own words that a message repeats."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why not everything was answered."""

    check: str
    """The finding's check: ``transport.PHASE``, ``agent.start``, ``agent.run``."""
    message: str
    timeout: bool = False
    action: str = ""


INTERRUPTED = Failure("transport.interrupted", "interrupted before it had answered")


def failure_of(ended: Outcome, *, python: str, greeted: bool, done: bool, flooded: bool) -> Failure | None:
    """What kept the node from answering everything, or None if nothing did.

    `greeted`: the agent's first words came; `done`: its last ones; `flooded`: it printed more than is read.
    """
    if flooded:
        return Failure(
            "transport.output",
            "printed more than is read of one node and was cut off",
            action="See what prints on a login without a terminal (profile scripts, banners in a loop).",
        )
    if ended.ending is Ending.CANCELLED:
        return INTERRUPTED
    if not ended.reached:
        return Failure(
            f"transport.{ended.phase.value}",
            ended.message or f"{ended.ending.value} in phase {ended.phase.value}",
            timeout=ended.ending is Ending.TIMEOUT,
            action=_ACTIONS.get(ended.phase, ""),
        )
    if ended.ending is not Ending.EXIT:
        return Failure(
            f"transport.{ended.phase.value}",
            ended.message or f"the agent's command ended by {ended.ending.value}",
            timeout=ended.ending is Ending.TIMEOUT,
            action=_ACTIONS.get(ended.phase, ""),
        )
    if done:
        return None
    if greeted:
        return Failure("agent.run", f"the agent ended early with status {ended.status}{_words(ended)}")
    return _not_started(ended, python)


_ACTIONS = {
    Phase.RESOLVE: "Correct the node's address in the inventory, or the name service.",
    Phase.CONNECT: "See whether the machine is up and the port right and open; its BMC answers if it is off.",
    Phase.BANNER: "Something accepts connections but is no SSH server that answers: the machine may hang.",
    Phase.KEY_EXCHANGE: "Compare the algorithms of both sides; the machine may hang.",
    Phase.HOST_KEY: "A new machine: compare the fingerprint, then --accept-new. A reinstalled one: correct "
    "known_hosts. Neither: somebody else answers.",
    Phase.AUTH: "Check user, key and agent: ssh to the node with the same settings.",
    Phase.EXEC: "The node lets in but starts no command: see its process limit, disk and login shell.",
    Phase.COMMAND: "The node may hang: see its console.",
}


def _not_started(ended: Outcome, python: str) -> Failure:
    action = "Install Python 3.8 or newer on the node, or name its interpreter as 'python' in the inventory."
    if ended.status == NOT_FOUND:
        return Failure("agent.start", f"there is no {python} on the node{_words(ended)}", action=action)
    if ended.status == NOT_EXECUTABLE:
        return Failure(
            "agent.start", f"{python} cannot be executed on the node{_words(ended)}", action=action
        )
    said = _line(ended.stderr)
    if said.startswith(AGENT_LINE):
        return Failure("agent.start", said.removeprefix(AGENT_LINE), action=action)
    return Failure(
        "agent.start",
        f"{python} did not start the agent (exit status {ended.status}){_words(ended)}",
        action="See what the login prints and runs: a forced command or a login shell that refuses work.",
    )


def _words(ended: Outcome) -> str:
    said = _line(ended.stderr) or _line(ended.stdout)
    return f": {said}" if said else ""


def _line(output: bytes) -> str:
    """The last line that was printed, made safe to show."""
    for line in reversed(output[-4096:].decode("utf-8", "replace").splitlines()):
        text = "".join(c if c.isprintable() else "�" for c in line).strip()
        if text:
            return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
    return ""


def clock_offset(sent: float, arrived: float, started: float) -> float:
    """Seconds by which a node's clock is surely off, positive when it is ahead; 0 when the path explains it.

    `sent` is the node's time when it spoke; by our clock that was after `started` and before `arrived`.
    """
    ahead, behind = sent - arrived, sent - min(started or arrived, arrived)
    if ahead > 0:
        return ahead
    return min(behind, 0.0)

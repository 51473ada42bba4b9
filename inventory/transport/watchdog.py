"""What guards a plain command on the node, so that nothing of it outlives the connection.

The login shell of the node sees one constant line, `LOGIN_LINE`, free of anything that sh, bash, zsh, csh
and fish read differently. It becomes ``/bin/sh``, which takes the first line of its stdin as the script to
run; a line that was cut off by a dying connection is not run. That script, made by `opening`, starts the
watchdog and then *becomes* the command, so the SSH server reports the command's own exit status or signal.

The watchdog is a shell in a session of its own. It holds the connection's stdin and kills the command's
process group (the SSH server makes every command the leader of one), first with TERM, then with KILL,

- when stdin ends: the controller hung up, was killed, or the SSH server died;
- when no line has arrived for a *lease*: the controller renews it while it waits. This is what ends a command
  behind a cable that was cut, which the SSH server may not notice for hours.

Processes that left the group (daemons with their own session) are found by an environment variable that they
have inherited, and killed with it. Out of reach: a process that cleared its environment *and* left the
group, one of another user (started with sudo), one stuck in the kernel.

When the command ends by itself, what it left in its process group gets the output limit's seconds to
finish and is then killed; a daemon in its own session is left alone, since the command meant it to stay.
"""

from __future__ import annotations

import math
import shlex

from inventory.errors import UsageError
from inventory.transport import Command

LOGIN_LINE = 'exec /bin/sh -c \'IFS= read -r s && test "$s" || exit 125; eval "$s"\''
"""What the SSH server is asked to run. Where the start-up files of a login read the script away, what comes
next is an empty line, a renewal of the lease: that must not end as a success."""

MARK = "LTPCTL_RUN"
"""Environment variable of everything that a guarded command starts; its value is the run's nonce."""

LEASE = 60.0
"""Seconds that a guarded command may run without a word from the controller."""

RENEWAL = 20.0
"""Seconds between two words of the controller; the first is sent that long after the start."""

HEARTBEAT = b"\n"


def opening(command: Command, nonce: str, lease: float = LEASE) -> bytes:
    """What to write to the stdin of `LOGIN_LINE`: the script's line, then the command's own input.

    `nonce` is hexadecimal. A command with input is a child of the shell and not the shell itself, so
    the shell's convention for signals (status 128 + number) is all that remains of a signal. Raises
    UsageError for an argument vector that no system could pass on.
    """
    if not command.argv or any("\0" in word for word in command.argv):
        raise UsageError(f"not a command: {command.argv!r}: it is empty or has a NUL byte in it")
    run = "exec " + " ".join(shlex.quote(word) for word in command.argv)
    if command.self_watching:
        return _line(run) + command.stdin
    seconds = math.ceil(min(lease, command.limits.command + 5))
    grace = math.ceil(min(command.limits.output, LEASE))
    arguments = f"$$ {nonce} {seconds} {grace} {len(command.stdin)}"
    watch = f"{_SESSION}$d /bin/sh -c {shlex.quote(_WATCHDOG)} ltpctl-watchdog {arguments}"
    run = f"export {MARK}={nonce}; {run}"
    if not command.stdin:
        return _line(f"exec 3<&0; ( {watch} <&3 3<&- >/dev/null 2>&1 & ); {run} </dev/null 3<&-")
    return _line(f"exec 3<&0; {{ {watch} <&3 3<&- 2>/dev/null & }} | {{ exec 3<&-; {run}; }}") + command.stdin


_SESSION = "d=setsid; command -v setsid >/dev/null 2>&1 || d=; "

# Arguments: process group, nonce, lease and grace in seconds, bytes of input to hand to the command.
# The watchdog is started from a subshell that ends at once: the command must not find a child that it
# never started, and wait for it. TERM alone does not reach a stopped process: hence CONT. A signal to a
# shell that is just starting `sleep` can be lost on the way, so at its end the watchdog kills its own
# process group, itself included; the command's group comes before that, since without setsid(1) the two
# are the same.
_WATCHDOG = " ".join(
    line.strip()
    for line in f"""
    g=$1 n=$2 l=$3 o=$4;
    up() {{ kill -0 "$g" 2>/dev/null || kill -0 "-$g" 2>/dev/null; }};
    marked() {{ grep -l "{MARK}=$n" /proc/[0-9]*/environ 2>/dev/null |
        while IFS=/ read -r a b p c; do kill -KILL "$p" 2>/dev/null; done; }};
    end() {{ trap "" TERM HUP INT;
        kill -TERM "-$g" 2>/dev/null || kill -TERM "$g" 2>/dev/null; kill -CONT "-$g" 2>/dev/null;
        sleep 0.2 2>/dev/null || sleep 1;
        i=0; while up && [ "$i" -lt 2 ]; do sleep 1; i=$((i+1)); done;
        marked; kill -KILL "$g" 2>/dev/null; kill -KILL "-$g" 2>/dev/null; marked; kill -KILL 0; }};
    arm() {{ ( trap "kill \\$! 2>/dev/null; exit 0" TERM; sleep "$l" & wait "$!"; end ) >/dev/null & t=$!; }};
    disarm() {{ kill -TERM "$t" 2>/dev/null; wait "$t" 2>/dev/null; }};
    arm;
    if [ "$5" -gt 0 ]; then head -c "$5"; fi;
    exec >/dev/null;
    while read -r x; do disarm; arm; done;
    disarm;
    if kill -0 "$g" 2>/dev/null; then end; fi;
    i=0; while kill -0 "-$g" 2>/dev/null; do
        if [ "$i" -ge "$o" ]; then kill -KILL "-$g" 2>/dev/null; break; fi; sleep 1; i=$((i+1)); done;
    kill -KILL 0
    """.strip().splitlines()
)


def _line(script: str) -> bytes:
    """One line: a newline inside an argument is spelled as a variable between two quoted parts."""
    if "\n" in script:
        script = 'nl=$(printf "\\nx"); nl=${nl%x}; ' + script.replace("\n", "'\"$nl\"'")
    return script.encode("utf-8", "surrogateescape") + b"\n"

"""Commands with limits, and the certain end of everything they started.

Every process of the agent that starts others is a *subreaper*: descendants that detach themselves (double
fork, setsid) come back to it instead of to init, so "no children left" means "nothing left". Where prctl
is not to be had (no ctypes), process groups are what remains.
"""

import contextlib
import os
import resource
import select
import signal
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

from probes.agent.api import Ran, TimedOut, Unsupported
from probes.agent.host import VENDOR_FOLDERS

OUT_BYTES, ERR_BYTES = 8 << 20, 256 << 10
"""Most that a command may print. More of stdout is an error, more of stderr is dropped."""

PATIENCE = 0.5
"""Seconds that a killed process gets to vanish; one in an uninterruptible wait does not."""

LIBRARY_FOLDERS = (
    "/usr/local/nvidia/lib64", "/usr/local/Ascend/driver/lib64", "/usr/local/Ascend/driver/lib64/driver",
    "/usr/local/Ascend/driver/lib64/common",
)  # fmt: skip
"""Where vendors' tools look for their libraries only when a profile script has told them."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

_libc: Any = None
try:
    import ctypes

    _libc = ctypes.CDLL(None)
    getattr(_libc, "prctl")  # noqa: B009
except (ImportError, OSError, AttributeError):
    _libc = None


def become_subreaper() -> bool:
    """Descendants that lose their parent become ours. False where the system cannot."""
    return _libc is not None and _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def die_with_parent(parent: int, sig: int = signal.SIGKILL) -> None:
    """After a fork: get `sig` when the parent dies; at once if it already has."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), sig)


def default_signals() -> None:
    """Undo in a child what Python and the agent set up for themselves."""
    signal.set_wakeup_fd(-1)
    for sig in ("SIGPIPE", "SIGXFSZ", "SIGTERM", "SIGHUP", "SIGINT", "SIGCHLD"):
        signal.signal(getattr(signal, sig), signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def environment(nonce: str) -> Dict[str, str]:
    """For commands: the login's own, with vendor folders, in plain English, leaving no bytecode behind."""
    env = {
        k: v for k, v in os.environ.items() if not k.startswith("LC_") and k not in ("LANGUAGE", "PYTHONHOME")
    }
    path = [f for f in env.get("PATH", "").split(":") if f.startswith("/")]
    libraries = [f for f in env.get("LD_LIBRARY_PATH", "").split(":") if f]
    libraries += [f for f in LIBRARY_FOLDERS if f not in libraries and os.path.isdir(f)]
    env.update(
        PATH=":".join(path + [f for f in VENDOR_FOLDERS if f not in path]),
        LC_ALL="C", LANG="C", TERM="dumb", PAGER="cat", SYSTEMD_COLORS="0", PYTHONDONTWRITEBYTECODE="1",
        LTP_AGENT=nonce,
    )  # fmt: skip
    if libraries:
        env["LD_LIBRARY_PATH"] = ":".join(libraries)
    return env


def run(argv: Sequence[str], seconds: float, env: Dict[str, str]) -> Ran:
    """Run a program (its full path first) with empty input, in a session of its own.

    Raises TimedOut, Unsupported if it cannot be started, ValueError if it prints more than OUT_BYTES.
    Whatever still runs in its session when it ends, or when the limit passes, is killed.
    """
    deadline = time.monotonic() + seconds
    pid, out, err = _start(argv, env)
    chunks: Dict[int, List[bytes]] = {out: [], err: []}
    room = {out: OUT_BYTES, err: ERR_BYTES}
    poll = select.poll()
    poll.register(out, select.POLLIN)
    poll.register(err, select.POLLIN)
    open_pipes, gone_since, pause, flooded = {out, err}, None, 0.001, False
    try:
        while not flooded:
            now = time.monotonic()
            if gone_since is None and _has_ended(pid):
                gone_since = now
            # A daemon that kept the pipes must not keep us: what the command itself wrote is already in them.
            if gone_since is not None and (not open_pipes or now > gone_since + 0.1):
                break
            if now >= deadline:
                raise TimedOut("%s did not end within %.3g s" % (shown(argv), seconds))
            ready = poll.poll(1000 * min(deadline - now, pause))
            pause = 0.001 if ready else min(pause * 2, 0.05)
            for pipe, _ in ready:
                data = os.read(pipe, 65536)
                if not data:
                    poll.unregister(pipe)
                    open_pipes.discard(pipe)
                    continue
                chunks[pipe].append(data[: max(room[pipe], 0)])
                room[pipe] -= len(data)
                flooded = pipe == out and room[pipe] < 0
    finally:
        os.close(out)
        os.close(err)
        status = _finish(pid)
    if flooded:
        raise ValueError("%s printed more than %d MiB" % (shown(argv), OUT_BYTES >> 20))
    text = [b"".join(chunks[pipe]).decode("utf-8", "replace") for pipe in (out, err)]
    return Ran(status, text[0], text[1])


def shown(argv: Sequence[str]) -> str:
    """A command as a person would type it, the program without its folder, capped."""
    text = " ".join([os.path.basename(argv[0]), *argv[1:]])
    return "'%s'" % (text if len(text) <= 120 else text[:117] + "...")


def _start(argv: Sequence[str], env: Dict[str, str]) -> Tuple[int, int, int]:
    out, out_w = os.pipe()
    err, err_w = os.pipe()
    trouble, trouble_w = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            die_with_parent(parent)
            default_signals()
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.dup2(out_w, 1)
            os.dup2(err_w, 2)
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            if soft != hard:  # The worker's own ceiling; vendors' tools map far more than they use.
                resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            os.execve(argv[0], list(argv), env)
        except OSError as error:
            os.write(trouble_w, (error.strerror or "").encode())
        finally:
            os._exit(127)
    for pipe in (out_w, err_w, trouble_w):
        os.close(pipe)
    # Ends with exec (the pipe closes itself) or with the reason.
    reason = os.read(trouble, 200)
    os.close(trouble)
    if reason:
        os.waitpid(pid, 0)
        os.close(out)
        os.close(err)
        raise Unsupported("%s cannot be started: %s" % (argv[0], reason.decode("utf-8", "replace")))
    return pid, out, err


def _has_ended(pid: int) -> bool:
    """Without collecting it: until then its number, which is its session's too, is not given to another."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _finish(pid: int) -> int:
    """Kill the whole session of a command and collect it; its exit status, negative for a signal."""
    send(-pid, signal.SIGKILL)
    end, pause = time.monotonic() + PATIENCE, 0.001
    while time.monotonic() < end:
        try:
            done, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return -signal.SIGKILL
        if done:
            return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return -signal.SIGKILL


def send(pid: int, sig: int) -> bool:
    """A signal to a process, or by a negative number to a group; False if it is gone or not ours."""
    try:
        os.kill(pid, sig)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def kill_tree(root: int) -> None:
    """Kill a child and all below it. What escapes by forking meanwhile comes back as our own child."""
    send(root, signal.SIGSTOP)
    for pid in descendants(root):
        send(pid, signal.SIGKILL)
    send(root, signal.SIGKILL)


def clear(patience: float = PATIENCE) -> bool:
    """Kill and collect all that is below this process. False if something survives for `patience` seconds."""
    end, pause = time.monotonic() + patience, 0.0005
    while True:
        if reap() is None:
            return True
        for pid in descendants(os.getpid()):
            send(pid, signal.SIGKILL)
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def reap() -> Optional[Dict[int, int]]:
    """Collect the dead children: number -> wait status. None without any: then nothing is below us."""
    dead: Dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return dead or None
        if pid == 0:
            return dead
        dead[pid] = status


def reap_one(pid: int) -> None:
    # A grandchild is its parent's to collect, and ours only after that one's end.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def descendants(of: int, spare: Sequence[int] = ()) -> List[int]:
    """Processes below `of`, parents first, without the children in `spare` and what is below those."""
    table: Optional[Dict[int, List[int]]] = None
    found: List[int] = []
    queue = [of]
    while queue:
        pid = queue.pop()
        children = _children(pid) if table is None else table.get(pid, [])
        if children is None:  # A kernel without CONFIG_PROC_CHILDREN.
            table = _process_table()
            children = table.get(pid, [])
        fresh = [c for c in children if c not in spare]
        found += fresh
        queue += fresh
    return found


def _children(pid: int) -> Optional[List[int]]:
    try:
        tasks = os.listdir("/proc/%d/task" % pid)
    except OSError:
        return []
    found: List[int] = []
    for task in tasks:
        try:
            with open("/proc/%d/task/%s/children" % (pid, task)) as file:
                found += [int(word) for word in file.read().split()]
        except FileNotFoundError:
            if os.path.exists("/proc/%d/task/%s" % (pid, task)):
                return None
        except OSError:
            continue
    return found


def _process_table() -> Dict[int, List[int]]:
    table: Dict[int, List[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/%s/stat" % name, errors="replace") as file:
                    # The command's name, in parentheses, may hold anything.
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            table.setdefault(parent, []).append(int(name))
    return table

"""Checks that go wrong in every way known; the tests send them as ``probes.checks.misbehaving``."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

from probes.agent.api import Measure, TimedOut, Unsupported


def fine(host):
    yield Measure("answer", 42)
    yield Measure("temperature", 41.5, "0")
    yield Measure("model", "X-1", "0")


def identity(host):
    yield Measure("pid", os.getpid())
    yield Measure("lane_parent", os.getppid())


def hangs_in_python(host):
    host.note("about to hang")
    while True:
        time.sleep(3600)


def hangs_with_signals_blocked(host):
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
    ctypes.CDLL(None).pause() if host.params.get("in_c") else hangs_in_python(host)


def hangs_in_a_command(host):
    host.run(["sleep", "3601"], timeout=3600)
    yield Measure("never", 1)


def asks_for_the_same_command(host):
    host.run(["sleep", "3601"], timeout=3600)
    yield Measure("never", 1)


def command_ignores_term(host):
    host.run(["sh", "-c", "trap '' TERM HUP INT; sleep 3602 & sleep 3602"], timeout=3600)
    yield Measure("never", 1)


def leaves_a_daemon(host):
    """Forked twice, its own session, holds the pipes: what a careless vendor's tool does."""
    host.run(["sh", "-c", "setsid sh -c 'sleep 3603 & sleep 3603' & exit 0"])
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3604)
        os._exit(0)
    yield Measure("answer", 1)


def leaves_a_daemon_and_hangs(host):
    for _ in leaves_a_daemon(host):
        hangs_in_python(host)
    yield Measure("never", 1)


def shouts(host):
    sys.stdout.write("noise on stdout\n" * 20000)
    sys.stdout.flush()
    os.write(1, b'\x1eltp1 0000000000000000 {"done":true,"seconds":0}\n')
    sys.stderr.write("noise on stderr\n")
    yield Measure("answer", 1)


def closes_stdout(host):
    sys.stdout.close()
    os.closerange(0, 3)
    yield Measure("answer", 1)


def closes_everything(host):
    os.closerange(0, 256)
    hangs_in_python(host)


def leaves_the_process(host):
    sys.stderr.write("a library says goodbye\n")
    os._exit(3)


def dies_by_a_signal(host):
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def forks_and_both_come_back(host):
    os.fork()
    yield Measure("answer", 1)


def asks_to_exit(host):
    sys.exit(0)


def eats_memory(host):
    kept = []
    while True:
        kept.append(bytes(64 << 20))  # Zeroed by the kernel when touched, which nobody does: fast.


def floods(host):
    host.run(["sh", "-c", "yes 0123456789012345678901234567890123456789"])
    yield Measure("never", 1)


def breaks(host):
    yield Measure("answer", 1)
    yield Measure("answer", {}["absent"])


def does_not_understand(host):
    raise ValueError("expected a table, found a poem")


def lacks_its_tool(host):
    host.run(["no-such-program-anywhere"])


def lacks_a_file(host):
    host.read("/no/such/file")


def says_unsupported(host):
    raise Unsupported("no such device")


def says_timed_out(host):
    raise TimedOut("'tool' hung")


def fails_by_status(host):
    host.run(["sh", "-c", "echo some output; echo the reason >&2; exit 9"])


def measures_nothing(host):
    return []


def measures_without_end(host):
    while True:
        yield Measure("answer", 1)


def measures_too_much_text(host):
    for n in range(4000):
        yield Measure("text", "x" * 3000, str(n))


def is_not_finite(host):
    yield Measure("ratio", float("nan"), "0")
    yield Measure("rate", float("-inf"))
    yield Measure("answer", 1)


def measures_a_list(host):
    yield Measure("answer", [1, 2])


def is_not_a_measure(host):
    yield 7


def prints_broken_text(host):
    ran = host.run(["printf", r"caf\351 \377\n"])
    host.note(ran.out)
    yield Measure("text", ran.out.strip())
    yield Measure("surrogate", "\udce9")
    yield Measure("escape", "\x1b[31mred\x1b]0;title\x07")


def environment(host):
    ran = host.run(["env"])
    for line in ran.out.splitlines():
        key, _, value = line.partition("=")
        if key in ("LC_ALL", "LANG", "PATH", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE"):
            yield Measure(key.lower(), value)
    yield Measure("cwd", os.getcwd())
    yield Measure("command_input", len(host.run(["cat"]).out))


def python_path(host):
    yield Measure("last", sys.path[-1])
    yield Measure("first_is_standard", "python3" in sys.path[0])


def counts_runs(host):
    """Asks twice for the same command; the command's own pid tells whether it ran twice."""
    first = host.run(["sh", "-c", "echo $$"]).out
    second = host.run(["sh", "-c", "echo $$"]).out
    yield Measure("same", first == second)
    yield Measure("pid", int(first))


def sleeps(host):
    started = time.time()
    time.sleep(host.params["seconds"])
    yield Measure("began", started)
    yield Measure("ended", time.time())


def crashes_on_core(host):
    host.run(["sh", "-c", "ulimit -c; kill -SEGV $$"], ok=())
    yield Measure("limit", host.run(["sh", "-c", "ulimit -c"]).out.strip())


def leaves_a_thread(host):
    threading.Thread(target=time.sleep, args=(3600,)).start()
    yield Measure("answer", 1)


def grows(host):
    """A counter in a file, which `loads` below raises."""
    yield Measure("errors", int(host.read(host.params["file"])), "0")
    yield Measure("errors", 5, "1")
    yield Measure("temperature", float(host.read(host.params["file"])), "0")


def grows_but_is_refused(host):
    raise ValueError("the tool printed\nnonsense")


def loads(host):
    with open(host.params["file"], "r+") as file:
        value = int(file.read()) + 3
        file.seek(0)
        file.write(str(value))
    time.sleep(host.params.get("seconds", 0))
    yield Measure("rate", 1.5)


def loads_and_resets(host):
    with open(host.params["file"], "w") as file:
        file.write("2")
    yield Measure("rate", 1.5)


def loads_and_loses(host):
    os.unlink(host.params["file"])
    yield Measure("rate", 1.5)


def runs_python_tool(host):
    """A vendor's tool written in Python, beside its own module: must not leave __pycache__."""
    yield Measure("answer", int(host.run([sys.executable, host.params["tool"]]).out))


def own_subprocess(host):
    subprocess.Popen(["sleep", "3605"])
    yield Measure("answer", 1)


def large_answer(host):
    for n in range(50):
        yield Measure("text", "x" * 3000, str(n))

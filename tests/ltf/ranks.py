"""Run a function on several real ranks: processes that find each other as torchrun's would.

The processes stay for the next call, since importing torch costs them seconds each; what a call leaves behind
in a process (process group, environment, signal handlers, torch's settings) is put back. One that fails,
hangs or dies is replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

MOST_THREADS = 300


class RankFailed(AssertionError):
    """A rank raised, died or did not finish; the message holds the tracebacks there are."""


def run(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 90.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Results of the module-level `function(*args)` by rank, called in `world` processes at once.

    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, one thread a process;
    `environment` is added to the caller's. Joining torch.distributed is left to the function. Arguments and
    results are pickled. RankFailed if a rank raises, or if all are not done in `timeout` seconds.
    """
    workers = _POOL.take(world)
    port = free_port()
    for rank, worker in enumerate(workers):
        launch = {
            **os.environ,
            **(environment or {}),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        worker.send(_Call(function, args, launch, os.getcwd(), list(sys.path)))
    try:
        results = _collect(workers, timeout)
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    _POOL.give_back(workers)
    return results


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    environment: Mapping[str, str]
    folder: str
    path: Sequence[str]


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self.connection: Connection[Any, Any] = here
        handle, name = tempfile.mkstemp(prefix="rank-stack-")
        os.close(handle)
        self.stack = Path(name)
        self.process: BaseProcess = context.Process(target=_serve, args=(there, name), daemon=True)
        with _one_thread():
            self.process.start()
        there.close()

    def send(self, call: _Call) -> None:
        # The path goes first and by itself: the function's module may be found only through it.
        self.connection.send_bytes(pickle.dumps((call.path, call.folder, dict(call.environment))))
        self.connection.send_bytes(pickle.dumps((call.function, call.args)))

    def threads(self) -> int:
        return psutil.Process(self.process.pid).num_threads() if self.process.is_alive() else 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.stack.unlink(missing_ok=True)

    def where_it_hangs(self) -> str:
        """Every thread's stack at this moment; ends the process."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGABRT)
            self.process.join(5)
        return self.stack.read_text()


class _Pool:
    def __init__(self) -> None:
        self.idle: list[_Worker] = []
        self.owner = os.getpid()

    def take(self, count: int) -> list[_Worker]:
        alive = [worker for worker in self.idle if worker.process.is_alive()]
        self.idle = alive[count:]
        return alive[:count] + [_Worker() for _ in range(count - len(alive))]

    def give_back(self, workers: list[_Worker]) -> None:
        self.idle = workers + self.idle
        # Process groups leave threads behind, some sixty a training run. All workers go together: torch
        # caches what follows from a process's rank, so one must not become another.
        if any(worker.threads() > MOST_THREADS for worker in workers):
            self.close()

    def close(self) -> None:
        if os.getpid() == self.owner:
            for worker in self.idle:
                worker.kill()
            self.idle = []


_POOL = _Pool()
atexit.register(_POOL.close)


def _collect(workers: list[_Worker], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    by_connection = {worker.connection: rank for rank, worker in enumerate(workers)}
    while len(results) + len(failures) < len(workers):
        open_ones = [c for c, rank in by_connection.items() if rank not in results and rank not in failures]
        # After the first failure the others most likely wait for it in vain: a moment to fail by themselves.
        left = min(deadline - time.monotonic(), 2.0 if failures else timeout)
        ready = wait(open_ones, max(0.0, left))
        if not ready:
            if not failures:
                stacks = [
                    f"rank {by_connection[c]}:\n{workers[by_connection[c]].where_it_hangs()}"
                    for c in open_ones
                ]
                raise RankFailed(f"not done after {timeout:g} s:\n" + "\n".join(stacks))
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = by_connection[connection]
            try:
                ok, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                workers[rank].process.join(5)
                ok, value = False, f"died with exit code {workers[rank].process.exitcode}"
            (results if ok else failures)[rank] = value
    if failures:
        raise RankFailed("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
    return [results[rank] for rank in range(len(workers))]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(connection: Connection[Any, Any], stack: str) -> None:
    """A worker's life: calls until the other side closes."""
    import faulthandler

    faulthandler.enable(Path(stack).open("w"))  # noqa: SIM115  (open as long as the process)
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            path, folder, environment = pickle.loads(connection.recv_bytes())
            function_and_args = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(_answer(path, folder, environment, function_and_args)))


def _answer(
    path: list[str], folder: str, environment: dict[str, str], function_and_args: bytes
) -> tuple[bool, Any]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    sys.path[:] = path
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    try:
        function, args = pickle.loads(function_and_args)
        result = function(*args)
        pickle.dumps(result)
        return True, result
    except BaseException:  # noqa: BLE001  (a SystemExit too must reach the test, as text)
        return False, traceback.format_exc()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _leave_torch_as_found()


def _leave_torch_as_found() -> None:
    import gc

    import torch
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.enable()
    gc.collect()

"""The agent: runs a request on the node and writes frames until it is done, or the controller is gone.

Two processes: the *guard*, which sshd started, waits for the *agent* below it. Whichever is killed, the
other ends all that was started.
"""

import gc
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any, Dict, Iterator, List, NoReturn, Optional

from probes.agent import process, record, vendors
from probes.agent.host import Machine
from probes.agent.lanes import Lane, absent
from probes.agent.watch import Watch

PARALLEL_LANES = 4
FLUSH_SECONDS = 5.0
"""After the budget has passed: how long a slow reader may take for what is still to be written."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def main(nonce: str, request: Dict[str, Any]) -> NoReturn:
    # A collection in one of the processes to come would copy every page that they share.
    gc.freeze()
    os.chdir("/")
    # 1: neither a file, nor (as 0 would) a dump piped to the system's collector. man 5 core.
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))
    process.become_subreaper()
    guard = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            process.die_with_parent(guard, signal.SIGTERM)
            process.become_subreaper()
            status = Agent(nonce, request).run()
        except BaseException:
            sys.__excepthook__(*sys.exc_info())
        finally:
            process.clear()
            os._exit(status)
    for sig in STOP_SIGNALS:
        signal.signal(sig, lambda number, frame: process.send(pid, number) and None)
    ended = 0
    while ended != pid:
        ended, how = os.waitpid(-1, 0)
    process.clear()
    if os.WIFSIGNALED(how):
        sys.stderr.write("ltp agent: killed by signal %d\n" % os.WTERMSIG(how))
        os._exit(128 + os.WTERMSIG(how))
    os._exit(os.WEXITSTATUS(how))


class Agent:
    def __init__(self, nonce: str, request: Dict[str, Any]) -> None:
        self.nonce, self.request = nonce, request
        self.started = time.monotonic()
        self.end = self.started + float(request["budget"])
        self.present = vendors.present(Machine())
        self.watch = Watch(request["watch"]) if request.get("watch") else None
        self._out = bytearray()
        self._head = b"\x1eltp1 " + nonce.encode("ascii") + b" "
        self._stop = 0
        self._lanes: List[Lane] = []
        self._waiting: List[Lane] = []
        self._all: List[Lane] = []
        self._loading = ""
        self._load_started = self._next_sample = 0.0
        self._loader: Optional[Lane] = None
        self._orphans_pause = 0.0

    def run(self) -> int:
        """Exit status: 0 when everything was answered and written (late, if the budget ended it)."""
        wake, wake_w = os.pipe()
        os.set_blocking(wake_w, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        for sig in STOP_SIGNALS:
            signal.signal(sig, self._signalled)
        self._own = [wake, wake_w, 1]
        self._emit(record.encode({"hello": self._hello()}))
        stages: Optional[Iterator[List[Lane]]] = self._stages()
        while True:
            now = time.monotonic()
            if self._stop:
                return 128 + self._stop
            if now > self.end + FLUSH_SECONDS:
                sys.stderr.write("ltp agent: the output could not be written in time\n")
                return 75
            if stages is not None and now >= self.end:
                self._give_up("the budget of %.6g s is spent" % float(self.request["budget"]))
                self._finished()
                stages = None
            for lane in self._lanes:
                lane.expire(now)
            self._begin_sample(now)
            self._admit(now)
            while stages is not None and not self._lanes:
                lanes = next(stages, None)
                if lanes is None:
                    self._finished()
                    stages = None
                    break
                self._waiting = lanes
                self._admit(now)
            if stages is None and not self._out:
                return 0
            if not self._wait(wake, now):
                return 1

    def _admit(self, now: float) -> None:
        """Let waiting lanes begin, running ones go on, and forget those that are through."""
        while True:
            while self._waiting and len(self._lanes) < PARALLEL_LANES:
                self._lanes.append(self._waiting.pop(0))
            for lane in self._lanes:
                lane.advance(now, self._not_for_workers)
            self._lanes = [lane for lane in self._lanes if not lane.idle]
            if not self._waiting or len(self._lanes) >= PARALLEL_LANES:
                return

    def _stages(self) -> Iterator[List[Lane]]:
        """Sets of lanes, each begun when the one before is through: light ones, then each loading check."""
        checks: List[Dict[str, Any]] = self.request["checks"]
        yield [self._lane(e) for e in by_lane([c for c in checks if not c.get("loads")])]
        loading = by_lane([c for c in checks if c.get("loads")])
        runs = any(not absent(e, self.present) for entries in loading for e in entries)
        watch = self.watch if runs else None
        if watch:
            self._load_started = time.monotonic()
            yield self._sample(True, "")
        for entries in loading:
            lane = self._lane(entries, allowed=0)
            for entry in entries:
                lane.allowed += 1
                self._loader, self._loading = lane, str(entry["check"])
                self._next_sample = time.monotonic() + watch.every if watch and watch.every else 0.0
                yield [lane]
                self._next_sample = 0.0
                if watch and not absent(entry, self.present):
                    yield self._sample(False, self._loading)
            # Its worker may hold the accelerators' memory: gone before the next one begins.
            lane.stop("")
        if self.watch:
            self._emit(self.watch.record(time.monotonic() - self._load_started if runs else 0.0))
            self.watch = None

    def _lane(self, entries: List[Dict[str, Any]], allowed: Optional[int] = None) -> Lane:
        lane = Lane(entries, self.present, self.nonce, lambda entry, text: self._emit(text), allowed)
        self._all.append(lane)
        return lane

    def _sample(self, first: bool, when: str) -> List[Lane]:
        watch = self.watch
        assert watch is not None

        def take(entry: Dict[str, Any], text: str) -> None:
            watch.take(entry, json.loads(text), first, when)

        lanes = [Lane(e, self.present, self.nonce, take) for e in by_lane(watch.collect)]
        self._all += lanes
        return lanes

    def _begin_sample(self, now: float) -> None:
        if self._next_sample and now >= self._next_sample and self.watch and self._lanes == [self._loader]:
            self._next_sample = now + self.watch.every
            self._waiting += self._sample(False, self._loading)

    def _give_up(self, why: str) -> None:
        self._waiting = []
        for lane in self._all:
            lane.give_up(why)
        self._lanes = []
        answered = {id(e) for lane in self._all for e in lane.entries}
        for entry in self.request["checks"]:
            if id(entry) not in answered:
                self._emit(
                    absent(entry, self.present)
                    or record.ended(entry["check"], "timeout", "not begun: " + why)
                )
        if self.watch:
            self._emit(self.watch.record(time.monotonic() - self.started, aborted=why))
            self.watch = None

    def _finished(self) -> None:
        """Everything is answered: nothing may be left running when the controller hears it."""
        for lane in self._all:
            lane.stop("")
        clean = process.clear()
        self._emit(
            record.encode(
                {"done": True, "seconds": round(time.monotonic() - self.started, 6), "clean": clean}
            )
        )

    def _wait(self, wake: int, now: float) -> bool:
        """Until something happens; then deal with it. False when the controller is gone."""
        readers: Dict[int, Lane] = {}
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(wake, select.POLLIN)
        for lane in self._all:
            for descriptor in (lane.channel, lane.noise):
                if descriptor >= 0:
                    readers[descriptor] = lane
                    poll.register(descriptor, select.POLLIN)
        # Asked even with nothing to write: it also tells that the reader is gone.
        poll.register(1, select.POLLOUT if self._out else 0)
        moments = [lane.deadline for lane in self._lanes if lane.running is not None]
        moments.append(self.end if now < self.end else self.end + FLUSH_SECONDS)
        if self._next_sample:
            moments.append(self._next_sample)
        if self._orphans_pause:
            moments.append(now + self._orphans_pause)
        for descriptor, event in poll.poll(max(0.0, 1000 * (min(moments) - now)) + 1):
            if descriptor == 0:
                if not os.read(0, 65536):
                    return False
            elif descriptor == 1:
                if event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) or not self._write():
                    return False
            elif descriptor in readers and descriptor in (
                readers[descriptor].channel,
                readers[descriptor].noise,
            ):
                readers[descriptor].read(descriptor)
        self._kill_orphans()
        return True

    def _write(self) -> bool:
        # As much as a pipe that says "ready" takes without blocking, and without changing a flag of the
        # terminal or socket that others share with us.
        try:
            written = os.write(1, self._out[: select.PIPE_BUF])
        except OSError:
            return False
        del self._out[:written]
        return True

    def _kill_orphans(self) -> None:
        """Killed workers, and what came back to us when they died."""
        pids = process.descendants(os.getpid(), [lane.pid for lane in self._all if lane.pid])
        for pid in pids:
            process.send(pid, signal.SIGKILL)
            process.reap_one(pid)
        # One in an uninterruptible wait must not keep us busy.
        self._orphans_pause = min(1.0, 2 * self._orphans_pause or 0.01) if pids else 0.0

    def _not_for_workers(self) -> List[int]:
        return self._own + [d for lane in self._all for d in lane.descriptors()]

    def _signalled(self, number: int, frame: object) -> None:
        self._stop = number

    def _emit(self, text: str) -> None:
        self._out += self._head + text.encode("ascii") + b"\n"

    def _hello(self) -> Dict[str, Any]:
        system = os.uname()
        return {
            "agent": 1,
            "python": sys.version.split()[0],
            "hostname": system.nodename,
            "boot_id": Machine().read_or("/proc/sys/kernel/random/boot_id"),
            "uid": os.getuid(),
            "time": time.time(),
            "kernel": system.release,
            "machine": system.machine,
            "cpus": os.cpu_count(),
            "vendors": self.present,
        }


def by_lane(entries: List[Dict[str, Any]]) -> List[List[Dict[str, Any]]]:
    """Entries of the same lane together, all in the order in which they came."""
    lanes: Dict[str, List[Dict[str, Any]]] = {}
    for entry in entries:
        lanes.setdefault(str(entry["lane"]), []).append(entry)
    return list(lanes.values())

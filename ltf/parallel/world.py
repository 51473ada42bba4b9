"""The ranks of a run: how a process joins the others, and what each knows of all."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (  # torch.distributed has them, untyped
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ltf.config.schema import Parallel
from ltf.parallel.layout import Layout

AXES = ("pp", "replicate", "efsdp", "ep")
"""The mesh's dimensions: pipeline, replicate, expert_shard, expert of `Layout`."""

CLOSE_SECONDS = 10.0
MEMBER_BYTES = 512
OPEN_FILES = 65_536


class WorldError(RuntimeError):
    """This process cannot join the run: launch, device or network. One line with what to do."""


class PeersGone(RuntimeError):
    """Other ranks ended, stopped answering or never came; the cause is most often in another rank's log."""


@dataclass(frozen=True)
class Member:
    """A rank by the names that people know it by; `device` as `cuda:3`."""

    rank: int
    node: str
    device: str


@dataclass(frozen=True)
class World:
    """A process's view of the run; made by `join`.

    `mesh` has the dimensions AXES. `dense` shards what is not an expert: (replicate, shard), or (shard) alone
    with one copy. `experts` shards what one rank of an expert group holds: (replicate, efsdp), or (efsdp).
    `control` is a gloo group of all ranks for small values on the CPU, whatever the device.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    layout: Layout
    mesh: DeviceMesh
    dense: DeviceMesh
    experts: DeviceMesh
    roster: tuple[Member, ...]
    control: dist.ProcessGroup

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Row r is what rank r gave, in fp64; all ranks give equally many and call it together.

        PeersGone if others ended or did not come within the timeout.
        """
        mine = torch.tensor(list(values), dtype=torch.float64)
        if self.size == 1:
            return [mine.tolist()]
        rows = mine.new_empty(self.size, mine.numel())
        try:
            dist.all_gather(list(rows), mine, group=self.control)
        except RuntimeError as error:
            raise PeersGone(self.alone(error)) from error
        gathered: list[list[float]] = rows.tolist()
        return gathered

    def alone(self, error: BaseException) -> str:
        """One line that says, from this rank's side, that a collective broke."""
        me = self.roster[self.rank]
        return (
            f"rank {self.rank} of {self.size} ({me.node}, {me.device}) lost the other ranks: one of them "
            f"ended or did not come to a collective in time; its own log has the cause "
            f"(torch: {_first_line(error)})"
        )

    def close(self) -> None:
        """Leave. Returns within CLOSE_SECONDS even when other ranks are gone or stuck in a collective."""
        if not dist.is_initialized():
            return

        def leave() -> None:
            # A thread begins on the first device, whichever the process has.
            if self.device.type != "cpu":
                torch.accelerator.set_device_index(self.device.index)
            dist.destroy_process_group()

        # Leaving waits for collectives that are under way, and those for ranks that may never come.
        leaving = threading.Thread(target=leave, daemon=True)
        leaving.start()
        leaving.join(CLOSE_SECONDS)


def join(parallel: Parallel, device: str = "auto", environment: Mapping[str, str] | None = None) -> World:
    """Meet the ranks that torchrun's environment names, or be a run of one without it.

    `device`: `auto`, or a torch device type, with or without an index. The node's name is LTP_NODE, else the
    host's. LayoutError if the degrees do not fit the number of ranks, WorldError if this process cannot take
    part, both before any waiting; PeersGone if others do not come.
    """
    env = os.environ if environment is None else environment
    launch = Launch.of(env)
    layout = Layout.of(parallel, launch.size)
    here = choose_device(device, launch.local_rank)
    timeout = timedelta(seconds=parallel.timeout_seconds)
    if here.type != "cpu":
        torch.accelerator.set_device_index(here.index)
    _allow_connections()
    _meet(launch, here, timeout, env)
    mesh = init_device_mesh(
        here.type,
        (layout.pipeline, layout.replicate, layout.expert_shard, layout.expert),
        mesh_dim_names=AXES,
    )
    whole = mesh
    if layout.expert > 1:
        whole = init_device_mesh(
            here.type,
            (layout.pipeline, layout.replicate, layout.shard),
            mesh_dim_names=("pp", "replicate", "shard"),
        )
    inner = "shard" if layout.expert > 1 else "efsdp"
    control = dist.new_group(backend="gloo", timeout=timeout)
    for group in (*mesh.get_all_groups(), *whole.get_all_groups()):
        group.set_timeout(timeout)
    roster = _roster(
        launch, Member(launch.rank, env.get("LTP_NODE") or socket.gethostname(), str(here)), control
    )
    return World(
        rank=launch.rank,
        size=launch.size,
        local_rank=launch.local_rank,
        device=here,
        layout=layout,
        mesh=mesh,
        dense=whole[inner] if layout.replicate == 1 else whole["replicate", inner],
        experts=mesh["efsdp"] if layout.replicate == 1 else mesh["replicate", "efsdp"],
        roster=roster,
        control=control,
    )


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process; `host` is None for a run of one without a launcher.

    `attempt` differs between two starts of the same run, so that what a dead attempt left in a store that
    outlived it is never read.
    """

    rank: int
    size: int
    local_rank: int
    host: str | None
    port: int
    attempt: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch:
        """From RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; WorldError if only some are set."""
        attempt = "-".join(
            environment.get(name, "0") for name in ("LTP_ATTEMPT", "TORCHELASTIC_RESTART_COUNT")
        )
        needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if name not in environment]
        if "RANK" in missing and "WORLD_SIZE" in missing:
            return cls(0, 1, 0, None, 0, attempt)
        if missing:
            raise WorldError(
                f"the environment has some of {', '.join(needed)} but not {', '.join(missing)}: "
                "start through torchrun, or unset them all for a run of one process"
            )
        rank, size, local, port = (
            _whole(environment, name, default)
            for name, default in (("RANK", ""), ("WORLD_SIZE", ""), ("LOCAL_RANK", "0"), ("MASTER_PORT", ""))
        )
        if not rank < size:
            raise WorldError(f"RANK is {rank}, but WORLD_SIZE {size}: ranks count from 0 to {size - 1}")
        return cls(rank, size, local, environment["MASTER_ADDR"], port, attempt)


def lost_peers(error: BaseException) -> bool:
    """Whether an error is a collective's that broke because another rank ended or did not come."""
    # gloo raises plain RuntimeErrors, known by the source file that they name.
    return isinstance(error, (PeersGone, dist.DistError)) or "/gloo/" in str(error)


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device of a process: of `auto`, the accelerator if torch has one, else the CPU.

    Of several devices, the one with the process's number on its node; where the launcher shows each process
    one device alone, that one. WorldError if there is none of that name or number.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        wanted = accelerator or torch.device("cpu")
    else:
        try:
            wanted = torch.device(name)
        except RuntimeError as error:
            raise WorldError(
                f"run.device {name!r} is no torch device: give `auto`, `cpu`, `cuda` or another device type"
            ) from error
    if wanted.type == "cpu":
        return torch.device("cpu")
    if accelerator is None or accelerator.type != wanted.type:
        have = "no accelerator" if accelerator is None else accelerator.type
        raise WorldError(
            f"run.device is {name}, but torch sees {have} here: install a torch build for {wanted.type} and "
            "check its driver, or give `auto`"
        )
    count = torch.accelerator.device_count()
    index = wanted.index if wanted.index is not None else (0 if count == 1 else local_rank)
    if index >= count:
        raise WorldError(
            f"local rank {local_rank} wants {wanted.type}:{index}, but torch sees {count} here: start at "
            f"most {count} processes on this node, or make more devices visible"
        )
    return torch.device(wanted.type, index)


def _allow_connections() -> None:
    """gloo connects every rank of a group with every other, and the usual limit of 1,024 open files does not
    last for the groups of some hundred ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _meet(launch: Launch, device: torch.device, timeout: timedelta, environment: Mapping[str, str]) -> None:
    backend = "gloo"
    if device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    if launch.host is None:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    agent_has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        server = TCPStore(
            launch.host,
            launch.port,
            launch.size,
            is_master=launch.rank == 0 and not agent_has_store,
            timeout=timeout,
            wait_for_workers=False,
        )
    except (dist.DistError, RuntimeError) as error:
        raise PeersGone(
            f"rank {launch.rank} of {launch.size} got no store at {launch.host}:{launch.port}: check that "
            "rank 0 runs, that MASTER_ADDR reaches its node and that no other run has the port "
            f"(torch: {_first_line(error)})"
        ) from error
    store = PrefixStore(f"ltf/{launch.attempt}", server)
    store.set(f"here/{launch.rank}", "1")
    try:
        store.wait([f"here/{rank}" for rank in range(launch.size)], timeout)
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout
        )
    except (dist.DistError, RuntimeError) as error:
        raise PeersGone(_who_is_missing(launch, store, timeout, error)) from error


def _who_is_missing(launch: Launch, store: Store, timeout: timedelta, error: BaseException) -> str:
    """One line that names the ranks that never came."""
    start = f"rank {launch.rank} of {launch.size} waited {timeout.total_seconds():g} s in vain: "
    try:
        missing = [str(rank) for rank in range(launch.size) if not store.check([f"here/{rank}"])]
    except (dist.DistError, RuntimeError):
        return start + f"rank 0, which holds the store at {launch.host}:{launch.port}, is gone; see its log"
    if missing:
        some = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        return start + f"rank {some} did not come; see the log of each, or start all of the run's ranks"
    return start + (
        f"all ranks came, but could not connect to each other: check the network between nodes and "
        f"GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME (torch: {_first_line(error)})"
    )


def _roster(launch: Launch, me: Member, control: dist.ProcessGroup) -> tuple[Member, ...]:
    """Every rank's names, in order; JSON in a fixed number of bytes."""
    text = json.dumps([me.node[:256], me.device[:64]]).encode()[:MEMBER_BYTES]
    mine = torch.frombuffer(bytearray(text.ljust(MEMBER_BYTES)), dtype=torch.uint8)
    rows: Tensor = mine.new_empty(launch.size, MEMBER_BYTES)
    dist.all_gather(list(rows), mine, group=control)
    members = []
    for rank, row in enumerate(rows):
        node, device = json.loads(bytes(row.tolist()).decode())
        members.append(Member(rank, node, device))
    return tuple(members)


def _whole(environment: Mapping[str, str], name: str, default: str) -> int:
    text = environment.get(name, default)
    if not text.isdecimal():
        raise WorldError(f"{name} is {text!r} in the environment: the launcher must give a whole number")
    return int(text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Ranks that meet, know each other, and part."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from ltf.config.schema import Parallel
from ltf.parallel import world as worlds
from ltf.parallel.layout import LayoutError
from tests.ltf import ranks


def _two_by_two() -> dict[str, Any]:
    os.environ["LTP_NODE"] = f"node-{int(os.environ['RANK']) // 2}"
    world = worlds.join(Parallel(replicate=2, shard=2, expert=2), "cpu")
    try:
        place = world.layout.place(world.rank)
        return {
            "roster": [(m.rank, m.node, m.device) for m in world.roster],
            "gathered": world.gather([world.rank, 2.0**-40]),
            "mesh": dict(zip(worlds.AXES, world.mesh.get_coordinate() or (), strict=True)),
            "place": place,
            "dense": (world.dense.mesh_dim_names, world.dense.mesh.tolist()),
            "experts": (world.experts.mesh_dim_names, world.experts.mesh.tolist()),
            "ep": dist.get_process_group_ranks(world.mesh.get_group("ep")),
        }
    finally:
        world.close()


def _the_other_leaves() -> str:
    world = worlds.join(Parallel(timeout_seconds=20), "cpu")
    if world.rank == 1:
        os._exit(0) if os.environ.get("DIE") else world.close()
        return "left"
    try:
        world.gather([1.0])
    except worlds.PeersGone as error:
        return str(error)
    finally:
        world.close()
    return "gathered"


def _close_inside_a_collective() -> float:
    world = worlds.join(Parallel(timeout_seconds=300), "cpu")
    if world.rank == 0:
        dist.all_reduce(torch.ones(1), async_op=True)
    begun = time.monotonic()
    world.close()
    return time.monotonic() - begun


def _two_attempts_with_one_store(port: int) -> list[list[float]]:
    """As under a supervisor whose store outlives its ranks; stale keys would make the second attempt fail."""
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    seen = []
    for attempt in range(2):
        os.environ["LTP_ATTEMPT"] = f"a{attempt}"
        world = worlds.join(Parallel(), "cpu")
        seen.append([row[0] for row in world.gather([10 * attempt + world.rank])])
        world.close()
    return seen


def _rank_one_is_late() -> str:
    if os.environ["RANK"] == "1":
        return ""
    try:
        worlds.join(Parallel(timeout_seconds=2), "cpu")
    except worlds.PeersGone as error:
        return str(error)
    return "joined"


def test_every_rank_knows_the_roster_and_stands_in_the_mesh_where_the_layout_says() -> None:
    seen = ranks.run(_two_by_two, 4)
    for rank, view in enumerate(seen):
        assert view["roster"] == [(r, f"node-{r // 2}", "cpu") for r in range(4)]
        assert view["gathered"] == [[float(r), 2.0**-40] for r in range(4)]
        place = view["place"]
        assert view["mesh"] == {
            "pp": place.pipeline,
            "replicate": place.replicate,
            "efsdp": place.expert_shard,
            "ep": place.expert,
        }
        assert view["dense"] == (("replicate", "shard"), [[0, 1], [2, 3]])
        assert view["experts"] == (("replicate", "efsdp"), [[rank % 2], [rank % 2 + 2]])
        assert view["ep"] == [rank // 2 * 2, rank // 2 * 2 + 1]


def test_a_process_alone_needs_no_environment_and_still_has_groups() -> None:
    world = worlds.join(Parallel(), "cpu", {})
    try:
        assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
        assert world.gather([3.5]) == [[3.5]]
        value = torch.ones(2)
        dist.all_reduce(value, group=world.control)
        dist.all_reduce(value, group=world.mesh.get_group("ep"))
        assert value.tolist() == [1.0, 1.0]
    finally:
        world.close()
    assert not dist.is_initialized()


def test_a_rank_whose_peer_has_left_says_so_in_one_line() -> None:
    message = ranks.run(_the_other_leaves, 2)[0]
    assert message.startswith("rank 0 of 2 (")
    assert "lost the other ranks: one of them ended or did not come to a collective in time" in message
    assert "\n" not in message


def test_leaving_does_not_wait_for_a_collective_that_others_never_enter() -> None:
    assert max(ranks.run(_close_inside_a_collective, 2)) < worlds.CLOSE_SECONDS + 5


def test_an_attempt_reads_nothing_that_the_one_before_left_in_the_store() -> None:
    port = ranks.free_port()
    store = TCPStore("127.0.0.1", port, None, is_master=True, wait_for_workers=False)
    assert ranks.run(_two_attempts_with_one_store, 2, port) == [[[0.0, 1.0], [10.0, 11.0]]] * 2
    del store


def test_a_rank_that_never_came_is_named() -> None:
    message = ranks.run(_rank_one_is_late, 2)[0]
    assert message.startswith("rank 0 of 2 waited 2 s in vain: rank 1 did not come")


def test_a_wrong_mix_is_refused_before_any_rank_is_waited_for() -> None:
    launch = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}
    with pytest.raises(LayoutError, match="= 6, but there are 8 ranks"):
        worlds.join(Parallel(pipeline=2, shard=3), "cpu", launch)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start through torchrun"),
        (
            {"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "RANK is 4, but WORLD_SIZE 4: ranks count from 0 to 3",
        ),
        (
            {"RANK": "x", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "RANK is 'x' in the environment",
        ),
    ],
)
def test_half_a_launch_environment_is_refused_with_what_is_missing(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(worlds.WorldError, match=message):
        worlds.join(Parallel(), "cpu", environment)


def test_a_device_that_is_not_there_is_refused_and_cpu_is_always_there() -> None:
    assert worlds.choose_device("cpu", 3) == torch.device("cpu")
    with pytest.raises(worlds.WorldError, match=r"run\.device 'gpu' is no torch device"):
        worlds.choose_device("gpu", 0)
    absent = "xpu" if not torch.xpu.is_available() else "mps"
    with pytest.raises(worlds.WorldError, match=rf"run\.device is {absent}, but torch sees"):
        worlds.choose_device(absent, 0)

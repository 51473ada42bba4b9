"""Collectives between processes of this machine, with ranks that lie, die and hang; nccl-tests' output."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from probes.agent.api import Ran, TimedOut, Unsupported
from probes.agent.host import Machine
from probes.checks.collective import node_allreduce, node_alltoall
from probes.checks.nccl_tests import nccl_tests, parse
from tests.probes.checks.processes import children
from tests.probes.replay import ReplayHost

torch = pytest.importorskip("torch", reason="needs torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

pytestmark = pytest.mark.torch

CAPTURES = Path(__file__).resolve().parents[4] / "shared/data/captures/collective"
SMALL = {"cpu_sizes": [4096, 262144], "repeats": 2, "limit": 30}
GPUS = {f"/sys/bus/pci/devices/0000:0{i}:00.0/class": "0x030200\n" for i in range(8)}


def capture(name: str) -> str:
    if not CAPTURES.is_dir():
        pytest.skip("the captures in ../shared/data are absent")
    return (CAPTURES / name).read_text()


def values(measures: Any) -> dict[str, Any]:
    return {m.metric if m.device is None else f"{m.metric}[{m.device}]": m.value for m in measures}


class InRankOne(TorchDispatchMode):
    """Does `act` in rank 1 when it is about to communicate for the third time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def act(self, args: Any) -> None:
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if ("allreduce_" in name or "alltoall_base" in name) and torch.distributed.get_rank() == 1:
            self.calls += 1
            if self.calls == 1:
                self.act(args)
        return result


class Dies(InRankOne):
    def act(self, args: Any) -> None:
        os.abort()


class Hangs(InRankOne):
    def act(self, args: Any) -> None:
        time.sleep(600)


@pytest.mark.parametrize("check", [node_allreduce, node_alltoall])
def test_two_processes_exchange_exact_results_at_a_rate(check: Any) -> None:
    host = Machine(params=dict(SMALL))
    found = values(check(host))
    assert found["ranks"] == 2
    assert found["wrong_elements"] == 0
    assert found["lost_ranks"] == 0
    assert found["cpu_bus_gb_s"] > 0
    assert found["cpu_latency_us"] > 0
    assert sum("bus" in line for line in host.evidence) == 2


def test_one_wrong_element_in_one_rank_is_found_and_the_rank_is_named() -> None:
    host = Machine(params=dict(SMALL))

    class OwnResultWrong(TorchDispatchMode):
        """The comparison in rank 1 sees one element that is off by one."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.ne.Tensor and torch.distributed.get_rank() == 1:
                args[0].view(-1)[100] += 1
            return func(*args, **(kwargs or {}))

    found = values(node_allreduce(host, under=OwnResultWrong))
    assert found["wrong_elements"] == 4
    assert any(line.startswith("rank 1: 2 wrong elements at 4096 bytes") for line in host.evidence)


def test_a_rank_that_dies_is_named_and_no_process_is_left() -> None:
    before = children()
    host = Machine(params=dict(SMALL))
    found = values(node_allreduce(host, under=Dies))
    assert found["lost_ranks"] >= 1
    assert "cpu_bus_gb_s" not in found
    assert any("rank 1 died during 4096 bytes: killed by signal 6" in line for line in host.evidence)
    assert children() <= before


def test_a_rank_that_hangs_is_a_timeout_at_the_limit() -> None:
    host = Machine(params={**SMALL, "limit": 6})
    start = time.monotonic()
    with pytest.raises(TimedOut, match="rank 1 hung during 4096 bytes"):
        list(node_allreduce(host, under=Hangs))
    assert any("rank 1 hung during 4096 bytes" in line for line in host.evidence)
    assert time.monotonic() - start < 25


def test_accelerators_without_a_torch_for_them_are_unsupported_not_measured_on_the_cpu() -> None:
    with pytest.raises(Unsupported, match="sees 0 of 8 accelerators"):
        list(node_allreduce(ReplayHost(files=GPUS, params=dict(SMALL))))


def test_the_table_of_a_real_all_reduce_is_read() -> None:
    result = parse(capture("nccl_allreduce.log"))
    assert result.ranks == 8
    assert result.average == 68.4048
    assert result.out_of_bounds == 0
    assert result.wrong is None
    assert (result.rows[-1].size, result.rows[-1].bus) == (8589934592, 235.26)


def test_the_table_of_a_real_all_to_all_without_an_operation_column_is_read() -> None:
    result = parse(capture("nccl_alltoall.log"))
    assert result.average == 58.6481
    assert (result.rows[-1].size, result.rows[-1].bus) == (8589934592, 226.16)


FIXTURE = (Path(__file__).parent / "fixtures/collective/all_reduce_perf.txt").read_text()

ARGV = ("all_reduce_perf", "-b", "8M", "-e", "1G", "-f", "2", "-g", "8", "-c", "1")


def test_a_sound_run_of_all_reduce_perf_gives_its_bandwidth() -> None:
    host = ReplayHost(files=GPUS, commands={ARGV: FIXTURE})
    found = values(nccl_tests(host))
    assert found["average_bus_gb_s"] == 177.3
    assert found["bus_gb_s"] == 205.17
    assert found["wrong_elements"] == 0
    assert found["devices"] == 2


def test_wrong_elements_are_found_though_the_program_then_ends_with_a_failure() -> None:
    output = FIXTURE.replace("203.98      0", "203.98     12").replace("0 OK", "1 FAILED")
    host = ReplayHost(files=GPUS, commands={ARGV: Ran(1, output, "")})
    found = values(nccl_tests(host))
    assert found["wrong_elements"] == 12
    assert found["out_of_bounds"] == 1
    assert host.evidence[0] == "16777216 bytes: 12 wrong"


def test_a_run_that_ends_without_its_table_is_an_error_with_its_last_words() -> None:
    host = ReplayHost(
        files=GPUS,
        commands={
            ARGV: Ran(3, "# nThread 1", "node001: Test NCCL failure common.cu:958 'unhandled cuda error'")
        },
    )
    with pytest.raises(ValueError, match="status 3 and said: node001: Test NCCL failure"):
        list(nccl_tests(host))


def test_a_node_without_nccl_tests_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="all_reduce_perf is not installed"):
        list(nccl_tests(ReplayHost(files=GPUS)))

"""Rates of the CPU with torch and without it, slow and faulty devices, and accelerators nobody measured."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import Any

import pytest

from probes.agent.api import Measure, TimedOut, Unsupported
from probes.agent.host import Machine
from probes.checks import compute, cpu_loops, torch_devices
from probes.checks.children import BROKE, DIED, DONE, FAILED, HUNG, run_children
from probes.checks.torch_devices import Found, on_devices
from tests.probes.checks.processes import children
from tests.probes.replay import ReplayHost

torch = pytest.importorskip("torch", reason="needs torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

pytestmark = pytest.mark.torch

GPU = {"/sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n", "/proc/meminfo": "MemAvailable: 1000000 kB\n"}
# One thread: threads of this process would not survive the fork, and other tests may have started some.
SHORT = {"threads": 1, "seconds": 0.1, "cpu_size": 256, "cpu_precisions": ["fp32"]}


def values(measures: Any) -> dict[str, Any]:
    return {m.metric if m.device is None else f"{m.metric}[{m.device}]": m.value for m in measures}


class Slow(TorchDispatchMode):
    """Every product takes twenty times as long."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        times = 20 if func is torch.ops.aten.mm.out else 1
        for _ in range(times):
            result = func(*args, **(kwargs or {}))
        return result


class Broken(TorchDispatchMode):
    """Every product is refused, as by a device that has fallen off the bus."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.out, torch.ops.aten.mm.default):
            raise RuntimeError("device-side failure")
        return func(*args, **(kwargs or {}))


def test_products_on_the_cpu_have_a_rate_for_each_precision() -> None:
    host = Machine(params={**SHORT, "cpu_precisions": ["fp32", "bf16"]})
    found = values(compute.gemm(host))
    assert found["cpu_fp32_tflops"] > 0
    assert found["cpu_bf16_tflops"] > 0
    assert found["unmeasured_devices"] == 0
    assert found["spread_percent"] >= 0


def test_a_device_that_computes_slowly_has_a_lower_rate() -> None:
    sound = values(compute.gemm(Machine(params=dict(SHORT))))["cpu_fp32_tflops"]
    slow = values(compute.gemm(Machine(params=dict(SHORT)), under=Slow))["cpu_fp32_tflops"]
    assert slow < sound / 3


def test_a_precision_that_the_stack_lacks_is_left_out_and_said() -> None:
    host = Machine(params={**SHORT, "cpu_precisions": ["fp32", "tf32", "fp8"]})
    found = values(compute.gemm(host))
    assert "cpu_tf32_tflops" not in found
    assert "cpu_fp8_tflops" not in found
    assert any(line.startswith("tf32 not measured") for line in host.evidence)


def test_a_cpu_on_which_products_fail_is_an_error_and_no_pass() -> None:
    with pytest.raises(ValueError, match="device-side failure"):
        list(compute.gemm(Machine(params=dict(SHORT)), under=Broken))


def test_without_torch_the_cpu_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    host = Machine(params={"seconds": 0.1})
    found = values(compute.gemm(host))
    assert found["fallback_mops"] > 0
    assert 0 < found["fallback_slowest_cpu"] <= 1
    assert found["unmeasured_devices"] == 0
    assert "torch is absent" in host.evidence[0]


def test_accelerators_that_torch_cannot_reach_are_counted_and_never_pass_silently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = ReplayHost(files=GPU, params=dict(SHORT))
    found = values(compute.gemm(host))
    assert found["unmeasured_devices"] == 1
    assert "sees 0 of 1 accelerators" in host.evidence[0]
    monkeypatch.setitem(sys.modules, "torch", None)
    for check in (compute.gemm, compute.memory_bandwidth):
        host = ReplayHost(files=GPU, params={"seconds": 0.05, "accelerators": 8})
        assert values(check(host))["unmeasured_devices"] == 8


@pytest.mark.parametrize("check", [compute.launch_latency, compute.transfer])
def test_checks_of_devices_are_unsupported_without_one(check: Any) -> None:
    with pytest.raises(Unsupported, match="no accelerator"):
        list(check(Machine(params={})))
    with pytest.raises(Unsupported, match="sees 0 of 1"):
        list(check(ReplayHost(files=GPU)))


def test_a_torch_that_cannot_be_imported_is_an_error_and_not_absence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "torch.py").write_text(
        "raise ImportError('libcublas.so.12: cannot open shared object file')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ValueError, match=r"torch is broken: libcublas"):
        list(compute.gemm(Machine(params={})))


def test_memory_copies_have_a_rate_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    host = Machine(params={"seconds": 0.05, "cpu_megabytes": 16})
    assert 0.1 < values(compute.memory_bandwidth(host))["cpu_copy_gb_s"] < 10_000


def two_devices() -> Found:
    """Two devices that are the CPU: the ways of several, without several."""
    return Found(torch, "cpu", 2, "stack", "", 2)


def test_a_device_that_faults_is_named_and_the_other_one_answers() -> None:
    def work(device: Any, say: Any) -> dict[str, Any]:
        if device.index == 1:
            say("product")
            raise RuntimeError("uncorrectable ECC error encountered")
        return {"rate": 5.0}

    host = Machine(params={})
    measures, results = on_devices(host, two_devices(), work, timeout=30.0)
    assert Measure("failed", 0, "0") in measures
    assert Measure("failed", 1, "1") in measures
    assert results == {"0": {"rate": 5.0}}
    assert "uncorrectable ECC" in host.evidence[0]
    assert "during product" in host.evidence[0]


def test_a_device_that_hangs_is_named_at_the_limit_and_nothing_of_it_is_left() -> None:
    def work(device: Any, say: Any) -> dict[str, Any]:
        if device.index == 0:
            say("wait for the device")
            time.sleep(600)
        return {"pid": os.getpid()}

    host = Machine(params={})
    before = children()
    start = time.monotonic()
    measures, results = on_devices(host, two_devices(), work, timeout=3.0)
    assert time.monotonic() - start < 15
    assert Measure("failed", 1, "0") in measures
    assert "1" in results
    assert "hung during wait for the device" in host.evidence[0]
    assert children() <= before


def test_a_device_that_crashes_its_process_is_named_with_the_signal() -> None:
    def work(device: Any, say: Any) -> dict[str, Any]:
        if device.index == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        return {}

    host = Machine(params={})
    measures, _ = on_devices(host, two_devices(), work, timeout=30.0)
    assert Measure("failed", 1, "1") in measures
    assert "signal 11" in host.evidence[0]


def test_a_mistake_in_the_check_itself_never_accuses_a_device() -> None:
    def work(device: Any, say: Any) -> dict[str, Any]:
        raise TypeError("not the device's fault")

    with pytest.raises(ValueError, match="not the device's fault"):
        on_devices(Machine(params={}), two_devices(), work, timeout=30.0)


def test_a_cpu_that_gives_no_answer_in_time_is_a_timeout() -> None:
    def work(device: Any, say: Any) -> dict[str, Any]:
        time.sleep(600)
        return {}

    with pytest.raises(TimedOut):
        on_devices(Machine(params={}), Found(torch, "cpu", 0, "", "", 0), work, timeout=1.0)


def test_children_end_in_five_ways_that_are_told_apart() -> None:
    def fail(say: Any) -> None:
        raise OSError(5, "Input/output error")

    def mistake(say: Any) -> None:
        raise KeyError("x")

    works = [
        ("a", lambda say: [1, "two"]),
        ("b", fail),
        ("c", mistake),
        ("d", lambda say: os._exit(3)),
        ("e", lambda say: time.sleep(600)),
    ]
    children = run_children(works, timeout=1.0)
    assert [child.ending for child in children] == [DONE, FAILED, BROKE, DIED, HUNG]
    assert children[0].result == [1, "two"]
    assert "Input/output error" in children[1].detail
    assert children[3].detail == "exit status 3"


def test_a_child_dies_with_the_process_that_started_it() -> None:
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.close(reader)
        with contextlib.suppress(BaseException):
            run_children(
                [("sleeper", lambda say: (os.write(writer, b"%d\n" % os.getpid()), time.sleep(600)))], 600
            )
        os._exit(0)
    os.close(writer)
    assert int(os.read(reader, 32)) > 0
    os.kill(middle, signal.SIGKILL)
    os.waitpid(middle, 0)
    # The pipe's end arrives when the sleeper, its last writer, is gone.
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_the_cpus_that_count_are_those_of_affinity_and_quota() -> None:
    quota = ReplayHost(files={"/sys/fs/cgroup/cpu.max": "50000 100000\n"})
    assert torch_devices.usable_cpus(quota) == 1
    free = ReplayHost(files={"/sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert torch_devices.usable_cpus(free) == len(os.sched_getaffinity(0))


def test_loops_run_on_every_cpu_by_itself() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    rates = cpu_loops.loop_rates(cpus, 0.05)
    assert len(rates) == len(cpus)
    assert min(rates) > 0

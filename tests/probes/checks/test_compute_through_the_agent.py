"""The measuring checks as they really run: sent over stdin, loaded from memory, in a worker of the agent."""

from __future__ import annotations

import functools
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from probes.agent.bundle import check_request
from probes.catalogue import Catalogue, load_catalogue
from probes.criteria import compile_rules, judge
from probes.model import CheckRecord, Outcome, Status
from tests.probes.agent.agent_process import run

pytest.importorskip("torch", reason="needs torch")
pytestmark = pytest.mark.torch

SHORT: dict[str, dict[str, Any]] = {
    "compute.gemm": {"seconds": 0.1, "cpu_size": 256},
    "compute.memory_bandwidth": {"seconds": 0.1, "cpu_megabytes": 16},
    "compute.golden": {"repeats": 2, "warm_seconds": 0.1, "cpu_size": 128},
    "compute.memory_pattern": {"megabytes": 4},
    "compute.training_step": {"steps": 2},
    "collective.node_allreduce": {"cpu_sizes": [4096, 65536], "repeats": 2},
    "collective.node_alltoall": {"cpu_sizes": [4096, 65536], "repeats": 2},
    "storage.io": {"megabytes": 2, "seconds": 0.1},
}
PASSIVE = (
    "storage.space",
    "storage.inodes",
    "storage.hang",
    "storage.readonly",
    "storage.mounts",
    "storage.nvme",
)


@functools.cache
def catalogue() -> Catalogue:
    return load_catalogue()


@functools.cache
def records() -> dict[str, CheckRecord]:
    """One run of the agent on this machine."""
    requests = [check_request(name, catalogue().check(name).spec, params) for name, params in SHORT.items()]
    requests += [check_request(name, catalogue().check(name).spec) for name in PASSIVE]
    before = set(os.listdir("/tmp")) | set(os.listdir("/dev/shm"))
    found = run(*requests, budget=300.0)
    left = [
        n
        for n in (set(os.listdir("/tmp")) | set(os.listdir("/dev/shm"))) - before
        if "torch" in n or "ltp" in n
    ]
    assert left == []
    return found


@pytest.mark.parametrize("name", [*SHORT, *PASSIVE])
def test_each_check_answers_from_memory_on_a_sound_machine(name: str) -> None:
    record = records()[name]
    assert record.status is Status.ANSWERED, record
    assert {m.metric for m in record.measures} <= set(catalogue().check(name).spec.metrics)


@pytest.mark.parametrize("name", SHORT)
def test_a_sound_machine_passes_the_limits_of_the_catalogue(name: str) -> None:
    judged = judge(compile_rules(catalogue()), name, records()[name])
    assert judged.outcome is Outcome.PASS, judged.findings


def test_an_old_python_without_torch_measures_the_cpu_and_says_what_it_could_not() -> None:
    python = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".pyenv/versions/3.8.18/bin/python3"
    if not python.exists():
        pytest.skip("no Python 3.8 under ~/.pyenv")
    names = (
        "compute.gemm",
        "compute.memory_bandwidth",
        "compute.golden",
        "compute.training_step",
        "storage.io",
    )
    requests = [check_request(name, catalogue().check(name).spec, SHORT[name]) for name in names]
    found = run(*requests, python=str(python), budget=120.0)
    assert {m.metric for m in found["compute.gemm"].measures} >= {"fallback_mops", "unmeasured_devices"}
    assert "torch is absent" in found["compute.gemm"].evidence[0]
    assert found["compute.training_step"].status is Status.UNSUPPORTED
    for name in ("compute.memory_bandwidth", "compute.golden", "storage.io"):
        assert found[name].status is Status.ANSWERED, found[name]

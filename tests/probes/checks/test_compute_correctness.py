"""Wrong bits are found: in arithmetic, between repeats and devices, in memory, in a training step."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import pwd
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from probes.agent.api import Measure, Unsupported
from probes.agent.host import Machine
from probes.checks import cpu_loops
from probes.checks.golden import INTEGER_ANSWER, INTEGER_CELLS, compare, golden, integer_work
from probes.checks.memory_pattern import memory_pattern, test_device
from probes.checks.torch_devices import Device
from probes.checks.training_step import cosine, training_step
from tests.probes.replay import ReplayHost

torch = pytest.importorskip("torch", reason="needs torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

pytestmark = pytest.mark.torch

test_device.__test__ = False  # type: ignore[attr-defined]
ROOT = Path(__file__).resolve().parents[3]
aten = torch.ops.aten


def values(measures: Any) -> dict[str, Any]:
    return {m.metric if m.device is None else f"{m.metric}[{m.device}]": m.value for m in measures}


class FlipsOnce(TorchDispatchMode):
    """One bit of one result of one kind of operation is wrong, the n-th time it runs."""

    def __init__(self, operation: Any, nth: int) -> None:
        super().__init__()
        self.operation, self.left = operation, nth

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.operation:
            self.left -= 1
            if self.left == 0:
                bits = torch.int16 if result.element_size() == 2 else torch.int32
                result.view(-1)[17:18].view(bits).bitwise_xor_(1 << 3)
        return result


def test_a_sound_node_gives_the_same_bits_every_time() -> None:
    first, second = (
        values(golden(Machine(params={"repeats": 3, "warm_seconds": 0.1, "cpu_size": 128}))) for _ in range(2)
    )
    assert first == second
    for metric in ("wrong_cpus", "wrong_integers", "differing_repeats", "unmeasured_devices"):
        assert first[metric] == 0
    assert len(first["digest"]) == 32
    assert torch.__version__ in first["stack"]


def test_one_flipped_bit_in_one_product_is_found_and_does_not_become_the_digest() -> None:
    params = {"repeats": 3, "warm_seconds": 0.0, "cpu_size": 128}
    sound = values(golden(Machine(params=dict(params))))
    host = Machine(params=dict(params))
    found = values(golden(host, under=lambda: FlipsOnce(aten.mm.default, 2)))
    assert found["differing_repeats"] == 1
    assert found["digest"] == sound["digest"]
    assert any("gave" in line for line in host.evidence)


def test_one_flipped_bit_in_integer_arithmetic_is_wrong_and_not_only_different() -> None:
    params = {"repeats": 2, "warm_seconds": 0.0, "cpu_size": 128}
    found = values(golden(Machine(params=params), under=lambda: FlipsOnce(aten.mul.Tensor, 1)))
    assert found["wrong_integers"] == 1


def test_the_known_integer_answer_is_that_of_plain_python() -> None:
    mask, x = 0xFFFFFFFF, list(range(INTEGER_CELLS))
    for factor in (1664525, 22695477, 1103515245):
        x = [(v * factor + 1013904223) & mask for v in x]
        x = [v ^ ((v >> 13) & 0x7FFFF) for v in x]
        x = [(a + b) & mask for a, b in zip(x, reversed(x), strict=True)]
    assert hashlib.sha256(struct.pack(f"<{len(x)}I", *x)).hexdigest() == INTEGER_ANSWER
    assert integer_work(torch, torch.device("cpu")) == INTEGER_ANSWER


def test_a_cpu_with_another_answer_than_the_known_one_is_named() -> None:
    def off_by_one_bit(rounds: int) -> str:
        return cpu_loops.known_work(rounds).replace("3", "2", 1)

    assert cpu_loops.wrong_cpus([0], rounds=2) == []
    assert cpu_loops.wrong_cpus([0], rounds=2, work=off_by_one_bit) == [0]


def test_the_majority_of_devices_names_the_odd_one() -> None:
    measures, agreed = compare({"0": ["a", "a"], "1": ["a", "a"], "2": ["b", "b"]})
    assert Measure("odd", 1, "2") in measures
    assert Measure("odd", 0, "0") in measures
    assert Measure("devices_disagree", 0) in measures
    assert agreed == "a"


def test_two_devices_that_disagree_accuse_neither_but_the_node_does_not_pass() -> None:
    measures, agreed = compare({"0": ["a"], "1": ["b"]})
    assert {m for m in measures if m.metric == "odd"} == {Measure("odd", 0, "0"), Measure("odd", 0, "1")}
    assert Measure("devices_disagree", 1) in measures
    assert agreed is None


def test_golden_without_torch_still_checks_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    host = ReplayHost(params={"accelerators": 4})
    assert values(golden(host)) == {"wrong_cpus": 0, "unmeasured_devices": 4}
    assert "torch is absent" in host.evidence[0]


@pytest.mark.parametrize("version", ["3.8.18", "3.13.0"])
def test_the_known_answer_is_the_same_in_old_and_new_pythons(version: str) -> None:
    python = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".pyenv/versions" / version / "bin/python3"
    if not python.exists():
        pytest.skip(f"no Python {version} under ~/.pyenv")
    code = "from probes.checks.cpu_loops import known_work; print(known_work())"
    ran = subprocess.run([python, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == cpu_loops.KNOWN_ANSWER


class StuckBit(mmap.mmap):
    """RAM in which bit 5 of one byte always reads as one."""

    def __getitem__(self, key: Any) -> Any:
        got = super().__getitem__(key)
        place = 1_500_003
        if isinstance(key, slice) and key.start <= place < key.stop:
            cells = bytearray(got)
            cells[place - key.start] |= 1 << 5
            return bytes(cells)
        return got


def test_sound_memory_keeps_every_pattern() -> None:
    host = Machine(params={"megabytes": 4})
    assert values(memory_pattern(host)) == {"ram_mismatches": 0, "ram_tested_mb": 4}
    assert host.evidence == []


def test_a_stuck_bit_in_ram_is_found_with_its_address_and_bit() -> None:
    host = Machine(params={"megabytes": 2})
    found = values(memory_pattern(host, region=lambda size: StuckBit(-1, size)))
    assert found["ram_mismatches"] >= 3
    assert host.evidence[0] == (
        "RAM: 0x00 at offset 0x16e360: wrote 0x0, read 0x20000000, bits 0x20000000 differ"
    )


def test_two_addresses_that_share_a_cell_are_found() -> None:
    class Aliased(mmap.mmap):
        """The second mebibyte answers for the first as well: a broken address line."""

        def __setitem__(self, key: Any, value: Any) -> None:
            start = key.start % (1 << 20)
            super().__setitem__(slice(start, start + len(value)), value)

        def __getitem__(self, key: Any) -> Any:
            start = key.start % (1 << 20)
            return super().__getitem__(slice(start, start + (key.stop - key.start)))

    host = Machine(params={"megabytes": 2})
    assert values(memory_pattern(host, region=lambda size: Aliased(-1, size)))["ram_mismatches"] > 1000


def device_memory(mode: Any = None) -> dict[str, Any]:
    torch.set_num_threads(1)
    device = Device(torch, "cpu", 0)
    device.free_memory = lambda: 1 << 30  # type: ignore[method-assign]
    if mode is None:
        return test_device(device, lambda phase: None, share=0.07, most=1 << 26)
    with mode:
        return test_device(device, lambda phase: None, share=0.07, most=1 << 26)


def test_sound_device_memory_keeps_every_pattern() -> None:
    assert device_memory() == {"mismatches": 0, "tested_mb": 64, "notes": []}


def test_a_bit_that_flips_in_device_memory_is_found_with_its_address() -> None:
    answer = device_memory(FlipsOnce(aten.copy_.default, 3))
    assert answer["mismatches"] == 1
    assert answer["notes"] == [
        "0x55555555 at offset 0x44: wrote 0x55555555, read 0x5555555d, bits 0x8 differ"
    ]


def test_a_sound_training_step_agrees_with_the_reference() -> None:
    host = Machine(params={"steps": 3})
    found = values(training_step(host))
    for metric in ("output_cosine", "gradient_cosine", "parameter_cosine", "update_cosine"):
        assert 0.999 < found[metric] <= 1.000001
    assert found["loss_difference"] < 1e-3


class WrongGradient(TorchDispatchMode):
    """The float32 layer norm's weight gradient is in the wrong order; the forward pass is right."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten.native_layer_norm_backward.default and args[0].dtype == torch.float32:
            return (result[0], result[1].flip(0), result[2])
        return result


def test_a_wrong_gradient_of_one_kernel_is_found_though_the_outputs_are_right() -> None:
    found = values(training_step(Machine(params={"steps": 2}), under=WrongGradient))
    assert found["output_cosine"] > 0.999
    assert found["gradient_cosine"] < 0.99
    assert found["update_cosine"] < 0.99


def test_a_result_that_is_not_a_number_counts_as_unlike() -> None:
    assert cosine(torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0])) == 0.0
    assert cosine(torch.tensor([math.inf, 1.0]), torch.tensor([1.0, 1.0])) == 0.0


def test_a_training_step_without_torch_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Unsupported, match="torch is absent"):
        list(training_step(Machine(params={})))

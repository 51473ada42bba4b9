"""Rates, peaks and memory."""

from __future__ import annotations

import re
import time

import pytest
import torch

from ltf.metrics import Peak, devices, dtype_key, find_peak, known_peak, measure_peak, memory, mfu
from ltf.model.count import token_flops
from tests.ltf.model.shapes import MOE

CPU = torch.device("cpu")


def test_mfu_is_the_models_arithmetic_over_what_the_devices_could_do() -> None:
    flops = token_flops(MOE, 128).training
    assert mfu(1000.0, flops, 4, Peak(1e9, "configuration")) == pytest.approx(1000 * flops / 4e9)


def test_mfu_counts_active_experts_causal_attention_and_no_recomputation() -> None:
    moe, sequence = MOE.moe, 128
    assert moe is not None
    width, heads = MOE.width, MOE.heads * MOE.head_dim
    attention = 2 * width * (MOE.heads + MOE.kv_heads) * MOE.head_dim
    layer = attention + width * moe.experts + 2 * 3 * width * moe.expert_width
    matrices = MOE.layers * layer + MOE.vocab_size * width
    looked_at = MOE.layers * 4 * heads * (sequence + 1) / 2
    assert token_flops(MOE, sequence).training == pytest.approx(3 * (2 * matrices + looked_at))


def test_without_a_peak_there_is_no_mfu() -> None:
    assert mfu(1000.0, 1.0, 1, None) is None


def test_the_configured_peak_goes_before_any_other() -> None:
    assert find_peak(5e12, CPU, torch.float32) == Peak(5e12, "configuration")


def test_a_device_that_nobody_knows_has_no_peak() -> None:
    assert known_peak("Acme Tensor 9000", "bf16") is None
    assert find_peak(None, CPU, torch.float32) is None


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA L40", "bf16", 181.05),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("Tesla V100-PCIE-16GB", "fp32", 14),
        ("AMD Instinct MI250X", "bf16", 191.5),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("AMD Instinct MI325X", "bf16", 1307.4),
        ("AMD Instinct MI355X", "bf16", 2516.6),
        ("GAUDI3", "bf16", 1835),
    ],
)
def test_devices_are_known_by_the_names_they_report(name: str, dtype: str, teraflops: float) -> None:
    found = known_peak(name, dtype)
    assert found is not None
    assert found.flops == pytest.approx(teraflops * 1e12)
    assert found.source.startswith("https://")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Tesla V100-SXM2-32GB", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16"),
        ("AMD Instinct MI250X/MI250", "bf16"),
        ("Intel(R) Data Center GPU Max 1550", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA H100 80GB HBM3", "int3"),
        ("", "bf16"),
    ],
)
def test_what_has_no_single_answer_is_unknown(name: str, dtype: str) -> None:
    assert known_peak(name, dtype) is None


def test_a_part_of_a_device_is_not_taken_for_the_whole() -> None:
    assert known_peak("AMD Instinct MI300X", "bf16", units=304) is not None
    assert known_peak("AMD Instinct MI300X", "bf16", units=38) is None


def test_every_entry_of_the_table_has_its_source_and_no_impossible_figure() -> None:
    assert len(devices()) > 25
    for entry in devices():
        re.compile(entry["name"])
        assert set(entry) - {"units"} == {"name", "teraflops", "source"}, entry
        assert entry["source"].startswith("https://")
        rates = entry["teraflops"]
        assert set(rates) <= {"bf16", "fp16", "tf32", "fp32"}
        assert all(1 < rate < 5000 for rate in rates.values())
        rising = [rates[key] for key in ("fp32", "tf32", "bf16") if key in rates]
        assert rising == sorted(rising)


def test_fp32_products_on_an_accelerator_run_as_tf32_only_where_torch_may() -> None:
    # A meta device stands for an accelerator here: no product runs.
    other = torch.device("meta")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert dtype_key(other, torch.float32) == "fp32"
        torch.set_float32_matmul_precision("high")
        assert (dtype_key(other, torch.float32), dtype_key(CPU, torch.float32)) == ("tf32", "fp32")
    finally:
        torch.set_float32_matmul_precision(before)
    assert dtype_key(other, torch.bfloat16) == "bf16"


def test_a_measured_peak_is_one_that_a_real_product_reaches_and_hardly_passes() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = find_peak("measure", CPU, torch.float32)
        assert found is not None
        a = torch.randn(512, 512)
        took = []
        for _ in range(20):
            began = time.perf_counter()
            torch.mm(a, a)
            took.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    assert found.source == "measured"
    # The machine may be busy at one of the moments: within a factor, not a percentage.
    assert found.flops / 6 < 2 * 512**3 / min(took) < found.flops * 6


def test_a_dtype_without_matrix_products_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.bool ran on cpu: set output\.peak_flops"):
        measure_peak(CPU, torch.bool, seconds=0.1)


def test_measuring_a_dtype_that_runs_slowly_takes_no_longer() -> None:
    began = time.perf_counter()
    # A CPU takes seconds for the largest size.
    assert measure_peak(CPU, torch.float8_e4m3fn, seconds=0.05).flops > 0
    assert time.perf_counter() - began < 6.0


def test_a_processs_memory_is_its_resident_set() -> None:
    before = memory(CPU)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = memory(CPU)
    assert after.reserved - before.reserved > 48 << 20
    assert after.peak >= after.reserved * 0.9
    assert after.total is not None
    assert after.total > after.peak
    assert held.sum() == 64 << 20

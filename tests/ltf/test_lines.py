"""The lines for people."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ltf.config.errors import ConfigError
from ltf.events import Where
from ltf.findings import Finding, Severity
from ltf.lines import Board, Lines, Progress, Start, banner, count, progress_line, size
from ltf.metrics import Peak

START = Start(
    run="r1",
    attempt=2,
    first_step=41,
    steps=1000,
    parameters=30_532_122_624,
    active_parameters=3_300_000_000,
    layout={"pipeline": 1, "replicate": 2, "shard": 4, "expert": 4},
    world=8,
    device="NVIDIA H100 80GB HBM3",
    dtype="bf16",
    samples=64,
    micro=2,
    seq_len=4096,
    token_flops=2.2e10,
    peak=Peak(989.4e12, "https://example.org/h100"),
)
PROGRESS = Progress(
    step=50,
    loss=5.43211,
    norm=1.2345,
    lr=3e-4,
    tokens=262144,
    seconds=2.0,
    mfu=0.4123,
    memory=61 << 30,
    data_stall=0.02,
    checkpoint_stall=0.5,
)


def test_a_line_has_every_figure_of_its_step() -> None:
    line = progress_line([PROGRESS], 1000, 8)
    assert line.startswith("step   50/1000  ")
    for part in (
        "loss  5.4321",
        "norm     1.23",
        "lr 3.00e-04",
        "tok/s  131K (16.4K/device)",
        "mfu 41.2%",
        "mem 61.0 GiB",
        "stall data  1.0% ckpt 25.0%",
    ):
        assert part in line
    assert "balance" not in line


def test_a_mixture_of_experts_also_shows_its_balance() -> None:
    line = progress_line([replace(PROGRESS, balance=1.0321, expert_load=1.75)], 1000, 8)
    assert line.endswith("balance  1.032 load  1.75")


def test_what_is_not_known_is_a_dash_and_nothing_moves() -> None:
    known = progress_line([PROGRESS], 1000, 8)
    unknown = progress_line([replace(PROGRESS, norm=None)], 1000, 8)
    assert "norm        -" in unknown
    assert len(known) == len(unknown)


def test_what_a_run_cannot_have_takes_no_room() -> None:
    line = progress_line([replace(PROGRESS, mfu=None)], 1000, 1)
    assert "mfu" not in line
    assert "device" not in line
    assert "tok/s  131K  mem" in line


@pytest.mark.parametrize(
    "other",
    [
        {"step": 7, "loss": 12.5, "norm": 123456.0, "tokens": 999, "mfu": 0.004},
        {"step": 1000, "loss": float("nan"), "norm": float("inf"), "lr": 1.5e-10, "memory": 3 << 20},
        {"seconds": 0.001, "data_stall": 0.001, "checkpoint_stall": 0.0, "memory": 999 << 30},
    ],
)
def test_columns_keep_their_places_whatever_the_figures(other: dict[str, Any]) -> None:
    def ends(line: str) -> list[int]:
        return [line.index(word) for word in ("loss", "norm", "lr", "tok/s", "mfu", "mem", "stall", "ckpt")]

    assert ends(progress_line([replace(PROGRESS, **other)], 1000, 8)) == ends(
        progress_line([PROGRESS], 1000, 8)
    )


def test_rates_and_stalls_are_those_of_all_steps_since_the_last_line() -> None:
    out = io.StringIO()
    lines = Lines(log_every=2, steps=5, devices=1, out=out)
    for step, tokens in ((1, 1000), (2, 3000), (3, 1000), (4, 1000), (5, 7000)):
        lines.progress(
            replace(PROGRESS, step=step, tokens=tokens, seconds=1.0, data_stall=0.0, checkpoint_stall=0.0)
        )
    written = out.getvalue().splitlines()
    assert [line.split()[1] for line in written] == ["2/5", "4/5", "5/5"]
    assert [line.split("tok/s")[1].split()[0] for line in written] == ["2.00K", "1.00K", "7.00K"]


def test_a_skipped_step_is_always_shown() -> None:
    out = io.StringIO()
    Lines(log_every=100, steps=500, devices=1, out=out).progress(replace(PROGRESS, step=7, skipped=True))
    assert out.getvalue().endswith("SKIPPED\n")


def test_the_banner_tells_size_layout_device_batch_and_the_formula_of_mfu() -> None:
    text = "\n".join(banner(START))
    for part in (
        "run r1, attempt 2: steps 41 to 1000",
        "30.5B parameters, 3.30B active a token, 22.0GFLOP a token",
        "8 ranks: replicate 2 x shard 4 x expert 4",
        "NVIDIA H100 80GB HBM3, bf16, peak 989TFLOP/s (https://example.org/h100)",
        "64 samples of 4096 tokens, 262144 tokens a step, micro-batches of 2",
        "MFU = tokens/s x FLOPs a token",
    ):
        assert part in text


def test_without_a_peak_the_banner_says_that_there_is_no_mfu() -> None:
    text = "\n".join(banner(replace(START, peak=None, world=1, layout={"shard": 1})))
    assert "peak unknown: no MFU" in text
    assert "MFU =" not in text
    assert "  layout   1 rank\n" in text


def test_a_run_that_is_done_is_told_so_when_it_is_started_again() -> None:
    assert (
        banner(replace(START, first_step=1001))[0] == "run r1, attempt 2: all 1000 steps are done (run.steps)"
    )


def test_a_finding_outside_any_step_names_none() -> None:
    out = io.StringIO()
    Lines(10, 100, 1, out).finding(Finding("events.lost", Severity.WARNING, -1, "the disk is full"))
    assert out.getvalue() == "!!! WARNING events.lost: the disk is full\n"


def test_a_finding_is_loud_and_names_rank_node_and_device() -> None:
    out = io.StringIO()
    Lines(10, 100, 1, out).finding(
        Finding("finite.gradient", Severity.ERROR, 12, "a gradient is not finite", (3,)),
        [Where(3, "node007", "cuda:3")],
    )
    assert out.getvalue().splitlines() == [
        "!!!!!! ERROR finite.gradient at step 12: a gradient is not finite",
        "!!!!!!   rank 3, node node007, device cuda:3",
    ]


def test_nothing_that_steers_a_terminal_comes_through() -> None:
    out = io.StringIO()
    Lines(10, 100, 1, out).finding(
        Finding("x", Severity.INFO, 1, "a\x1b[31m\nfake line\x9b"), [Where(0, "no\rde", "cpu")]
    )
    assert out.getvalue().count("\n") == 2
    assert not any(c in out.getvalue() for c in "\x1b\r\x9b")
    assert "a\\x1b[31m\\nfake line" in out.getvalue()


def test_a_line_is_in_the_pipe_at_once_and_survives_a_kill() -> None:
    program = """
        import os, signal
        from ltf.lines import Lines
        Lines(1, 1, 1).say("said")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], check=False, capture_output=True, text=True
    )
    assert done.stdout == "said\n"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0.00"),
        (12.34, "12.3"),
        (999.4, "999"),
        (999.6, "1.00K"),
        (1e6, "1.00M"),
        (3.3e9, "3.30B"),
        (9.894e14, "989T"),
        (2e15, "2.00P"),
        (float("nan"), "-"),
    ],
)
def test_counts_have_three_digits_and_a_suffix(number: float, text: str) -> None:
    assert count(number) == text


def test_sizes_are_binary() -> None:
    assert [size(n) for n in (512, 1536, 1000 << 20, 61 << 30, 3 << 40)] == [
        "512 B", "1.50 KiB", "0.98 GiB", "61.0 GiB", "3.00 TiB",
    ]  # fmt: skip


def test_tensorboard_without_its_package_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=r"output\.tensorboard: .*`pip install tensorboard`"):
        Board(tmp_path)

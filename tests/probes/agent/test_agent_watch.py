"""Counters watched while checks load the node: what grew is told, with the device and the check."""

from pathlib import Path

import pytest

from probes.agent.bundle import Watched, WatchRequest
from probes.catalogue import load_catalogue
from probes.criteria import compile_rules, judge
from probes.model import CheckRecord, Outcome, Status, Value
from tests.probes.agent.agent_process import ask, run


def watching(file: Path, **fields: object) -> WatchRequest:
    collector = ask("grows", lane="ecc", params={"file": str(file)})
    watched = Watched(collector, {"errors": "ecc_errors"}, {"temperature": "temperature_peak"})
    return WatchRequest((watched,), **fields)  # type: ignore[arg-type]


def values(record: CheckRecord) -> dict[tuple[str, str | None], Value]:
    return {(m.metric, m.device): m.value for m in record.measures}


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    file = tmp_path / "counter"
    file.write_text("10")
    return file


def test_growth_under_load_is_told_for_each_device_with_the_check_that_ran(counter: Path) -> None:
    params = {"file": str(counter)}
    loading = [ask("loads", name, params=params, loads=True) for name in ("load.gemm", "load.copy")]
    records = run(ask("fine"), *loading, watch=watching(counter))
    watch = records["load.counters"]
    assert watch.status is Status.ANSWERED
    assert values(watch) == {("ecc_errors", "0"): 6, ("ecc_errors", "1"): 0, ("temperature_peak", "0"): 16.0}
    assert watch.evidence == (
        "ecc_errors of 0 grew by 3 during load.gemm",
        "ecc_errors of 0 grew by 3 during load.copy",
    )
    assert records["load.gemm"].status is records["load.copy"].status is Status.ANSWERED


def test_samples_during_a_check_are_taken_while_it_runs(counter: Path) -> None:
    loading = ask("loads", "load.gemm", params={"file": str(counter), "seconds": 1.5}, loads=True)
    watch = run(loading, watch=watching(counter, every=0.2))["load.counters"]
    assert values(watch)["ecc_errors", "0"] == 3
    assert watch.seconds >= 1.5


def test_a_counter_that_was_reset_under_load_counts_from_zero_and_is_told(counter: Path) -> None:
    loading = ask("loads_and_resets", "load.gemm", params={"file": str(counter)}, loads=True)
    watch = run(loading, watch=watching(counter))["load.counters"]
    assert values(watch)["ecc_errors", "0"] == 2
    assert "ecc_errors of 0 was reset from 10 during load.gemm" in watch.evidence


def test_a_device_that_is_lost_under_load_has_null_growth_never_zero(counter: Path) -> None:
    loading = ask("loads_and_loses", "load.gemm", params={"file": str(counter)}, loads=True)
    watch = run(loading, watch=watching(counter))["load.counters"]
    assert values(watch)["ecc_errors", "0"] is None
    assert values(watch)["ecc_errors", "1"] is None
    assert any(line.startswith("ecc.grows: unsupported: ") for line in watch.evidence)
    assert "ecc_errors of 0: no value after load.gemm" in watch.evidence


def test_a_watch_without_its_tool_says_so(counter: Path) -> None:
    watch = WatchRequest((Watched(ask("lacks_its_tool"), {"errors": "errors"}),))
    record = run(ask("loads", "load.gemm", params={"file": str(counter)}, loads=True), watch=watch)[
        "load.counters"
    ]
    assert record.status is Status.UNSUPPORTED
    assert "no such program" in record.detail


@pytest.mark.parametrize("function", ["grows_but_is_refused", "hangs_in_a_command"])
def test_counters_of_a_collector_that_never_answered_are_null_and_the_evidence_says_why(
    counter: Path, function: str
) -> None:
    broken = ask(function, lane="links", timeout=0.5)
    collect = (*watching(counter).collect, Watched(broken, {"down": "links_down", "flaps": "links_flaps"}))
    loading = ask("loads", "load.gemm", params={"file": str(counter)}, loads=True)
    watch = run(loading, watch=WatchRequest(collect))["load.counters"]
    assert watch.status is Status.ANSWERED
    assert values(watch)["ecc_errors", "0"] == 3
    assert values(watch)["links_down", None] is None
    assert values(watch)["links_flaps", None] is None
    assert watch.evidence[0].startswith(f"links.{function}: ")


@pytest.mark.parametrize("fields", [{}, {"needs": "ascend"}])
def test_counters_that_this_node_does_not_keep_stay_out(counter: Path, fields: dict[str, str]) -> None:
    lacking = ask("lacks_its_tool" if not fields else "grows", "rdma.counters", **fields)
    collect = (*watching(counter).collect, Watched(lacking, {"errors": "rdma_errors"}))
    loading = ask("loads", "load.gemm", params={"file": str(counter)}, loads=True)
    watch = run(loading, watch=WatchRequest(collect))["load.counters"]
    assert watch.status is Status.ANSWERED
    assert {metric for metric, _ in values(watch)} == {"ecc_errors", "temperature_peak"}


def test_a_counter_that_could_never_be_read_is_unknown_to_the_judge(counter: Path) -> None:
    rules = compile_rules(load_catalogue())
    one, other, *_ = rules.checks["load.counters"].limited
    sound = ask("grows", lane="ecc", params={"file": str(counter)})
    broken = ask("grows_but_is_refused", lane="links")
    collect = (Watched(sound, {"errors": one.metric}), Watched(broken, {"errors": other.metric}))
    watch = run(ask("fine", "load.gemm", loads=True), watch=WatchRequest(collect))["load.counters"]
    judged = judge(rules, "load.counters", watch)
    assert judged.outcome is Outcome.UNKNOWN
    assert [finding.metric for finding in judged.findings] == [other.metric]


def test_nothing_is_sampled_when_nothing_loads_the_node(counter: Path) -> None:
    loading = ask("loads", "load.gemm", params={"file": str(counter)}, loads=True, needs="ascend")
    records = run(ask("fine"), loading, watch=watching(counter))
    assert records["load.gemm"].status is Status.NOT_APPLICABLE
    assert records["load.counters"].status is Status.NOT_APPLICABLE


def test_a_watch_that_the_budget_cut_off_is_a_timeout_not_a_zero(counter: Path) -> None:
    loading = ask("hangs_in_python", "load.gemm", timeout=60.0, loads=True)
    records = run(loading, watch=watching(counter), budget=1.5)
    assert records["load.counters"].status is Status.TIMEOUT
    assert records["load.counters"].measures == ()

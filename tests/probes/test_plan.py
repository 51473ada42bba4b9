"""Which checks a plan has, and which of them a node is spared."""

from __future__ import annotations

from pathlib import Path

import pytest

from inventory.errors import UsageError
from inventory.fleet import Node
from probes.catalogue import Catalogue, load_catalogue
from probes.counters import WATCH_CHECK, watch_request
from probes.model import CheckRecord, Status
from probes.plan import in_use, make_plan, withheld
from probes.profiles import RuleBook
from tests.probes.catalogues import PROFILE, answered, catalogue, profiles


@pytest.fixture
def checks(tmp_path: Path) -> Catalogue:
    return catalogue(tmp_path)


def names(plan: object) -> list[str]:
    return [name.removeprefix("accelerator.") for name in plan.names]  # type: ignore[attr-defined]


def test_a_larger_plan_contains_the_smaller_one() -> None:
    everything = load_catalogue()
    quick, standard, all_of_it = (
        set(make_plan(everything, level).names) for level in ("quick", "standard", "comprehensive")
    )
    assert quick < standard <= all_of_it == set(everything.checks)


def test_the_quick_plan_that_ships_loads_nothing() -> None:
    assert make_plan(load_catalogue(), "quick").loading == ()


@pytest.mark.parametrize(
    ("only", "exclude", "left"),
    [
        ([], [], ["count", "ecc", "processes", "versions"]),
        (["accelerator.ecc"], [], ["ecc"]),
        (["accelerator.[cv]*"], [], ["count", "versions"]),
        (["ecc"], [], ["ecc"]),
        (["accelerator"], ["idle,accelerator.ecc"], ["count", "versions"]),
        (["accelerator.ecc, accelerator.count"], [], ["count", "ecc"]),
        ([], ["memory", "accelerator.v*"], ["count", "processes"]),
        (["accelerator.gemm"], [], ["gemm"]),
    ],
)
def test_checks_are_chosen_and_excluded_by_name_glob_family_and_tag(
    checks: Catalogue, only: list[str], exclude: list[str], left: list[str]
) -> None:
    assert names(make_plan(checks, "quick", only, exclude)) == left


def test_a_name_that_fits_nothing_is_answered_with_the_nearest(checks: Catalogue) -> None:
    with pytest.raises(UsageError, match=r"'accelerator.eec' .*did you mean accelerator.ecc"):
        make_plan(checks, "quick", ["accelerator.eec"])
    with pytest.raises(UsageError, match="fits only checks of larger plans; add --standard"):
        make_plan(checks, "quick", ["accelerator.g*"])
    with pytest.raises(UsageError, match="every check of the plan is excluded"):
        make_plan(checks, "quick", exclude=["accelerator"])


def test_a_sku_can_leave_checks_out(checks: Catalogue, tmp_path: Path) -> None:
    book = RuleBook(checks, profiles(tmp_path, checks, PROFILE + "skip: [accelerator.ecc]\n"))
    plan = make_plan(checks, "quick")
    assert withheld(plan, book.kind(Node("n", sku="h100"))) == {"accelerator.ecc": "sku:h100 leaves it out"}
    assert withheld(plan, book.kind(Node("n"))) == {}


def test_processes_on_the_accelerators_are_somebodys_work(checks: Catalogue) -> None:
    busy = answered("accelerator.processes", ("running", 0, "0"), ("running", 2, "1"))
    idle = answered("accelerator.processes", ("running", 0, "0"))
    assert in_use(checks, {busy.check: busy}) == "the node is in use: processes are on its accelerators (1)"
    assert in_use(checks, {idle.check: idle}) == ""


@pytest.mark.parametrize(
    "record",
    [
        CheckRecord("accelerator.processes", Status.TIMEOUT, detail="'smi' did not end"),
        CheckRecord("accelerator.processes", Status.ERROR, detail="could not be understood"),
        answered("accelerator.processes", ("running", 0, "0"), ("running", None, "1")),
    ],
)
def test_a_node_is_not_loaded_where_nobody_could_see_whether_it_is_in_use(
    checks: Catalogue, record: CheckRecord
) -> None:
    assert "nobody could see" in in_use(checks, {record.check: record})


@pytest.mark.parametrize("status", [Status.UNSUPPORTED, Status.NOT_APPLICABLE])
def test_a_node_that_has_nothing_to_ask_may_be_loaded(checks: Catalogue, status: Status) -> None:
    record = CheckRecord("accelerator.processes", status)
    assert in_use(checks, {record.check: record}) == ""


def test_the_check_that_ships_for_processes_is_the_one_that_is_asked() -> None:
    busy = answered("accelerator.processes", ("running", 1, "0"))
    assert in_use(load_catalogue(), {busy.check: busy})


def test_every_counter_is_watched_under_load_and_may_not_grow(checks: Catalogue) -> None:
    watch = checks.check(WATCH_CHECK)
    assert watch.spec.level == "standard"
    assert {name: (str(d.fail), str(d.warn)) for name, d in watch.demands.items()} == {
        "accelerator_ecc_uncorrectable": ("== 0", "None"),
        "accelerator_ecc_correctable": ("None", "== 0"),
    }
    request = watch_request(checks, (), {})
    assert request is not None
    (watched,) = request.collect
    assert dict(watched.counters) == {
        "uncorrectable": "accelerator_ecc_uncorrectable",
        "correctable": "accelerator_ecc_correctable",
    }
    assert watch_request(checks, {"accelerator.ecc"}, {}) is None

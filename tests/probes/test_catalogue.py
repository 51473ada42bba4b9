"""Loading the catalogue: what ships is sound, and every mistake in a person's file is told with its line."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import pytest

from inventory.errors import UsageError
from probes.catalogue import BUILT_IN, load_catalogue
from probes.counters import WATCH_CHECK
from probes.profiles import load_profiles

GOOD = """\
schema: ltpctl/checks/1
family: site
checks:
  site.fans:
    what: Fans turn.
    why: Heat.
    fix: Clean them.
    level: quick
    command: [sensors, -j]
    parse: {kind: json, fields: {speed: "fan1.input"}}
    metrics:
      speed: {what: speed, unit: rpm, limit: {fail: "> 0", warn: ">= 1000"}}
"""


def write(folder: Path, text: str, name: str = "site.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_what_ships_loads_and_every_function_that_it_names_exists() -> None:
    catalogue = load_catalogue()
    assert len(catalogue) > 20
    for check in catalogue:
        if check.spec.collect is not None and check.name != WATCH_CHECK:
            module, _, function = f"{check.family}.{check.spec.collect}".rpartition(".")
            module = module.rpartition(".")[2]
            found = getattr(importlib.import_module(f"probes.checks.{module}"), function, None)
            assert callable(found), f"{check.name}: {check.spec.collect}"


def test_every_profile_that_ships_names_only_checks_and_metrics_that_exist() -> None:
    profiles = load_profiles(load_catalogue())
    assert {"h100-sxm", "h200-sxm", "b200-sxm", "mi250x", "mi300x", "generic-cpu"} <= set(profiles.by_name)
    for profile in profiles.by_name.values():
        for name, demand in profile.demands.items():
            assert demand.source in {f"sku:{profile.name}", f"sku:{profile.extends}"}
            assert demand.reference or name.startswith("accelerator.count"), (
                f"{profile.name}: {name} has no source"
            )


def test_every_limit_that_ships_says_where_it_comes_from() -> None:
    lacking = [
        f"{check.name}.{metric}"
        for check in load_catalogue()
        for metric, demand in check.demands.items()
        if not demand.reference
    ]
    assert lacking == []


def test_loading_what_ships_takes_little_of_a_command() -> None:
    load_catalogue()
    start = time.process_time()
    load_catalogue()
    assert time.process_time() - start < 1.0


def test_a_persons_file_adds_its_checks_with_parsed_limits(tmp_path: Path) -> None:
    check = load_catalogue([write(tmp_path, GOOD)]).check("site.fans")
    assert not check.built_in
    assert check.origin.endswith("site.yaml:4")
    demand = check.demands["speed"]
    assert (str(demand.fail), str(demand.warn), demand.source) == ("> 0", ">= 1000", "default")


def test_a_folder_stands_for_the_yaml_files_in_it(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    write(tmp_path, "not yaml: [", "notes.txt")
    assert "site.fans" in load_catalogue([tmp_path]).checks


def test_a_file_given_twice_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert "site.fans" in load_catalogue([path, tmp_path]).checks


def test_a_name_given_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    first, second = write(tmp_path, GOOD, "a.yaml"), write(tmp_path, GOOD, "b.yaml")
    with pytest.raises(UsageError) as error:
        load_catalogue([first, second])
    assert f"{second}:4" in str(error.value)
    assert f"{first}:4" in str(error.value)


def test_an_adapter_is_read_with_the_checks(tmp_path: Path) -> None:
    text = """\
schema: ltpctl/adapter/1
vendor: acme
what: Acme X1
recognise: {pci: ["1abc:*"]}
command: [acme-smi, --json]
checks:
  temperature:
    parse: {kind: json, devices: cards, fields: {core: temp}}
    limits: {core: {fail: "< 100", reference: "Acme data sheet"}}
"""
    check = load_catalogue([write(tmp_path, text)]).check("acme.temperature")
    assert str(check.demands["core"].fail) == "< 100"
    assert check.spec.needs == "1abc:*"
    with pytest.raises(UsageError, match=r"site.yaml:9: checks.temperature.limits.core.fail: .*not a limit"):
        load_catalogue([write(tmp_path, text.replace("< 100", "cool"))])


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ('fail: "> 0"', 'fail: "> none"', 12, "'none' is not a number"),
        ('warn: ">= 1000"', 'warn: "fast"', 12, "is not a limit"),
        ('limit: {fail: "> 0", warn: ">= 1000"}', "limit: {reference: x}", 12, "neither 'fail' nor 'warn'"),
        ("site.fans:", "other.fans:", 4, "must start with the family"),
        ("level: quick", "level: fast", 8, "quick"),
        ("    why: Heat.\n", "", 4, "required"),
        ("    command: [sensors, -j]\n", "", 4, "exactly one of"),
        ("command: [sensors, -j]", "collect: fans", 9, "only built-in checks are functions"),
        ("command: [sensors, -j]", "command: []", 9, "a program"),
        ('    parse: {kind: json, fields: {speed: "fan1.input"}}\n', "", 4, "required beside 'command'"),
        ("fields: {speed:", "fields: {sped:", 10, "did you mean speed"),
        ('kind: json, fields: {speed: "fan1.input"}', "kind: regex", 10, "required for kind 'regex'"),
        (
            'kind: json, fields: {speed: "fan1.input"}',
            "kind: regex, pattern: '(?P<speed>'",
            10,
            "not a regular",
        ),
        ('kind: json, fields: {speed: "fan1.input"}', "kind: regex, pattern: '(?P<rpm>.)'", 10, "'rpm'"),
        ("level: quick", "level: quick\n    shell: true", 9, "exactly one text"),
        ("level: quick", "level: quick\n    timeout: 0", 9, "greater than 0"),
        ("schema: ltpctl/checks/1", "schema: ltpctl/check/1", 1, "expected ltpctl/checks/1"),
    ],
)
def test_a_mistake_is_told_with_file_line_and_advice(
    tmp_path: Path, old: str, new: str, line: int, says: str
) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(UsageError) as error:
        load_catalogue([path])
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_that_does_not_exist_is_told() -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_catalogue(["/nonexistent/checks"])


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    catalogue = load_catalogue()
    with pytest.raises(UsageError, match=r"did you mean .*host\.memory"):
        catalogue.check("host.memroy")
    with pytest.raises(UsageError, match="no metric is called"):
        catalogue.metric("host.memory.nothing")


def test_the_catalogue_lies_where_the_program_looks_for_it() -> None:
    assert BUILT_IN.is_dir()

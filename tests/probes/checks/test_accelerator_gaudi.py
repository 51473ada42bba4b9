"""Intel Gaudi devices, by hl-smi."""

import pytest

from probes.agent.api import TimedOut, Unsupported
from probes.checks import gaudi
from probes.model import Outcome
from tests.probes.checks.accelerator_nodes import collect, drivers, findings, fixture, passes, pci_files
from tests.probes.replay import Answer, ReplayHost

BUSES = tuple(f"0000:{bus}:00.0" for bus in ("19", "1a", "33", "34", "9a", "9b", "b3", "b4"))
ROWS = fixture("gaudi/hl-smi-query.csv").splitlines()
PORTS = fixture("gaudi/hl-smi-link.txt")


def node(query: Answer | None = None, ports: Answer = PORTS, status: str = "Operational") -> ReplayHost:
    """Eight cards; `ports` and `status` are those of card 4."""
    files = pci_files(BUSES, "1da3:1020", "0x120000")
    for number in range(8):
        files[f"/sys/class/accel/accel{number}/device/status"] = status if number == 4 else "Operational"
    commands: dict[tuple[str, ...], Answer] = {gaudi.QUERY: "\n".join(ROWS) if query is None else query}
    commands |= {gaudi.link_command(bus): ports if bus == BUSES[4] else PORTS for bus in BUSES}
    commands[gaudi.LIST] = "AIP 0: HL-225\n"
    return ReplayHost(files=files, links=drivers(BUSES, "habanalabs"), commands=commands)


def row(column: str, text: str) -> str:
    """The query's answer with one field of card 4 changed."""
    cells = ROWS[4].split(", ")
    cells[gaudi.PROPERTIES.index(column)] = text
    return "\n".join([*ROWS[:4], ", ".join(cells), *ROWS[5:]])


ALL = [
    "count",
    "tool_responds",
    "versions",
    "health",
    "ecc",
    "throttle",
    "temperature",
    "power",
    "idle_memory",
    "links",
    "pcie",
]


@pytest.mark.parametrize("check", ALL)
def test_a_healthy_gaudi_2_node_passes_every_check(check: str) -> None:
    assert passes(check, node(), sku="gaudi2")


@pytest.mark.parametrize(
    ("check", "column", "text", "metric", "outcome"),
    [
        ("ecc", "ecc.errors.uncorrected.volatile.total", "2", "uncorrectable", Outcome.FAIL),
        ("throttle", "stats.violation.thermal", "1", "thermal", Outcome.FAIL),
        ("idle_memory", "memory.used", "40000 MiB", "excess", Outcome.WARN),
        ("idle_memory", "memory.total", "32768 MiB", "total", Outcome.FAIL),
        ("temperature", "temperature.aip", "ERR!", "core", Outcome.FAIL),
    ],
)
def test_a_fault_of_one_card_is_found_and_names_it(
    check: str, column: str, text: str, metric: str, outcome: Outcome
) -> None:
    found = findings(check, node(row(column, text)), sku="gaudi2")
    assert {key: finding.outcome for key, finding in found.items()} == {(metric, "4"): outcome}


def test_a_port_that_is_down_fails_and_is_named() -> None:
    host = node(ports=PORTS.replace("port 11:\tUP", "port 11:\tDOWN"))
    found = findings("links", host, sku="gaudi2")
    assert set(found) == {("down", "4"), ("up", "4")}
    assert "card 4: ports not up: 11" in host.evidence


def test_a_card_that_the_driver_does_not_call_operational_fails() -> None:
    assert findings("health", node(status="Malfunctioning"))["state", "accel4"].outcome is Outcome.FAIL


def test_a_card_that_hl_smi_does_not_list_makes_the_count_short() -> None:
    found = findings("count", node("\n".join(ROWS[:4] + ROWS[5:])), sku="gaudi2")
    assert set(found) == {("missing", BUSES[4]), ("count", None)}


@pytest.mark.parametrize("answer", ["", "one, two\n", "\n".join(ROWS).replace("27 C", "warm")])
def test_an_answer_that_cannot_be_understood_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError):
        collect("temperature", node(answer))
    with pytest.raises(ValueError):
        collect("links", node(ports="no such device\n"))


def test_a_missing_tool_is_unsupported_and_a_hanging_one_a_timeout() -> None:
    with pytest.raises(Unsupported, match="hl-smi"):
        collect("ecc", ReplayHost(files=pci_files(BUSES, "1da3:1020", "0x120000")))
    with pytest.raises(TimedOut):
        collect("ecc", node(TimedOut("hl-smi")))

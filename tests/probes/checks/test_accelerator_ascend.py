# ruff: noqa: E501 - lines stand here as the tools and drivers print them
"""Huawei Ascend devices, by npu-smi and hccn_tool."""

import pytest

from probes.agent.api import TimedOut, Unsupported
from probes.checks import ascend
from probes.model import Outcome
from tests.probes.checks.accelerator_nodes import (
    collect,
    drivers,
    findings,
    fixture,
    passes,
    pci_files,
    values,
)
from tests.probes.replay import Answer, ReplayHost

BUSES = tuple(f"0000:{bus}:00.0" for bus in ("c1", "c2", "81", "82", "01", "02", "41", "42"))
INFO = fixture("ascend/npu-smi-info.txt")


def node(
    info: Answer = INFO,
    ecc: dict[str, str] | None = None,
    link: Answer = "link status: UP\n",
    health: str = "",
) -> ReplayHost:
    """Eight chips; `ecc`, `link` and `health` are those of chip 5."""
    commands: dict[tuple[str, ...], Answer] = {ascend.INFO: info, ascend.LIST: "        Total Count : 8\n"}
    for number in range(8):
        card = str(number)
        for topic in ("ecc", "board", "common"):
            text = fixture(f"ascend/npu-smi-{topic}.txt").replace("{card}", card)
            for key, count in (ecc or {}).items() if topic == "ecc" and number == 5 else ():
                old = next(line for line in text.splitlines() if line.strip().startswith(key))
                text = text.replace(old, old[:-1] + count)
            commands["npu-smi", "info", "-t", topic, "-i", card] = text
        commands["npu-smi", "info", "-t", "health", "-i", card] = health
        commands["hccn_tool", "-i", card, "-link", "-g"] = link if number == 5 else "link status: UP\n"
    return ReplayHost(
        files=pci_files(BUSES, "19e5:d802", "0x120000"),
        links=drivers(BUSES, "devdrv_device_driver"),
        commands=commands,
    )


ALL = [
    "count", "tool_responds", "versions", "health", "ecc", "remapped_rows", "clocks", "temperature", "power", "idle_memory",
    "processes", "links", "pcie",
]  # fmt: skip


@pytest.mark.parametrize("check", ALL)
def test_a_healthy_910b_node_passes_every_check(check: str) -> None:
    assert passes(check, node(), sku="ascend910b")


@pytest.mark.parametrize(
    ("check", "key", "metric", "outcome"),
    [
        ("ecc", "HBM Double Bit Error Count", "uncorrectable", Outcome.FAIL),
        ("remapped_rows", "HBM Double Bit Next-Isolated Pages Count", "pending", Outcome.FAIL),
    ],
)
def test_memory_errors_of_one_chip_are_found_and_name_it(
    check: str, key: str, metric: str, outcome: Outcome
) -> None:
    found = findings(check, node(ecc={key: "3"}))
    assert {where: finding.outcome for where, finding in found.items()} == {(metric, "5"): outcome}
    assert found[metric, "5"].value == 3


def test_an_alarm_fails_with_its_code_in_the_evidence() -> None:
    lines = INFO.splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if line.startswith("| 5     910B3"))
    lines[at] = lines[at].replace("| OK            |", "| Alarm         |")
    told = (
        "        NPU ID                         : 5\n        Health                         : Alarm\n"
        "        Error Code                     : 80C98001\n        Error Information              : node type=AIC\n"
    )
    host = node("".join(lines), health=told)
    assert findings("health", host)["state", "5"].outcome is Outcome.FAIL
    assert host.evidence == ["NPU 5: Alarm, error 80C98001: node type=AIC"]


def test_a_network_port_that_is_down_fails() -> None:
    assert findings("links", node(link="link status: DOWN\n"))["down", "5"].outcome is Outcome.FAIL


def test_a_chip_that_npu_smi_does_not_list_makes_the_count_short() -> None:
    lines = INFO.splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if line.startswith("| 5     910B3"))
    found = findings("count", node("".join(lines[:at] + lines[at + 3 :])), sku="ascend910b")
    assert set(found) == {("missing", BUSES[5]), ("count", None)}


def test_a_process_is_found_on_its_chip() -> None:
    empty = (
        "| No running processes found in NPU 2                                                            |"
    )
    running = (
        "| 2       0                 | 4711          | python3                  | 1024                    |"
    )
    host = node(INFO.replace(empty, running))
    assert findings("processes", host)["running", "2"].outcome is Outcome.WARN
    assert host.evidence == ["NPU 2: pid 4711 python3"]


def test_the_chips_of_a_two_chip_card_are_told_apart() -> None:
    text = (
        "| npu-smi 24.1.0                   Version: 24.1.0                                               |\n"
        "| 0     Ascend910           | OK            | 160.1       38                0    / 0             |\n"
        "| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3000 / 65536         |\n"
        "| 0     Ascend910           | OK            | -           39                0    / 0             |\n"
        "| 1     1                   | 0000:9F:00.0  | 0           0    / 0          3001 / 65536         |\n"
    )
    assert [npu.device for npu in ascend.parse_info(text).npus] == ["0", "0.1"]
    host = ReplayHost(
        files=pci_files(["0000:9d:00.0"], "19e5:d803", "0x120000"), commands={ascend.INFO: text}
    )
    assert values(collect("power", host), "draw") == {"0": 160.1}


def test_a_board_controller_is_not_taken_for_a_chip() -> None:
    blocks = ascend.parse_blocks(fixture("ascend/npu-smi-common.txt"))
    assert ascend.of_chip(blocks, "0")["Temperature(C)"] == "37"
    assert ascend.of_chip(blocks, "1") == {}


@pytest.mark.parametrize("answer", ["", "dcmi module initialize failed. ret is -8005\n"])
def test_an_answer_that_cannot_be_understood_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="no table"):
        collect("health", node(answer))
    with pytest.raises(ValueError):
        collect("links", node(link="Cmd execution failed"))


def test_a_missing_tool_is_unsupported_and_a_hanging_one_a_timeout() -> None:
    with pytest.raises(Unsupported, match="npu-smi"):
        collect("ecc", ReplayHost(files=pci_files(BUSES, "19e5:d802", "0x120000")))
    with pytest.raises(TimedOut):
        collect("ecc", node(TimedOut("npu-smi info")))

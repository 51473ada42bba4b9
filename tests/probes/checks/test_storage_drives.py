"""NVMe, SMART and software RAID, from sysfs and from captured and documented output of the tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from probes.agent.api import Ran, Unsupported
from probes.checks import drives
from tests.probes.replay import ReplayHost

CAPTURES = Path(__file__).resolve().parents[4] / "shared/data/captures/storage"


def capture(name: str) -> str:
    if not CAPTURES.is_dir():
        pytest.skip("the captures in ../shared/data are absent")
    return (CAPTURES / name).read_text()


def values(measures: Any) -> dict[str, Any]:
    return {m.metric if m.device is None else f"{m.metric}[{m.device}]": m.value for m in measures}


def with_nvme(*states: str, commands: Any = None, transport: str = "pcie") -> ReplayHost:
    files = {}
    for i, state in enumerate(states):
        folder = f"/sys/class/nvme/nvme{i}/"
        files.update(
            {
                folder + "state": state + "\n",
                folder + "transport": transport + "\n",
                folder + "model": "SAMSUNG MZQL23T8HCLS-00A07              \n",
                folder + "firmware_rev": "GDC5602Q\n",
            }
        )
    return ReplayHost(files=files, commands=commands)


def test_controllers_are_counted_and_a_dead_one_is_found() -> None:
    host = with_nvme("live", "live", "dead")
    found = values(drives.nvme(host))
    assert found["count"] == 3
    assert found["not_live"] == 1
    assert found["firmware[nvme0]"] == "GDC5602Q"
    assert found["model[nvme1]"] == "SAMSUNG MZQL23T8HCLS-00A07"
    assert host.evidence == ["nvme2 is dead"]


def test_controllers_of_other_machines_are_not_this_node_s_drives() -> None:
    assert values(drives.nvme(with_nvme("live", transport="tcp")))["count"] == 0


def smart_of(set_name: str) -> tuple[dict[str, Any], ReplayHost]:
    commands = {
        ("smartctl", "-j", "-a", f"/dev/nvme{i}"): capture(f"{set_name}/nvme{i}.json") for i in range(4)
    }
    host = with_nvme("live", "live", "live", "live", commands=commands)
    return values(drives.smart(host)), host


def test_four_sound_drives_as_smartctl_reports_them() -> None:
    found, host = smart_of("smartctl-cache_good")
    assert found["drives"] == 4
    for i in range(4):
        assert found[f"distrusts_itself[nvme{i}]"] == 0
        assert found[f"contradicts_itself[nvme{i}]"] == 0
        assert found[f"media_errors[nvme{i}]"] == 0
        assert found[f"spare_above_threshold[nvme{i}]"] == 90
    assert found["temperature[nvme0]"] == 42
    assert host.evidence == []


def test_a_drive_that_has_lost_its_own_counters_is_found() -> None:
    found, host = smart_of("smartctl-cache_slot2_bad_smartdata")
    assert [found[f"contradicts_itself[nvme{i}]"] for i in range(4)] == [0, 0, 0, 1]
    assert host.evidence == ["nvme3: 6331 hours of power but not one power cycle"]


SMART_LOG = {
    "critical_warning": 0,
    "temperature": 311,
    "avail_spare": 100,
    "spare_thresh": 10,
    "percent_used": 2,
    "data_units_read": 344350,
    "power_cycles": 20,
    "power_on_hours": "5,699",
    "unsafe_shutdowns": 15,
    "media_errors": 0,
}
"""``nvme smart-log -o json``: names of libnvme's struct nvme_smart_log; some versions write large numbers
as text."""


def by_nvme_cli(**changes: Any) -> tuple[dict[str, Any], ReplayHost]:
    text = json.dumps({**SMART_LOG, **changes})
    host = with_nvme("live", commands={("nvme", "smart-log", "-o", "json", "/dev/nvme0"): text})
    return values(drives.smart(host)), host


def test_a_sound_drive_as_nvme_cli_reports_it() -> None:
    found, _ = by_nvme_cli()
    assert found["temperature[nvme0]"] == 38
    assert found["percentage_used[nvme0]"] == 2
    assert found["power_on_hours[nvme0]"] == 5699
    assert found["distrusts_itself[nvme0]"] == 0


@pytest.mark.parametrize(
    ("changes", "metric", "value"),
    [
        ({"critical_warning": 4}, "distrusts_itself", 1),
        ({"critical_warning": {"value": 8, "ro": 1}}, "distrusts_itself", 1),
        ({"critical_warning": 2}, "distrusts_itself", 0),
        ({"critical_warning": 2}, "critical_warning", 2),
        ({"media_errors": 7}, "media_errors", 7),
        ({"percent_used": 104}, "percentage_used", 104),
        ({"avail_spare": 5}, "spare_above_threshold", -5),
    ],
)
def test_each_sign_of_a_failing_drive_is_reported(changes: Any, metric: str, value: int) -> None:
    found, _ = by_nvme_cli(**changes)
    assert found[metric + "[nvme0]"] == value


ATA = {
    "smartctl": {"exit_status": 8},
    "device": {"name": "/dev/sda", "type": "sat", "protocol": "ATA"},
    "smart_status": {"passed": False},
    "ata_smart_attributes": {
        "table": [
            {"id": 5, "name": "Reallocated_Sector_Ct", "raw": {"value": 136, "string": "136"}},
            {"id": 197, "name": "Current_Pending_Sector", "raw": {"value": 8, "string": "8"}},
            {"id": 198, "name": "Offline_Uncorrectable", "raw": {"value": 3, "string": "3"}},
        ]
    },
    "temperature": {"current": 31},
}
"""``smartctl -j -a`` of an ATA disk, reduced from smartmontools 7's JSON; bit 3 of the status: failing."""


def test_a_failing_ata_disk_is_read_though_smartctl_ends_with_a_status() -> None:
    host = ReplayHost(
        files={"/sys/block/sda/size": "1\n"},
        commands={("smartctl", "-j", "-a", "/dev/sda"): Ran(8, json.dumps(ATA), "")},
    )
    assert values(drives.smart(host)) == {
        "drives": 1,
        "distrusts_itself[sda]": 1,
        "reallocated_sectors[sda]": 136,
        "pending_sectors[sda]": 8,
        "temperature[sda]": 31,
    }


def test_a_smartctl_that_may_not_open_the_drive_is_unsupported_with_its_words() -> None:
    said = {
        "smartctl": {"messages": [{"string": "Smartctl open device: /dev/nvme0 failed: Permission denied"}]}
    }
    host = with_nvme("live", commands={("smartctl", "-j", "-a", "/dev/nvme0"): Ran(2, json.dumps(said), "")})
    with pytest.raises(Unsupported, match="Permission denied"):
        list(drives.smart(host))


@pytest.mark.parametrize(
    ("said", "ending"), [("Permission denied", Unsupported), ("passthru: Input/output error", ValueError)]
)
def test_a_login_without_rights_is_told_from_a_drive_that_fails(said: str, ending: type[Exception]) -> None:
    argv = ("nvme", "smart-log", "-o", "json", "/dev/nvme0")
    with pytest.raises(ending, match=said[-6:]):
        list(drives.smart(with_nvme("live", commands={argv: Ran(1, "", "/dev/nvme0: " + said)})))


def test_drives_without_a_tool_are_unsupported_and_no_drives_are_not() -> None:
    with pytest.raises(Unsupported, match="neither smartctl nor nvme"):
        list(drives.smart(with_nvme("live")))
    assert values(drives.smart(ReplayHost())) == {"drives": 0, "distrusts_itself": 0}


@pytest.mark.parametrize("text", ["", "Smart Log for NVME device", "[]", '{"temperature": 311}'])
def test_malformed_output_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"smart-log|object"):
        drives.parse_nvme_cli(text)


SOUND = """\
Personalities : [raid1] [raid6] [raid5] [raid4]
md0 : active raid1 sdb1[1] sda1[0]
      1046528 blocks super 1.2 [2/2] [UU]

md1 : active raid5 nvme2n1[3] nvme1n1[1] nvme0n1[0]
      7501212672 blocks super 1.2 level 5, 512k chunk, algorithm 2 [3/3] [UUU]
      bitmap: 2/28 pages [8KB], 65536KB chunk

unused devices: <none>
"""
"""The layout of drivers/md/md.c's md_seq_show."""


def raid(text: str) -> tuple[dict[str, Any], ReplayHost]:
    host = ReplayHost(files={"/proc/mdstat": text})
    return values(drives.raid(host)), host


def test_sound_arrays_lack_no_member() -> None:
    found, host = raid(SOUND)
    assert found["arrays"] == 2
    assert found["missing_members[md0]"] == found["missing_members[md1]"] == 0
    assert host.evidence == []


def test_a_degraded_array_is_found_and_shown() -> None:
    text = SOUND.replace("sdb1[1] sda1[0]", "sdb1[1](F) sda1[0]").replace("[2/2] [UU]", "[2/1] [U_]")
    found, host = raid(text)
    assert found["missing_members[md0]"] == 1
    assert found["failed_members[md0]"] == 1
    assert found["missing_members[md1]"] == 0
    assert "[2/1] [U_]" in host.evidence[0]


def test_an_array_that_did_not_start_is_found() -> None:
    found, _ = raid(
        "Personalities : [raid0]\nmd2 : inactive sdc1[0](S)\n      1000 blocks super 1.2\n\nunused devices:\n"
    )
    assert found["missing_members[md2]"] == 1


def test_without_the_driver_there_are_no_arrays_and_other_text_is_an_error() -> None:
    assert values(drives.raid(ReplayHost())) == {"arrays": 0, "missing_members": 0}
    with pytest.raises(ValueError, match="not /proc/mdstat"):
        raid("cat: permission denied\n")

"""Nodes with accelerators, made of fixtures, and what the catalogue says of what a check measures on them."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from probes import criteria
from probes.agent import api
from probes.catalogue import Catalogue, load_catalogue
from probes.checks import accelerator
from probes.model import CheckRecord, Finding, Measure, Outcome, Status
from probes.profiles import load_profiles
from tests.probes.replay import Answer, ReplayHost

FIXTURES = Path(__file__).parent.parent / "fixtures"

NVIDIA_QUERY = ("nvidia-smi", "-q", "-x")


def fixture(name: str) -> str:
    return (FIXTURES / name).read_text()


@functools.cache
def catalogue() -> Catalogue:
    return load_catalogue()


def params(check: str) -> dict[str, object]:
    """The catalogue's parameters of a check, as they travel."""
    return dict(catalogue().check(f"accelerator.{check}").spec.params)


def collect(check: str, host: ReplayHost) -> list[api.Measure]:
    """What the catalogue's function for ``accelerator.CHECK`` measures on `host`."""
    spec = catalogue().check(f"accelerator.{check}").spec
    assert spec.collect is not None
    host.params = {**dict(spec.params), **host.params}
    return list(getattr(accelerator, spec.collect)(host))


def judge(check: str, measures: Iterable[api.Measure], sku: str | None = None) -> criteria.Judged:
    """What the catalogue, and the profile of `sku`, say of these measures."""
    name = f"accelerator.{check}"
    overlays = [load_profiles(catalogue()).find(sku).demands] if sku else []
    rules = criteria.compile_rules(catalogue(), overlays)
    record = CheckRecord(
        name, Status.ANSWERED, measures=tuple(Measure(m.metric, m.device, m.value) for m in measures)
    )
    return criteria.judge(rules, name, record)


def findings(
    check: str, host: ReplayHost, sku: str | None = None
) -> dict[tuple[str | None, str | None], Finding]:
    """Failures and warnings of a check on a node, by metric and device."""
    judged = judge(check, collect(check, host), sku)
    return {(found.metric, found.device): found for found in judged.findings}


def passes(check: str, host: ReplayHost, sku: str | None = None) -> bool:
    judged = judge(check, collect(check, host), sku)
    assert judged.outcome is Outcome.PASS, [found.message for found in judged.findings]
    return True


def values(measures: Iterable[api.Measure], metric: str) -> dict[str | None, api.Scalar]:
    return {measure.device: measure.value for measure in measures if measure.metric == metric}


def pci_files(
    buses: Sequence[str],
    identity: str,
    pci_class: str = "0x030200",
    speed: str = "32.0 GT/s PCIe",
    width: str = "16",
    **others: str,
) -> dict[str, str | bytes | Exception]:
    """Sysfs of devices with the same ``vendor:device`` identity."""
    vendor, device = identity.split(":")
    files: dict[str, str | bytes | Exception] = {}
    for bus in buses:
        folder = f"/sys/bus/pci/devices/{bus}"
        facts = {
            "class": pci_class, "vendor": f"0x{vendor}", "device": f"0x{device}", "current_link_speed": speed,
            "max_link_speed": speed, "current_link_width": width, "max_link_width": width, "numa_node": "0",
            "aer_dev_correctable": "RxErr 0\nBadTLP 0\nTOTAL_ERR_COR 0\n",
            "aer_dev_nonfatal": "Undefined 0\nUnsupReq 0\nTOTAL_ERR_NONFATAL 0\n",
            "aer_dev_fatal": "Undefined 0\nTOTAL_ERR_FATAL 0\n",
            **others,
        }  # fmt: skip
        files.update({f"{folder}/{name}": text + "\n" for name, text in facts.items()})
    return files


def drivers(buses: Sequence[str], driver: str) -> dict[str, str]:
    return {f"/sys/bus/pci/devices/{bus}/driver": f"../../../../bus/pci/drivers/{driver}" for bus in buses}


HGX = tuple(f"0000:{bus:02x}:00.0" for bus in (0x19, 0x3B, 0x4C, 0x5D, 0x9B, 0xBB, 0xCB, 0xDB))


def nvidia_report(buses: Sequence[str] = HGX, changes: Mapping[int, Mapping[str, str]] | None = None) -> str:
    """``nvidia-smi -q -x`` of H100s; `changes`: GPU -> text in its part -> what stands there instead."""
    template = fixture("nvidia/gpu-hopper.xml")
    parts = []
    for number, bus in enumerate(buses):
        part = template.format(id=f"0000{bus.upper()}", number=number, serial=10 + number)
        for old, new in (changes or {}).get(number, {}).items():
            assert old in part
            part = part.replace(old, new)
        parts.append(part)
    head = (
        '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n<nvidia_smi_log>\n'
    )
    facts = "\t<driver_version>575.51.02</driver_version>\n\t<cuda_version>12.9</cuda_version>\n"
    return f"{head}{facts}\t<attached_gpus>{len(parts)}</attached_gpus>\n{''.join(parts)}</nvidia_smi_log>\n"


def hgx(
    report: Answer | None = None,
    commands: Mapping[tuple[str, ...], Answer] | None = None,
    files: Mapping[str, str | bytes | Exception] | None = None,
) -> ReplayHost:
    """An H100 node; `report` answers ``nvidia-smi -q -x``."""
    return ReplayHost(
        files={**pci_files(HGX, "10de:2330"), **(files or {})},
        links=drivers(HGX, "nvidia"),
        commands={NVIDIA_QUERY: nvidia_report() if report is None else report, **(commands or {})},
    )

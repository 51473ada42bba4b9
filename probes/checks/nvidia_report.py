"""The XML report of ``nvidia-smi -q -x``: one call that answers most checks of NVIDIA devices.

Formats: the DTDs nvsmi_device_v9 to v12 that the reports name, and the nvidia-smi manual page (fields, exit
statuses). Fields moved between drivers, so a field is looked up under all the names it has had.
"""

import re
from typing import Dict, List, NamedTuple, Optional
from xml.etree import ElementTree

from probes.agent.api import Host, Ran
from probes.checks import pci

QUERY = ("nvidia-smi", "-q", "-x")
SECONDS = 30.0
"""A healthy eight-GPU machine without persistence mode needs up to about ten."""

MEANING = {
    6: "it found no device, or a query failed",
    8: "a GPU's power cables are not attached",
    9: "the kernel module is not loaded",
    10: "the kernel found an interrupt problem with a GPU",
    12: "its library (libnvidia-ml) is not installed",
    14: "a GPU's InfoROM is corrupted",
    15: "a GPU has fallen off the bus or cannot be reached",
    18: "driver and library are of different versions: reboot, or reload the module",
}
"""Exit statuses. 6 to 15: nvidia-smi manual page, "Return value"; 18 comes with "version mismatch"."""

_LOST = re.compile(r"Unable to determine the device handle for GPU\s?([0-9A-Fa-f:.]+): (.*)")


class Gpu(NamedTuple):
    """One GPU of the report; `number` as CUDA counts them with CUDA_DEVICE_ORDER=PCI_BUS_ID."""

    number: str
    bus: str
    fields: ElementTree.Element

    def text(self, *paths: str) -> Optional[str]:
        """Text of the first of `paths` that the report has; None if it has none of them."""
        for path in paths:
            found = self.fields.find(path)
            if found is not None:
                return (found.text or "").strip()
        return None


class Report(NamedTuple):
    gpus: List[Gpu]
    lost: Dict[str, str]
    """Bus id -> what the tool said about a GPU that it could not open."""
    driver: str
    cuda: str
    failure: str
    """Why there is no GPU in the report; "" when there is one."""


def parse_report(ran: Ran) -> Report:
    """``nvidia-smi -q -x``, also when it fails. Raises ValueError for output that is neither."""
    lost = {pci.normal_bus(bus): said.strip() for bus, said in _LOST.findall(ran.out + "\n" + ran.err)}
    start = max(ran.out.find("<?xml"), 0)
    if "<nvidia_smi_log" not in ran.out:
        said = next((line.strip() for line in (ran.out + "\n" + ran.err).splitlines() if line.strip()), "")
        if not lost and ran.code == 0:
            raise ValueError("nvidia-smi -q -x: neither a report nor a known complaint: %r" % said[:200])
        meaning = MEANING.get(ran.code, "status %d" % ran.code)
        return Report([], lost, "", "", "nvidia-smi gave no report (%s): %s" % (meaning, said[:200]))
    end = ran.out.rfind("</nvidia_smi_log>")
    if end < 0:
        raise ValueError("nvidia-smi -q -x: the report is cut off")
    try:
        root = ElementTree.fromstring(ran.out[start : end + len("</nvidia_smi_log>")])
    except ElementTree.ParseError as error:
        raise ValueError("nvidia-smi -q -x: not well-formed XML: %s" % error) from None
    gpus = []
    for position, fields in enumerate(root.findall("gpu")):
        bus = fields.get("id") or fields.findtext("pci/pci_bus_id") or ""
        gpus.append(Gpu(str(position), pci.normal_bus(bus), fields))
    failure = "" if gpus else "nvidia-smi lists no GPU"
    driver, cuda = root.findtext("driver_version") or "", root.findtext("cuda_version") or ""
    return Report(gpus, lost, driver, cuda, failure)


def report(host: Host) -> Report:
    return parse_report(host.run(QUERY, timeout=SECONDS, ok=()))


def gpus(host: Host) -> List[Gpu]:
    """The GPUs that answer. Raises ValueError when none does."""
    found = report(host)
    for bus, said in found.lost.items():
        host.note("GPU %s: %s" % (bus, said))
    if not found.gpus:
        raise ValueError(found.failure)
    return found.gpus

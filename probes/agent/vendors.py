"""Which makes of accelerator this node has, from PCI classes and device nodes: small reads, no tool."""

import re
from typing import List, Optional, Set

from probes.agent.api import Host

ACCELERATOR_CLASSES = ("0x0302", "0x0380", "0x1200")
"""PCI classes (first two bytes): 3D controller, other display controller, processing accelerator."""
DISPLAY_CLASS = "0x0300"
"""VGA: an accelerator only from the makers below (a BMC has one too)."""

VENDORS = {"0x10de": "nvidia", "0x1002": "amd", "0x1da3": "gaudi", "0x19e5": "ascend"}
"""PCI vendor -> key. Source: https://pci-ids.ucw.cz/."""
VGA_VENDORS = ("nvidia", "amd")

DEVICE_NODES = {
    "nvidia": "/dev/nvidia[0-9]*",
    "amd": "/dev/kfd",
    "gaudi": "/dev/hl[0-9]*",
    "ascend": "/dev/davinci[0-9]*",
    "accelerator": "/dev/accel/accel[0-9]*",
}
"""What a container sees even where PCI is hidden from it."""


def present(host: Host) -> List[str]:
    """Sorted keys; ``accelerator`` stands for any, also one whose maker is not in the table."""
    found: Set[str] = set()
    for device in host.glob("/sys/bus/pci/devices/*"):
        pci_class = host.read_or(device + "/class")[:6]
        if pci_class != DISPLAY_CLASS and pci_class not in ACCELERATOR_CLASSES:
            continue
        vendor = VENDORS.get(host.read_or(device + "/vendor"), "")
        if pci_class in ACCELERATOR_CLASSES:
            found.update(filter(None, ("accelerator", vendor)))
        elif vendor in VGA_VENDORS:
            found.update(("accelerator", vendor))
    for vendor, pattern in DEVICE_NODES.items():
        if vendor not in found and host.glob(pattern):
            found.update(("accelerator", vendor))
    return sorted(found)


_PCI_IDS = re.compile(r"^[0-9a-f]{4}:([0-9a-f]{4}|\*)( [0-9a-f]{4}:([0-9a-f]{4}|\*))*$")


def shown(needs: str, host: Host) -> Optional[bool]:
    """Whether the node has what an adapter's check is about. None if `needs` has neither of these forms:
    PCI ids (``1e52:401e``, ``1e52:*``, several with blanks between), or a pattern of device nodes."""
    if needs.startswith("/dev/"):
        return bool(host.glob(needs))
    if not _PCI_IDS.match(needs):
        return None
    wanted = set(needs.split())
    for device in host.glob("/sys/bus/pci/devices/*"):
        vendor = host.read_or(device + "/vendor")[2:]
        if {vendor + ":*", vendor + ":" + host.read_or(device + "/device")[2:]} & wanted:
            return True
    return False

"""What a maker's module gives to the checks of the family ``accelerator``."""

from typing import Callable, Dict, List, Mapping, NamedTuple, Tuple

from probes.agent.api import Host, Measure


class Listed(NamedTuple):
    """The devices that a maker's tool knows. Bus ids as sysfs writes them."""

    usable: Dict[str, str]
    """Bus id -> the tool's own number for it."""
    lost: Dict[str, str]
    """Bus id -> what the tool said about a device that it cannot reach."""


class Vendor(NamedTuple):
    key: str
    """As in `needs` of a check."""
    name: str
    tools: Tuple[Tuple[str, ...], ...]
    """Each tool's shortest command that asks every device, the newest tool first."""
    listed: Callable[[Host], Listed]
    checks: Mapping[str, Callable[[Host], List[Measure]]]
    """Last name of a check -> how this maker answers it. What is absent cannot be asked of its tool."""

"""What an inventory leaves unsaid or says oddly: nothing that is refused, much that costs later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from inventory.fleet import Fleet, Node, fold


def review(fleet: Fleet, exists: Callable[[str], bool]) -> list[str]:
    """One line for each thing worth a look. `exists` tells whether a key or password file is there."""
    nodes = list(fleet.nodes.values())
    notes: list[str] = []

    def note(found: list[Node], say: str) -> None:
        if found:
            notes.append(f"{fold(node.name for node in found)}: {say}")

    note(
        [n for n in nodes if n.sku is None],
        "no SKU; limits of a SKU profile cannot apply, only peers and baselines",
    )
    note(
        [n for n in nodes if n.accelerators is None],
        "number of accelerators not given; a missing one goes unseen",
    )
    for label in ("rack", "switch"):
        if any(label in node.labels for node in nodes):
            note([n for n in nodes if label not in n.labels], f"no label {label}, which other nodes have")
    same: dict[object, list[Node]] = defaultdict(list)
    for node in nodes:
        same["local" if node.local else (node.host, node.port or 22, node.jump)].append(node)
    for found in same.values():
        if len(found) > 1:
            where = "are all this machine" if found[0].local else f"have the same address {found[0].host}"
            notes.append(f"{fold(node.name for node in found)}: {where}; checks would disturb each other")
    controllers: dict[str, list[Node]] = defaultdict(list)
    keys: dict[str, list[Node]] = defaultdict(list)
    passwords: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        if node.identity is not None:
            keys[node.identity].append(node)
        if node.bmc is not None:
            controllers[node.bmc.address].append(node)
            if node.bmc.password_file is not None:
                passwords[node.bmc.password_file].append(node)
    for address, found in controllers.items():
        note(found if len(found) > 1 else [], f"share the BMC {address}; one power cycle would hit them all")
    for path, found in (*keys.items(), *passwords.items()):
        note([] if exists(path) else found, f"the file {path} does not exist here")
    notes += [f"group {group} has no member" for group, members in fleet.groups.items() if not members]
    return notes

"""Slurm: what ``scontrol show node`` prints, with or without ``--oneliner``.

Partitions become groups, features labels, Gres accelerators; the state stays a variable, for Slurm's view
of a node is not the ledger's. Field names and forms: the scontrol manual page of Slurm 22.05 to 23.11.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator

from inventory.document import read_text
from inventory.errors import DocumentError, UsageError
from inventory.fleet import Fleet, Node
from inventory.nodeset import NAME

ACCELERATORS = frozenset({"gpu", "npu", "hpu", "xpu", "tpu", "dcu", "gcu", "mlu"})
"""Gres names that stand for whole accelerators; shares of one (mps, shard) do not."""

ANSWER_SECONDS = 60


def recognises(path: str, text: str) -> bool:
    return re.search(r"^\s*NodeName=", text, re.MULTILINE) is not None


def read(path: str, text: str | None = None) -> Fleet:
    """The fleet that Slurm knows; an empty `path` asks ``scontrol``, else the path holds its output."""
    if text is None:
        text = read_text(path) if path else _ask()
    source = path or "scontrol show node"
    nodes: list[Node] = []
    groups: dict[str, list[str]] = {}
    for number, record in _records(text):
        fields = _fields(record)
        node = _node(source, number, fields)
        nodes.append(node)
        for partition in _listed(fields.get("Partitions")):
            groups.setdefault(re.sub(r"[^A-Za-z0-9_.:-]", "_", partition), []).append(node.name)
    if not nodes:
        raise UsageError(f"{source}: no NodeName= line; this is not the output of 'scontrol show node'")
    names = {node.name for node in nodes}
    # A partition named as a node cannot be told from it in an expression.
    clashing = {group: f"partition_{group}" for group in groups if group in names}
    return Fleet.build(
        "slurm", nodes, {clashing.get(group, group): members for group, members in groups.items()}, source
    )


def _ask() -> str:
    if shutil.which("scontrol") is None:
        raise UsageError(
            "slurm: scontrol is not on this machine; save its output elsewhere "
            "(scontrol show node --oneliner > FILE) and give slurm:FILE"
        )
    try:
        done = subprocess.run(
            ["scontrol", "show", "node", "--oneliner"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"slurm: scontrol did not answer within {ANSWER_SECONDS} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(f"slurm: scontrol failed with status {done.returncode}: {last}")
    return done.stdout


def _records(text: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of each node; a record goes on until the next one begins."""
    begun, collected = 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("NodeName="):
            if collected:
                yield begun, collected
            begun, collected = number, line
        elif collected:
            collected += "\n" + line
    if collected:
        yield begun, collected


def _fields(record: str) -> dict[str, str]:
    """``Key=value`` pairs; values may hold blanks. The first of two equal keys counts: a later one stands in
    the free text of a reason or comment, which Slurm prints last."""
    fields: dict[str, str] = {}
    marks = list(re.finditer(r"(?:^|\s)([A-Z][A-Za-z]*)=", record))
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        value = record[mark.end() : following.start() if following else len(record)]
        fields.setdefault(mark[1], " ".join(value.split()))
    return fields


def _node(source: str, number: int, fields: dict[str, str]) -> Node:
    name = fields.get("NodeName", "")
    if not NAME.fullmatch(name):
        raise DocumentError(source, number, "NodeName", f"'{name}' is not a node's name")
    sku, accelerators = _accelerators(_said(fields.get("Gres")))
    address = _said(fields.get("NodeAddr")) or _said(fields.get("NodeHostName"))
    variables: dict[str, str] = {}
    if state := _said(fields.get("State")):
        variables["slurm_state"] = state
    if reason := _said(fields.get("Reason")):
        variables["slurm_reason"] = reason
    return Node(
        name=name,
        address=None if address == name else address,
        sku=sku,
        accelerators=accelerators,
        labels=_labels(_listed(fields.get("AvailableFeatures"))),
        vars=variables,
        origin=f"{source}:{number}",
    )


def _accelerators(gres: str | None) -> tuple[str | None, int | None]:
    """SKU and number of ``gpu:h100:8(S:0-1),nic:2``. Mixed types have no single SKU, slices (MIG) neither."""
    total, types = 0, set()
    for item in re.split(r",(?![^(]*\))", gres or ""):
        found = re.fullmatch(r"([a-z_]+)(?::([^:()]+))?:([0-9]+)([KM]?)(?:\(.*\))?", item)
        if found and found[1] in ACCELERATORS:
            if found[2] and re.fullmatch(r"(?:.*_)?[0-9]+g\.[0-9]+gb.*", found[2]):
                return None, None
            total += int(found[3])
            types.add(found[2])
    return (types.pop() if len(types) == 1 else None), (total or None)


def _labels(features: list[str]) -> dict[str, str]:
    """``rack=r12`` and ``rack:r12`` are labels of their own; the bare words are listed under ``features``."""
    labels: dict[str, str] = {}
    bare = []
    for feature in features:
        found = re.fullmatch(r"([A-Za-z_][\w.-]*)[=:](.+)", feature)
        if found:
            labels[found[1]] = found[2]
        else:
            bare.append(feature)
    return labels | ({"features": ",".join(bare)} if bare else {})


def _said(value: str | None) -> str | None:
    return None if value in (None, "", "(null)", "N/A", "none") else value


def _listed(value: str | None) -> list[str]:
    return [part.strip() for part in (_said(value) or "").split(",") if part.strip()]

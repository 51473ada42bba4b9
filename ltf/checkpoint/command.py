"""``python -m ltf checkpoint``: what checkpoints there are, and whether they are good."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ltf.checkpoint.manifest import Unfit
from ltf.checkpoint.store import Entry, Store
from ltf.findings import Json


def main(argv: Sequence[str]) -> int:
    """0: done. 1: `verify` found a bad one, or none that is good. 2: the request was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m ltf checkpoint",
        description="What checkpoints a run has. `list` looks at manifests and sizes of files: complete.\n"
        "`verify` reads every byte: good.",
        epilog="example: python -m ltf checkpoint verify ltf-run\n\n"
        "exit status of verify: 1 if one is bad, or none is there",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("list", "verify"))
    parser.add_argument("directory", type=Path, help="a run's output folder, or its checkpoint folder")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    try:
        arguments = parser.parse_args(list(argv))
    except SystemExit as error:
        return int(error.code or 0)
    store = Store(_folder(arguments.directory))
    if not store.root.is_dir():
        print(f"error: {store.root} is no folder; give a run's output folder", file=sys.stderr)
        return 2
    full = arguments.action == "verify"
    rows = [_row(entry, full=full) for entry in store.entries()]
    rows += [_quarantined(path) for path in store.quarantined()]
    if arguments.json:
        print(json.dumps({"directory": str(store.root), "checkpoints": rows}, indent=1))
    else:
        _print(rows, store.root)
    present = [row for row in rows if row["status"] != "quarantined"]
    return int(full and (not present or any(row["status"] == "bad" for row in present)))


def _folder(given: Path) -> Path:
    """Where a run's output folder is given, that of its checkpoints, unless they are somewhere else."""
    inside = given / "checkpoints"
    return inside if inside.is_dir() and not Store(given).entries() else given


def _row(entry: Entry, *, full: bool) -> dict[str, Json]:
    age = max(0.0, time.time() - entry.path.stat().st_mtime)
    row: dict[str, Json] = {"step": entry.version, "path": str(entry.path), "age_seconds": age}
    try:
        manifest = entry.verify() if full else entry.quick()
    except Unfit as unfit:
        return {**row, "status": "bad", "file": unfit.file, "wrong": unfit.what}
    return {**row, "status": "good" if full else "complete", "bytes": manifest.size}


def _quarantined(path: Path) -> dict[str, Json]:
    return {"path": str(path), "status": "quarantined"}


def _print(rows: Sequence[dict[str, Json]], root: Path) -> None:
    if not rows:
        print(f"no checkpoints in {root}")
    for row in rows:
        if row["status"] == "quarantined":
            print(f"{'-':>10}  quarantined  {row['path']}")
            continue
        size = f"{row['bytes'] / 1e6:,.1f} MB" if isinstance(row.get("bytes"), int) else "-"  # type: ignore[operator]
        age = f"{row['age_seconds'] / 60:,.0f} min"  # type: ignore[operator]
        wrong = f"  {row['file']}: {row['wrong']}" if "wrong" in row else ""
        print(f"{row['step']:>10}  {row['status']:<11}  {size:>14}  {age:>10} old  {row['path']}{wrong}")

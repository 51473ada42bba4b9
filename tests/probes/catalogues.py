"""Small catalogues, profiles and reports, written as people write them, for the tests of judging."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from probes.catalogue import Catalogue, load_catalogue
from probes.model import CheckRecord, Measure, NodeReport, Status, Value
from probes.profiles import Profiles, load_profiles

CHECKS = """\
schema: ltpctl/checks/1
family: accelerator
checks:
  accelerator.count:
    what: Counts.
    why: Lost devices.
    fix: Reseat it.
    level: quick
    essential: true
    collect: count
    metrics:
      count: {what: number, unit: devices}
      pci_id: {what: id}
      missing: {what: lost, limit: {fail: "== 0"}}
  accelerator.ecc:
    what: Counts memory errors.
    why: Wrong results.
    fix: Reset the device.
    level: quick
    tags: [ecc, memory]
    needs: nvidia
    collect: ecc
    metrics:
      uncorrectable: {what: errors, unit: errors, limit: {fail: "== 0", warn: "== 0"}, counter: true}
      correctable:
        what: errors
        unit: errors
        counter: true
        limit: {warn: "< 10", reference: a rule of thumb}
      mode: {what: on or off}
  accelerator.processes:
    what: Sees who is there.
    why: Leftovers.
    fix: End them.
    level: quick
    tags: [idle]
    needs: accelerator
    collect: processes
    metrics:
      running: {what: processes, limit: {warn: "== 0"}}
  accelerator.versions:
    what: Versions.
    why: Skew.
    fix: Update.
    level: quick
    needs: accelerator
    collect: versions
    metrics:
      driver: {what: driver, limit: {fail: known}, peers: {rule: majority, outcome: fail}}
  accelerator.gemm:
    what: Measures.
    why: Slow ones hold back the others.
    fix: Look at the clocks.
    level: standard
    tags: [load]
    loads: true
    collect: gemm
    metrics:
      bf16: {what: rate, unit: TFLOP/s, peers: {rule: robust_z, worse: lower}, baseline: {worse: lower}}
"""

PROFILE = """\
schema: ltpctl/sku/1
sku: h100
what: Eight of them.
aliases: [hgx]
vendor: nvidia
pci: ["10de:2330"]
accelerators: 8
limits:
  accelerator.ecc.mode: {fail: "== enabled", reference: "data sheet"}
  accelerator.gemm.bf16: {fail: ">= 600", warn: ">= 650"}
params:
  accelerator.gemm: {size: 8192}
essential: [accelerator.versions]
"""


def catalogue(folder: Path, text: str = CHECKS) -> Catalogue:
    checks = folder / "built_in_checks"
    checks.mkdir(exist_ok=True)
    (checks / "accelerator.yaml").write_text(text)
    return load_catalogue(built_in=checks)


def profiles(folder: Path, of: Catalogue, *texts: str) -> Profiles:
    skus = folder / "built_in_skus"
    skus.mkdir(exist_ok=True)
    for number, text in enumerate(texts or (PROFILE,)):
        (skus / f"{number}.yaml").write_text(text)
    return load_profiles(of, built_in=skus)


def answered(check: str, *measures: tuple[str, Value] | tuple[str, Value, str]) -> CheckRecord:
    """A record from (metric, value) or (metric, value, device)."""
    made = tuple(Measure(m[0], m[2] if len(m) == 3 else None, m[1]) for m in measures)
    return CheckRecord(check, Status.ANSWERED, 0.01, made, evidence=(f"{check} printed this",))


def report(records: Mapping[str, CheckRecord] | list[CheckRecord], node: str = "n1") -> NodeReport:
    if isinstance(records, list):
        records = {record.check: record for record in records}
    return NodeReport(node, None, records)

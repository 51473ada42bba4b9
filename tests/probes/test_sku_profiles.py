"""The SKU profiles that ship: complete, sourced, and recognised by the devices they are about."""

from pathlib import Path

import pytest

from inventory.document import load
from probes.catalogue import ProfileFile, load_catalogue
from probes.profiles import BUILT_IN, load_profiles

FILES = sorted(BUILT_IN.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_limit_of_a_profile_names_its_source(path: Path) -> None:
    profile = load(path, ProfileFile)
    assert profile.sku == path.stem
    assert profile.limits
    assert [name for name, limit in profile.limits.items() if not limit.reference] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_profile_with_accelerators_says_whose_and_how_many(path: Path) -> None:
    profile = load(path, ProfileFile)
    assert bool(profile.vendor) == bool(profile.pci) == bool(profile.accelerators)


@pytest.mark.parametrize(
    ("pci", "sku"),
    [
        ("10de:2330", "h100-sxm"), ("10de:2335", "h200-sxm"), ("10de:2901", "b200-sxm"),
        ("10de:20b2", "a100-sxm-80"), ("10de:20b0", "a100-sxm-40"), ("1002:740c", "mi250x"),
        ("1002:74a1", "mi300x"), ("1002:74b5", "mi300x"), ("1da3:1020", "gaudi2"), ("1da3:1060", "gaudi3"),
        ("19e5:d802", "ascend910b"),
    ],
)  # fmt: skip
def test_a_node_without_a_named_sku_is_recognised_by_its_devices(pci: str, sku: str) -> None:
    found = load_profiles(load_catalogue()).recognise([pci])
    assert found is not None
    assert found.name == sku


def test_a_real_a100_node_is_recognised(captures: Path) -> None:
    text = (captures / "captures/nvidia/lspci.nn.a100").read_text()
    ids = {line.split("[")[-1][:9] for line in text.splitlines() if "[0302]" in line}
    found = load_profiles(load_catalogue()).recognise(ids)
    assert found is not None
    assert found.name == "a100-sxm-80"


def test_every_default_limit_of_the_accelerator_checks_names_its_source() -> None:
    catalogue = load_catalogue()
    unsourced = [
        f"{check.name}.{metric}"
        for check in catalogue
        if check.family == "accelerator"
        for metric, demand in check.demands.items()
        if not demand.reference
    ]
    assert unsourced == []

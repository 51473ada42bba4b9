"""Slurm's own view of its nodes as an inventory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inventory.errors import DocumentError, UsageError
from inventory.sources import load
from inventory.sources.slurm import read

FIXTURES = Path(__file__).parent / "fixtures"


def test_blocks_of_lines_are_read() -> None:
    fleet = load(f"slurm:{FIXTURES / 'scontrol-22.05.txt'}")
    node = fleet.node("node001")
    assert (node.address, node.sku, node.accelerators) == ("10.1.0.1", "a100", 8)
    assert node.labels == {"rack": "r12", "features": "a100,ib"}
    assert node.vars == {"slurm_state": "IDLE"}
    assert node.port is None
    assert fleet.groups == {"gpu": ("mig1", "mixed1", "node001", "node002"), "long": ("node001",)}


def test_one_line_a_node_is_read() -> None:
    fleet = load(str(FIXTURES / "scontrol-23.02-oneliner.txt"))
    assert [(n.name, n.address, n.sku, n.accelerators) for n in fleet.nodes.values()] == [
        (f"node00{i}", f"10.0.0.{i}", "h100", 8) for i in (1, 2, 3)
    ]
    assert fleet.node("node003").vars == {
        "slurm_state": "IDLE+DRAIN",
        "slurm_reason": "Xid 79 on gpu 3, ticket=4711 [root@2024-01-20T10:02:11]",
    }
    assert fleet.groups == {"debug": ("node001",), "train": ("node001", "node002", "node003")}


def test_a_reason_cannot_pass_for_a_field() -> None:
    node = load(f"slurm:{FIXTURES / 'scontrol-22.05.txt'}").node("node002")
    assert node.address is None
    assert (node.sku, node.accelerators) == ("a100", 8)
    assert node.vars["slurm_state"] == "DOWN*+DRAIN"
    assert str(node.vars["slurm_reason"]).startswith("Not responding")


def test_absent_sliced_and_mixed_accelerators_are_not_guessed_at() -> None:
    fleet = load(f"slurm:{FIXTURES / 'scontrol-22.05.txt'}")
    assert [(n, fleet.node(n).sku, fleet.node(n).accelerators) for n in ("login1", "mig1", "mixed1")] == [
        ("login1", None, None),
        ("mig1", None, None),
        ("mixed1", None, 6),
    ]


@pytest.mark.parametrize(
    ("gres", "sku", "count"),
    [
        ("gpu:8", None, 8),
        ("gpu:8(S:0-1)", None, 8),
        ("gpu:tesla_v100-sxm2-32gb:4(S:0,1)", "tesla_v100-sxm2-32gb", 4),
        ("npu:ascend910b:8,nic:4", "ascend910b", 8),
        ("mps:400,bandwidth:lustre:no_consume:4G", None, None),
    ],
)
def test_gres_says_which_accelerators_and_how_many(gres: str, sku: str | None, count: int | None) -> None:
    node = read("-", f"NodeName=n1 Gres={gres} State=IDLE").node("n1")
    assert (node.sku, node.accelerators) == (sku, count)


def test_a_partition_named_as_a_node_gets_another_name() -> None:
    assert read("-", "NodeName=gpu State=IDLE Partitions=gpu").groups == {"partition_gpu": ("gpu",)}


def test_without_a_path_scontrol_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "scontrol"
    program.write_text(
        "#!/bin/sh\n"
        '[ "$*" = "show node --oneliner" ] || exit 9\n'
        "echo 'NodeName=n1 NodeAddr=10.0.0.1 Gres=gpu:h100:8 State=IDLE'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fleet = load("slurm:")
    assert (fleet.node("n1").sku, fleet.source) == ("h100", "scontrol show node")
    program.write_text(
        "#!/bin/sh\necho 'slurm_load_node error: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    with pytest.raises(UsageError, match="failed with status 1: slurm_load_node error: Unable to contact"):
        load("slurm:")


def test_where_there_is_no_scontrol_the_way_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="scontrol is not on this machine; save its output"):
        load("slurm:")


def test_other_text_is_refused() -> None:
    with pytest.raises(UsageError, match="not the output of 'scontrol show node'"):
        read("x.txt", "PARTITION AVAIL TIMELIMIT\n")
    with pytest.raises(DocumentError, match=r"x\.txt:1: NodeName: '-x' is not a node's name"):
        read("x.txt", "NodeName=-x State=IDLE\n")

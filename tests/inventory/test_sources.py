"""Which kind of inventory a file is, no inventory at all, and importing every kind as cluster.yaml."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory.errors import UsageError
from inventory.fleet import Bmc, Fleet, Node, expand
from inventory.review import review
from inventory.sources import load, recognised, this_machine
from inventory.sources.cluster_text import to_yaml
from inventory.sources.cluster_yaml import read as read_cluster

FIXTURES = Path(__file__).parent / "fixtures"
EXAMPLES = Path(__file__).parents[2] / "examples" / "inventories"
EVERY_KIND = [
    EXAMPLES / "cluster.yaml",
    EXAMPLES / "ansible" / "hosts.ini",
    EXAMPLES / "hosts.txt",
    EXAMPLES / "ssh_config",
    EXAMPLES / "scontrol.txt",
    FIXTURES / "ansible" / "hosts.yml",
    FIXTURES / "ansible-list.json",
    FIXTURES / "scontrol-22.05.txt",
]


def without_origin(fleet: Fleet) -> tuple[object, ...]:
    return fleet.name, {n: replace(node, origin="") for n, node in fleet.nodes.items()}, fleet.groups


def again(fleet: Fleet) -> Fleet:
    return read_cluster("imported.yaml", to_yaml(fleet))


@pytest.mark.parametrize("path", EVERY_KIND, ids=lambda path: path.name)
def test_what_import_writes_is_read_as_an_equal_fleet(path: Path) -> None:
    fleet = load(str(path))
    assert without_origin(again(fleet)) == without_origin(fleet)


def test_this_machine_too_can_be_imported() -> None:
    fleet = load(None)
    assert without_origin(again(fleet)) == without_origin(fleet)


def test_without_an_inventory_there_is_this_machine() -> None:
    fleet = load(None)
    assert list(fleet.nodes) == [socket.gethostname()]
    assert fleet.node(socket.gethostname()).local
    assert list(this_machine.read("a name that is none").nodes) == ["localhost"]


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("cluster.yaml", "nodes: {a: }", "cluster"),
        ("x", "# comment\ncluster: lab\nnodes:\n  a:\n", "cluster"),
        ("typo.yaml", "noeds: {a: }", "cluster"),
        ("hosts.yaml", "all:\n  hosts:\n    a:\n", "ansible"),
        ("hosts.yaml", "nodes:\n  hosts:\n    a:\n", "ansible"),
        ("inv.json", '{"_meta": {"hostvars": {}}, "all": {"hosts": ["a"]}}', "ansible"),
        ("hosts", "[gpu]\na\n", "ansible"),
        ("hosts", "a ansible_host=10.0.0.1\n", "ansible"),
        ("config", "Host a\n  HostName b\n", "ssh-config"),
        ("nodes.txt", "NodeName=a State=IDLE\n", "slurm"),
        ("hosts.txt", "a\nuser@b[1-3]\n", "hosts"),
        ("hosts", "[fe80::1]:22\n", "hosts"),
    ],
)
def test_the_kind_of_a_file_is_recognised(name: str, text: str, kind: str) -> None:
    assert recognised(name, text).prefix == kind


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("kubernetes:x", "no kind of inventory is called 'kubernetes'; there are slurm, ssh-config"),
        ("ansible:", "'ansible:' needs a path"),
        ("/does/not/exist.yaml", "/does/not/exist.yaml: cannot be read: No such file"),
        ("hosts:/does/not/exist", "/does/not/exist: cannot be read: No such file"),
    ],
)
def test_a_source_that_is_not_there_is_answered_in_one_line(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(spec)
    assert says in str(caught.value)


def test_an_empty_file_and_one_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "x.json").write_text("[1, 2]")
    with pytest.raises(UsageError, match="is empty"):
        load(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="cannot tell what kind of inventory this is; say it: slurm:"):
        load(str(tmp_path / "x.json"))


def test_import_folds_what_is_equal_or_runs_along() -> None:
    nodes = [
        Node(n, address=f"10.0.0.{i}", user="ops", sku="h100") for i, n in enumerate(expand("n[001-064]"), 1)
    ]
    nodes += [Node(f"m{i}", address=f"m{i}.lab", port=2200 + i, user="ops") for i in range(1, 4)]
    text = to_yaml(Fleet.build("lab", nodes, {"all64": expand("n[001-064]")}))
    assert text == (
        "cluster: lab\n"
        "defaults: {user: ops}\n"
        "groups:\n"
        "  all64: 'n[001-064]'\n"
        "nodes:\n"
        "  'm[1-3]': {address: '{name}.lab', port: '[2201-2203]'}\n"
        "  'n[001-064]': {address: '10.0.0.[1-64]', sku: h100}\n"
    )


LETTERS = st.sampled_from(["n", "gpu-", "r1c", "x.y"])
NAMES = st.sets(
    st.tuples(LETTERS, st.integers(0, 25)).map(lambda p: f"{p[0]}{p[1]:02d}"), min_size=1, max_size=12
)
TEXT = st.sampled_from(
    ["a", "12", "true", "null", "1e3", "x: y", "[1]", "a\nb", "ü", "'", "007", "{name}", "#", "~"]
)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**20) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ADDRESS = st.sampled_from(["10.0.0.{}", "{}.lab", "h0{}", "fe80::{}", "same", "a{}b{}"])


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    nodes = []
    for name in sorted(draw(NAMES)):
        number = draw(st.integers(0, 12))
        address = draw(
            st.none() | ADDRESS.map(lambda a, n=number: a.replace("{}", str(n))) | st.just(f"{name}.lab")
        )
        nodes.append(
            Node(
                name,
                address=address,
                user=draw(st.sampled_from([None, "ops"])),
                port=draw(st.sampled_from([None, 22, 2201, 2202])),
                jump=draw(st.sampled_from([None, "bastion.example.com", "none"])),
                identity=draw(st.sampled_from([None, "/keys/lab"])),
                sku=draw(st.sampled_from([None, "h100"])),
                accelerators=draw(st.sampled_from([None, 0, 8])),
                labels=draw(st.dictionaries(st.sampled_from(["rack", "on"]), TEXT, max_size=1)),
                bmc=draw(
                    st.none()
                    | st.builds(
                        Bmc,
                        st.just("ipmi"),
                        st.sampled_from([f"10.9.0.{number}", f"{name}-bmc", "one"]),
                        verify_tls=st.booleans(),
                        password_env=st.sampled_from([None, "PW"]),
                    )
                ),
                python=draw(st.sampled_from(["python3", "/opt/py"])),
                vars=draw(st.dictionaries(TEXT, DATA, max_size=2)),
                local=draw(st.sampled_from([False, False, False, True])),
            )
        )
    members = draw(st.sets(st.sampled_from([node.name for node in nodes])))
    return Fleet.build("made", nodes, {"group": members, "1": []})


@given(fleets())
def test_any_fleet_survives_being_written_and_read(fleet: Fleet) -> None:
    assert without_origin(again(fleet)) == without_origin(fleet)


def test_large_inventories_load_in_a_moment() -> None:
    ranges = "nodes: {'n[00001-10000]': {address: '10.[0-99].0.[1-100]'}}\ngroups: {a: 'n[00001-05000]'}\n"
    lines = "defaults: {user: ops}\nnodes:\n" + "".join(
        f"  n{i:04d}: {{address: 10.0.{i // 250}.{i % 250}, labels: {{rack: r{i // 32}}}}}\n"
        for i in range(2048)
    )
    started = time.process_time()
    assert len(read_cluster("ranges.yaml", ranges)) == 10_000
    after_ranges = time.process_time()
    fleet = read_cluster("lines.yaml", lines)
    after_lines = time.process_time()
    # A quiet machine needs a fifth of these; the goals are 1 s and 0.5 s.
    assert after_ranges - started < 1.0
    assert after_lines - after_ranges < 1.0
    assert len(to_yaml(fleet).splitlines()) < 300
    assert time.process_time() - after_lines < 2.0


def test_a_review_names_what_was_left_unsaid() -> None:
    nodes = [
        Node("a", sku="h100", accelerators=8, labels={"rack": "r1"}, identity="/gone", bmc=Bmc("ipmi", "b")),
        Node("b", accelerators=8, labels={"rack": "r1"}, address="x", bmc=Bmc("ipmi", "b")),
        Node("c", sku="h100", address="x"),
    ]
    notes = review(Fleet.build("x", nodes, {"empty": []}), lambda path: path != "/gone")
    assert notes == [
        "b: no SKU; limits of a SKU profile cannot apply, only peers and baselines",
        "c: number of accelerators not given; a missing one goes unseen",
        "c: no label rack, which other nodes have",
        "b,c: have the same address x; checks would disturb each other",
        "a,b: share the BMC b; one power cycle would hit them all",
        "a: the file /gone does not exist here",
        "group empty has no member",
    ]

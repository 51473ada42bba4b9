"""``cluster.yaml``: what it may say, and what is refused with file, line and field."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from inventory.errors import DocumentError
from inventory.fleet import MAX_NODES, Bmc, Fleet
from inventory.sources.cluster_yaml import read


def fleet(text: str) -> Fleet:
    return read("c.yaml", text)


def mistake(text: str) -> str:
    with pytest.raises(DocumentError) as caught:
        read("c.yaml", text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


EXAMPLE = """\
cluster: lab
defaults: {user: ops, sku: mi300x, accelerators: 8}
groups: {rack1: "node[001-032]", spares: "node[061-064]"}
nodes:
  "node[001-064]": {address: "10.0.0.[1-64]"}
  oldbox:
    {address: 10.0.1.9, port: 2222, jump: gate,
     bmc: {redfish: "https://10.9.1.9", user: admin, password_env: BMC_PASSWORD}}
"""


def test_the_example_of_the_documentation_means_what_it_says() -> None:
    lab = fleet(EXAMPLE)
    assert (lab.name, len(lab), lab.source) == ("lab", 65, "c.yaml")
    node = lab.node("node032")
    assert (node.address, node.user, node.sku, node.accelerators) == ("10.0.0.32", "ops", "mi300x", 8)
    assert node.groups == {"rack1"}
    assert node.origin == "c.yaml:5"
    old = lab.node("oldbox")
    assert (old.port, old.jump, old.python) == (2222, "gate", "python3")
    assert old.bmc == Bmc("redfish", "https://10.9.1.9", user="admin", password_env="BMC_PASSWORD")
    assert lab.groups["spares"] == ("node061", "node062", "node063", "node064")


def test_addresses_are_paired_with_names_in_the_order_written() -> None:
    lab = fleet('nodes: {"n[1-3,9]": {address: "10.0.0.[7,3-5]"}}')
    assert [node.address for node in lab.nodes.values()] == ["10.0.0.7", "10.0.0.3", "10.0.0.4", "10.0.0.5"]


def test_ports_and_controllers_are_paired_too() -> None:
    lab = fleet(
        'nodes: {"n[1-2]": {address: h, port: "[2201-2202]", bmc: {ipmi: "10.9.0.[1-2]", password_file: /s}}}'
    )
    assert [(n.host, n.port, n.bmc.address) for n in lab.nodes.values() if n.bmc] == [
        ("h", 2201, "10.9.0.1"),
        ("h", 2202, "10.9.0.2"),
    ]


def test_a_template_gives_every_node_its_own_address() -> None:
    lab = fleet(
        'defaults: {address: "{name}.lab", bmc: {ssh: "{name}-bmc"}}\nnodes: {"n[1-2]": , m: 10.1.1.1}'
    )
    assert [n.host for n in lab.nodes.values()] == ["10.1.1.1", "n1.lab", "n2.lab"]
    assert lab.node("n2").bmc == Bmc("ssh", "n2-bmc")


def test_the_nearest_saying_wins_and_labels_add_up() -> None:
    lab = fleet(
        "defaults: {user: d, sku: d, python: d, labels: {site: x, rack: none}, vars: {a: 1}}\n"
        "groups:\n"
        "  g1: {nodes: 'n[1-2]', user: g1, sku: g1, labels: {rack: r1}}\n"
        "  g2: {nodes: n2, user: g2}\n"
        "nodes: {'n[1-2]': {sku: own, vars: {b: [2]}}, n3: }\n"
    )
    first, second, third = lab.nodes.values()
    assert (first.user, first.sku, first.python) == ("g1", "own", "d")
    assert first.labels == {"site": "x", "rack": "r1"}
    assert first.vars == {"a": 1, "b": [2]}
    assert (second.user, third.user, third.labels["rack"]) == ("g2", "d", "none")


def test_groups_may_be_made_of_groups() -> None:
    lab = fleet("groups: {a: 'n[1-3]', b: [n4, a], c: 'all!@a', empty: }\nnodes: {'n[1-6]': }\n")
    assert lab.groups == {
        "a": ("n1", "n2", "n3"),
        "b": ("n1", "n2", "n3", "n4"),
        "c": ("n4", "n5", "n6"),
        "empty": (),
    }


def test_the_jump_host_itself_is_reached_directly() -> None:
    lab = fleet("defaults: {jump: 'outer.example.com,gate'}\nnodes: {gate: , a: , b: {jump: none}}")
    assert lab.node("a").jump == "outer.example.com,gate"
    assert lab.node("gate").jump == "outer.example.com"
    assert lab.node("b").jump == "none"


def test_numbers_are_text_where_text_is_meant() -> None:
    assert fleet("nodes: {a: {user: 1000, labels: {rack: 12}}}").node("a").labels == {"rack": "12"}
    assert list(fleet("nodes: {12: , 007: }").nodes) == ["007", "12"]


def test_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    text = "nodes: {a: {identity: keys/lab, bmc: {ipmi: b, password_file: ~/pw}}}"
    node = read(str(tmp_path / "cluster.yaml"), text).node("a")
    assert node.identity == str(tmp_path / "keys/lab")
    assert node.bmc
    assert node.bmc.password_file == str(Path.home() / "pw")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # Names
        (
            "nodes:\n  'n[1-5]':\n  n3:",
            "c.yaml:3: nodes.n3: n3 is already declared on line 2 by 'n[1-5]'; a node is declared once",
        ),
        (
            "nodes:\n  'n[1-5]':\n  m:\n  'n[4-9]':",
            "c.yaml:4: nodes.n[4-9]: n[4-5] is already declared on line 2",
        ),
        ("nodes:\n  a:\n  b:\n  a:", "c.yaml:4: nodes.a: this key is already given on line 2; keep one"),
        ("nodes: {'n[1-3,2]': }", "names n2 twice"),
        ("nodes: {-x: }", "c.yaml:1: nodes.-x: '-x' is not a name"),
        ("nodes: {'n[1-3]!n2': }", "'!' cannot be used where nodes are declared"),
        ("nodes: {'n[1-3': }", "brackets"),
        ("nodes: {}", "no node is declared"),
        ("cluster: x", "c.yaml:1: nodes: this key is required and is missing"),
        ("nodes: [a, b]", "c.yaml:1: nodes: must be a mapping of keys to values; found a list"),
        ("node: {a: }\n", "c.yaml:1: node: unknown key; did you mean 'nodes'?"),
        # Groups
        ("nodes: {a: }\ngroups: {a: a}", "c.yaml:2: groups.a: is also the name of a node; rename the group"),
        (
            "nodes: {ab1: }\ngroups:\n  g: [ab1, ab2]",
            "c.yaml:3: groups.g[1]: no node or group is called 'ab2'; did you",
        ),
        (
            "nodes: {a: }\ngroups:\n  g: {nodes: zz}",
            "c.yaml:3: groups.g.nodes: no node or group is called 'zz'; declare",
        ),
        ("nodes: {a: }\ngroups: {g: '@h'}", "no group is called 'h'"),
        ("nodes: {a: }\ngroups: {g: h, h: g}", "groups contain each other: g -> h -> g"),
        ("nodes: {a: }\ngroups: {g: 3}", "groups.g: wants a node expression, e.g. node[001-032]"),
        (
            "nodes: {a: }\ngroups: {g: {nodes: a, uesr: x}}",
            "groups.g.uesr: unknown key; did you mean 'user'?",
        ),
        (
            "nodes: {a: }\ngroups: {g: {nodes: a, address: '10.0.0.[1-2]'}}",
            "groups.g.address: a range of values belongs",
        ),
        # Addresses
        (
            "nodes:\n  'n[1-5]':\n    address: '10.0.0.[1-4]'",
            "c.yaml:3: nodes.n[1-5].address: '10.0.0.[1-4]' is 4 values",
        ),
        ("nodes: {'n[1-5]': 10.0.0.1}", "'10.0.0.1' is one address for 5 nodes; write a range of as many"),
        ("nodes: {a: '{nmae}.lab'}", "only {name} may stand in braces"),
        (
            "nodes:\n  a: 10.1.1.1\n  b: 10.1.1.1",
            "c.yaml:3: nodes.b.address: b and a (line 2) both have the address 10.1.1.1 port 22",
        ),
        ("nodes:\n  a:\n  b: a", "b and a (line 2) both have the address a port 22"),
        ("nodes: {a: {local: true}, b: {local: true}}", "both have this machine"),
        (
            "nodes: {'n[1-3]': {bmc: {ipmi: 10.9.0.1}}}",
            "nodes.n[1-3].bmc: '10.9.0.1' is one address for 3 nodes",
        ),
        # Values
        (
            "nodes:\n  a:\n    port: 70000",
            "c.yaml:3: nodes.a.port: a port is a number from 1 to 65535; found 70000",
        ),
        ("nodes: {a: {port: 0}}", "found 0"),
        ("nodes: {a: {port: true}}", "wants a port number"),
        ("nodes: {a: {port: ssh}}", "found ssh"),
        ("nodes: {a: {accelerators: '8'}}", "must be a whole number; found the text '8'"),
        ("nodes: {a: {accelerators: -1}}", "must be greater than or equal to 0"),
        (
            "nodes: {a: {labels: {rack: off}}}",
            "nodes.a.labels.rack: must be text; found the truth value false",
        ),
        ("nodes: {a: {labels: {rack: 012}}}", "YAML reads 012 as the number 10"),
        ("nodes: {a: {user: -x}}", "wants one word that does not begin with '-'"),
        ("nodes: {a: {address: -oProxyCommand=x}}", "does not begin with '-'"),
        ("nodes: {a: {vars: {day: 2024-01-01}}}", "put 2024-01-01 in quotes"),
        ("nodes: {a: {vars: {x: .nan}}}", "not plain data"),
        ("nodes: {a: {prot: 22}}", "c.yaml:1: nodes.a.prot: unknown key; did you mean 'port'?"),
        # Jump hosts
        ("nodes:\n  gate1:\n  a: {jump: gate2}", "no node is called 'gate2', but there is gate1"),
        ("nodes: {gateway: , a: {jump: gatewy}}", "no node is called 'gatewy', but there is gateway"),
        ("nodes: {a: {jump: a}}", "the jump hosts go in a circle: a -> a"),
        ("nodes: {a: {jump: b}, b: {jump: a}}", "the jump hosts go in a circle: a -> b -> a"),
        ("nodes: {a: {jump: 'x:99999'}}", "'x:99999' is not a jump host"),
        # Controllers and secrets
        (
            "nodes: {a: {bmc: {ipmi: x, password: hunter2}}}",
            "nodes.a.bmc.password: a secret does not belong in this file",
        ),
        ("nodes: {a: {password: hunter2}}", "nodes.a.password: passwords are not used for SSH"),
        ("nodes: {a: {bmc: {ipmi: x, password_env: hunter-2}}}", "wants the name of an environment variable"),
        ("nodes: {a: {bmc: {redfish: 'https://admin:hunter2@b'}}}", "must not hold a login"),
        ("nodes: {a: {bmc: {redfish: 10.9.0.1}}}", "wants a URL"),
        ("nodes: {a: {bmc: {user: x}}}", "give one of redfish, ipmi and ssh; found none of them"),
        ("nodes: {a: {bmc: {ipmi: x, ssh: y}}}", "found ipmi and ssh"),
        ("nodes: {a: {bmc: {ipmi: x, password_env: A, password_file: b}}}", "not both"),
    ],
)
def test_a_mistake_is_answered_with_its_place(text: str, says: str) -> None:
    message = mistake(text)
    assert says in message
    assert "hunter" not in message


def test_a_host_outside_of_the_file_may_be_a_jump_host() -> None:
    jumps = {"a": "gate2.example.com", "b": "ops@gate2", "c": "'gate2:22'", "d": "bastion"}
    text = "nodes:\n  gate1:\n" + "".join(f"  {name}: {{jump: {jump}}}\n" for name, jump in jumps.items())
    assert [n.jump for n in fleet(text).nodes.values()] == [
        "gate2.example.com",
        "ops@gate2",
        "gate2:22",
        "bastion",
        None,
    ]


def test_one_address_may_be_shared_when_the_file_says_so() -> None:
    lab = fleet("nodes: {'n[1-2]': {address: h, shared_address: true}}")
    assert [n.address for n in lab.nodes.values()] == ["h", "h"]
    assert "both have" in mistake("nodes: {a: {address: h, shared_address: true}, b: h}")


def test_one_address_behind_two_jump_hosts_is_two_machines() -> None:
    assert len(fleet("nodes: {a: {address: 10.0.0.1, jump: g.x}, b: {address: 10.0.0.1, jump: h.x}}")) == 2


@pytest.mark.parametrize(
    "keys",
    [["n[1-5000000]"], ["n[1-3000]x[1-3000]"], ["n[1-60000],m[1-60000]"], ["a[1-60000]", "b[1-60000]"]],
)
def test_more_nodes_than_are_taken_are_refused_at_once(keys: list[str]) -> None:
    started = time.process_time()
    message = mistake("nodes: {" + ", ".join(f"'{key}': " for key in keys) + "}")
    assert f"at most {MAX_NODES:,}" in message
    assert time.process_time() - started < 0.2


def test_a_huge_group_or_address_range_is_refused_at_once() -> None:
    started = time.process_time()
    assert "at most" in mistake("nodes: {a: }\ngroups: {g: 'n[1-5000000]'}")
    assert "5,000,000 values for one node" in mistake("nodes: {a: {address: 'h[1-5000000]'}}")
    assert "at most" in mistake("nodes: {a: {port: '[1-5000000]'}}")
    assert time.process_time() - started < 0.5


def test_the_example_in_the_guide_is_a_right_inventory() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "inventory.md").read_text()
    lab = fleet(guide.partition("```yaml\n")[2].partition("```")[0])
    assert len(lab) == 66
    assert lab.node("node033").labels == {"rack": "r2", "switch": "leaf2"}
    assert len(lab.groups["training"]) == 62
    assert (lab.node("gate").jump, lab.node("node001").jump) == (None, "gate")

"""Ansible inventories: INI, YAML, exported JSON, folders of variables. Nothing is run, nothing unlocked."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from inventory.errors import UsageError
from inventory.fleet import Fleet
from inventory.sources import load
from inventory.sources.ansible import read
from inventory.sources.ssh_arguments import jump_of

FIXTURES = Path(__file__).parent / "fixtures"


def ini(text: str) -> Fleet:
    return read("hosts.ini", text)


def mistake(text: str, name: str = "hosts.ini") -> str:
    with pytest.raises(UsageError) as caught:
        read(name, text)
    return str(caught.value)


@pytest.fixture
def lab() -> Fleet:
    return load(f"ansible:{FIXTURES / 'ansible' / 'hosts.yml'}")


def test_groups_children_and_ranges_are_understood(lab: Fleet) -> None:
    assert list(lab.nodes) == ["gpu01", "gpu02", "gpu03", "gpu04", "gpu05", "here", "nas", "web"]
    assert lab.groups == {
        "compute": ("gpu01", "gpu02", "gpu03", "gpu04", "gpu05"),
        "rack1": ("gpu01", "gpu02", "gpu03"),
        "rack2": ("gpu04", "gpu05"),
        "storage": ("here", "nas"),
    }


def test_variables_win_in_ansibles_order(lab: Fleet) -> None:
    first, second, nas = lab.node("gpu01"), lab.node("gpu02"), lab.node("nas")
    assert (first.user, second.user) == ("from_group_vars_all", "root")
    assert (first.sku, first.accelerators, first.labels["rack"]) == ("mi300x", 8, "r1")
    assert (nas.sku, nas.accelerators) == ("cpu", 0)
    assert first.vars["near"] == "rack"
    assert lab.node("gpu04").vars["near"] == "compute"
    assert first.vars["site"] == "lab"


def test_connection_variables_become_the_nodes_attributes(lab: Fleet) -> None:
    second = lab.node("gpu02")
    assert second.python == "/opt/python3.11/bin/python3"
    assert second.identity == str(Path.home() / ".ssh/gpu02")
    assert second.jump == "a,b:2222"
    assert lab.node("gpu01").jump == "ops@gate.lab.example.com:2200"
    assert lab.node("here").local
    assert not lab.node("nas").local
    assert lab.node("nas").vars["ansible_connection"] == "winrm"


def test_plain_templates_are_filled_in(lab: Fleet) -> None:
    node = lab.node("gpu04")
    assert (node.address, node.port) == ("10.0.0.4", 2222)
    assert node.labels == {"switch": "leaf2", "row": "7"}


def test_secrets_are_left_out_wherever_they_stand(lab: Fleet) -> None:
    assert lab.node("nas").vars == {"site": "lab", "settings": {"depth": 3}, "ansible_connection": "winrm"}
    assert "hunter2" not in repr(lab)


def test_a_group_named_as_its_only_host_gives_way_to_the_host(lab: Fleet) -> None:
    assert "web" in lab.nodes
    assert "web" not in lab.groups
    with pytest.raises(UsageError, match="name of a group and of a node"):
        ini("[a]\na\nb\n")


def test_the_json_of_ansible_inventory_list_is_read() -> None:
    fleet = load(str(FIXTURES / "ansible-list.json"))
    assert [(n.name, n.address, n.user, n.sku) for n in fleet.nodes.values()] == [
        ("gpu1", "10.0.0.1", "ops", "h100"),
        ("gpu2", "10.0.0.2", "ops", "h100"),
        ("nas", None, None, None),
    ]
    assert fleet.node("gpu1").vars == {"odd": "{{ x }}"}
    assert fleet.groups == {"gpu": ("gpu1", "gpu2")}


def test_host_lines_of_an_ini_file_are_read_as_ansible_reads_them() -> None:
    fleet = ini(
        "lonely ansible_host=10.0.0.9   # a comment\n"
        "[web]\n"
        "w[01:03].lab\n"
        "w-[a:c]:2222 ansible_user=ops note2='two words' size=3 flags=\"['x', 1]\"\n"
        "v[1:9:4]\n"
        "; another comment\n"
        "[web:vars]\n"
        "note = two words # kept\n"
        "[all:children]\n"
        "web\n"
        "[six]\n"
        "fe80::1\n"
    )
    assert set(fleet.groups["web"]) == {
        "v1",
        "v5",
        "v9",
        *(f"w-{c}" for c in "abc"),
        *(f"w0{i}.lab" for i in "123"),
    }
    node = fleet.node("w-b")
    assert (node.port, node.user, node.vars["size"], node.vars["flags"]) == (2222, "ops", 3, ["x", 1])
    assert node.vars["note"] == "two words # kept"
    assert fleet.node("lonely").address == "10.0.0.9"
    assert fleet.node("lonely").origin == "hosts.ini:1"
    assert fleet.groups["six"] == ("fe80::1",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[a:hosts_of]\n", "hosts.ini:1: [a:hosts_of]: a section is [group]"),
        ("[a]\nx y\n", "hosts.ini:2: x: 'y' is not NAME=VALUE"),
        ("[a]\nx v='y\n", "hosts.ini:2: no closing quotation"),
        ("[a:vars]\nnothing\n", "hosts.ini:2: nothing: a variable is written NAME=VALUE"),
        ("a\n[b:children]\nc\n", "hosts.ini:3: c: this group is used here but declared nowhere"),
        ("a\n[b:vars]\nx=1\n", "hosts.ini:2: b: this group is used here but declared nowhere"),
        ("x[5:1]\n", "hosts.ini:1: x[5:1]: '[5:1]' runs backwards"),
        ("x[1-5]\n", "a range is written [01:10] or [a:f]"),
        ("x[01:100]\n", "must have the same width"),
        ("x[1:5000000]\n", "stands for 5,000,000 hosts; at most"),
        ("x[1:9000]y[1:9000]\n", "stands for 81,000,000 hosts; at most"),
        ("x[1:60000]\ny[1:60000]\n", "hosts.ini:2: y40001: makes more than 100,000 hosts"),
        ("x:99999\n", "a port is a number from 1 to 65535"),
        (
            "x ansible_port=many\n",
            "hosts.ini:1: x.ansible_port: expected a number from 1 to 65535, found many",
        ),
        ("x ansible_host={{ lookup('env','H') }}\n", "x: 'lookup(env,H)' is not NAME=VALUE"),
        ("x ansible_user='a b'\n", "hosts.ini:1: x.user: 'a b' is not one word"),
        ("x ansible_host=-oProxyCommand=y\n", "hosts.ini:1: x.address: '-oProxyCommand=y' begins with '-'"),
        (
            "x ansible_host='{{ y | default(1) }}'\n",
            "x.ansible_host: the template '{{ y | default(1) }}' cannot be",
        ),
        ("x ansible_host='{{ a }}' a='{{ b }}' b='{{ a }}'\n", "leads back to itself"),
        ("x ltp_accelerators=-1\n", "x.ltp_accelerators: expected a number from 0 to 1024, found -1"),
        (
            "x ansible_ssh_common_args='-o'\n",
            "x.ansible_ssh_common_args: not what ssh takes: option -o requires",
        ),
        ("-x\n", "hosts.ini:1: -x: this name cannot be used"),
        ("# nothing\n", "hosts.ini: no host is declared"),
        ("[a]\nx\n[a:children]\nb\n[b:children]\na\n", "groups contain each other: a, b"),
    ],
)
def test_a_mistake_in_an_ini_file_names_its_line(text: str, says: str) -> None:
    assert says in mistake(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("all:\n  hosts:\n    a: 3\n", "hosts.yml:3: all.hosts.a: expected a mapping, found 3"),
        ("all:\n  hostes:\n    a:\n", "hosts.yml:2: all.hostes: a group has hosts, children and vars"),
        ("- a\n", "hosts.yml:1: expected a mapping of groups, found a list"),
        (
            "all:\n  hosts:\n    a: {x: !lookup y}\n",
            "hosts.yml:3: could not determine a constructor for the tag",
        ),
        (
            "all:\n  hosts:\n    a:\n      ansible_user: !vault |\n        $ANSIBLE_VAULT;1.1\n        61\n",
            "hosts.yml:3: a.ansible_user: is in a vault, which is not opened here; write it in the clear",
        ),
        ("all:\n  hosts:\n    a: {ansible_host: [1]}\n", "a.ansible_host: expected text, found [1]"),
    ],
)
def test_a_mistake_in_a_yaml_file_names_its_line(text: str, says: str) -> None:
    assert says in mistake(text, "hosts.yml")


def test_an_executable_inventory_is_refused_and_never_run(tmp_path: Path) -> None:
    script = tmp_path / "inventory.py"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\necho '{{}}'\n")
    for mode in (0o755, 0o644):
        script.chmod(mode)
        for spec in (f"ansible:{script}", str(script)):
            with pytest.raises(UsageError, match="nothing is run") as caught:
                load(spec)
            assert "\n" not in str(caught.value)
    script.chmod(0o755)
    with pytest.raises(UsageError, match="ansible-inventory -i"):
        load(f"ansible:{script}")
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_inventories_is_one_inventory(tmp_path: Path) -> None:
    (tmp_path / "01-rack1.ini").write_text("[rack1]\na\n")
    (tmp_path / "02-rack2.yml").write_text("rack2: {hosts: {b: }}\nrack1: {hosts: {c: }}\n")
    (tmp_path / "old.ini~").write_text("garbage [")
    (tmp_path / "notes.md").write_text("garbage [")
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "group_vars" / "rack1").write_text("ltp_sku: h100\n")
    fleet = load(str(tmp_path))
    assert {name: node.sku for name, node in fleet.nodes.items()} == {"a": "h100", "b": None, "c": "h100"}


@pytest.mark.parametrize(
    ("arguments", "jump"),
    [
        ("-J gate", "gate"),
        ("-Jgate", "gate"),
        ("-o ProxyJump=ops@gate:2222", "ops@gate:2222"),
        ("-oProxyJump=gate", "gate"),
        ("-o 'ProxyJump gate' -C", "gate"),
        ("-o proxyjump=none", "none"),
        ("-C -o ProxyCommand='ssh -W %h:%p -q ops@gate'", "ops@gate"),
        ("-o ProxyCommand='ssh -l ops gate -W %h:%p -p 2222'", "ops@gate:2222"),
        ("-o ProxyCommand='nc -x proxy %h %p'", None),
        ("-o ProxyCommand='ssh gate nc %h %p'", None),
        ("-o StrictHostKeyChecking=no -i key", None),
        ("", None),
    ],
)
def test_the_jump_host_is_found_in_arguments_for_ssh(arguments: str, jump: str | None) -> None:
    assert jump_of(arguments) == jump


def test_two_thousand_hosts_with_variables_are_read_in_a_moment(tmp_path: Path) -> None:
    hosts = {f"n{i:04d}": {"ansible_host": f"10.0.{i // 250}.{i % 250 + 1}"} for i in range(2048)}
    text = json.dumps(
        {"_meta": {"hostvars": hosts}, "gpu": {"hosts": list(hosts), "vars": {"ltp_sku": "h100"}}}
    )
    started = time.process_time()
    assert len(read("hosts.json", text)) == 2048
    lines = "[gpu]\n" + "".join(
        f"{name} ansible_host={said['ansible_host']}\n" for name, said in hosts.items()
    )
    assert len(ini(lines)) == 2048
    assert time.process_time() - started < 3

"""OpenSSH's client configuration as an inventory."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from inventory.errors import DocumentError
from inventory.fleet import Fleet
from inventory.sources import load
from inventory.sources.ssh_config import read


def fleet(text: str) -> Fleet:
    return read("config", text)


CONFIG = """\
# Concrete names are nodes; the first value found wins.
Host gpu1 gpu2
    HostName %h.lab.example.com
    IdentityFile ~/.ssh/%h-%r

Host gpu2
    Port 2222
    HostName never.used

Host !gpu1 gpu*
    User second

Host gpu*
    User first
    ProxyJump gate

Host "old"
    HostName=10.0.1.9
    ProxyJump none
Match originalhost old
    User matched
Match exec "touch {marker}"
    User executed
Match host *.lab.example.com
    Compression yes
    Port 2200

Host *
    User nobody
    Port 22
    IdentityFile ~/.ssh/id_lab
"""


def test_patterns_apply_in_the_order_of_the_file_and_the_first_value_wins(tmp_path: Path) -> None:
    lab = fleet(CONFIG.replace("{marker}", str(tmp_path / "ran")))
    assert list(lab.nodes) == ["gpu1", "gpu2", "old"]
    first, second, old = lab.nodes.values()
    assert (first.address, first.user, first.jump) == ("gpu1.lab.example.com", "first", "gate")
    assert (second.user, second.port) == ("second", 2222)
    assert (old.address, old.user, old.port, old.jump) == ("10.0.1.9", "matched", 22, "none")
    assert old.identity == str(Path.home() / ".ssh/id_lab")
    assert second.origin == "config:2"
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's client to compare with")
@pytest.mark.parametrize("name", ["gpu1", "gpu2", "old"])
def test_the_values_are_those_that_ssh_itself_finds(tmp_path: Path, name: str) -> None:
    text = "\n".join(
        line for line in CONFIG.splitlines() if "exec" not in line and "executed" not in line
    ).replace("Match host *.lab.example.com\n    Compression yes\n    Port 2200\n", "")
    path = tmp_path / "config"
    path.write_text(text)
    told = subprocess.run(
        ["ssh", "-G", "-F", str(path), name], capture_output=True, text=True, check=True
    ).stdout
    theirs: dict[str, str] = {}
    for line in told.splitlines():
        key, _, value = line.partition(" ")
        theirs.setdefault(key, value)
    ours = read(str(path)).node(name)
    assert (ours.host, ours.user, ours.port or 22) == (
        theirs["hostname"],
        theirs["user"],
        int(theirs["port"]),
    )
    assert (ours.jump or "none") == theirs.get("proxyjump", "none")


def test_names_of_one_machine_are_one_node_with_aliases() -> None:
    lab = fleet("Host a a.example.com b\n  HostName 10.0.0.1\nHost c\n  HostName 10.0.0.1\n  Port 2222\n")
    assert list(lab.nodes) == ["a", "c"]
    assert lab.node("a").vars == {"aliases": ["a.example.com", "b"]}


def test_includes_are_followed_within_the_section_that_holds_them(tmp_path: Path) -> None:
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d" / "10-gpu").write_text("Host gpu1\n  HostName 10.0.0.1\nHost *\n  User lab\n")
    (tmp_path / "only-old").write_text("Port 2222\n")
    (tmp_path / "config").write_text("Include config.d/*\nHost old\n  Include only-old\nHost other\n")
    lab = load(f"ssh-config:{tmp_path / 'config'}")
    assert [(n.name, n.address, n.user, n.port) for n in lab.nodes.values()] == [
        ("gpu1", "10.0.0.1", "lab", None),
        ("old", None, "lab", 2222),
        ("other", None, "lab", None),
    ]
    assert lab.node("gpu1").origin == f"{tmp_path}/config.d/10-gpu:1"


def test_files_that_include_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("Host a\nInclude config\n")
    with pytest.raises(DocumentError, match=r"config:2: Include: more than 16 files include each other"):
        load(f"ssh-config:{tmp_path / 'config'}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Host *\n  User x\n", "config: no Host line names a machine"),
        ("Host a\n  Port 99999\n", "config:2: Port: a port is a number from 1 to 65535; found 99999"),
        ("Host a\n  Port x\n", "config:2: Port: a port is a number"),
        ("Host a\n  User 'x\n", "config:2: no closing quotation"),
        ("Host a\nUser\n", "config:2: 'User' is not 'Keyword value'"),
        ("Host a$b\n", "config:1: Host: 'a$b' is not a usable name"),
    ],
)
def test_a_mistake_names_its_line(text: str, says: str) -> None:
    with pytest.raises(DocumentError) as caught:
        fleet(text)
    assert says in str(caught.value)


def test_without_a_path_the_persons_own_configuration_is_read() -> None:
    (Path.home() / ".ssh").mkdir()
    (Path.home() / ".ssh" / "config").write_text("Host mine\n")
    assert list(load("ssh-config:").nodes) == ["mine"]


def test_two_thousand_hosts_are_read_in_a_moment() -> None:
    text = "".join(f"Host n{i}\n  HostName 10.0.{i // 250}.{i % 250}\n  Port 2222\n" for i in range(2048))
    started = time.process_time()
    assert len(fleet(text + "Host *\n  User x\n")) == 2048
    assert time.process_time() - started < 2

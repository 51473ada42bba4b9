"""Plain lists of hosts."""

from __future__ import annotations

import io
import sys

import pytest

from inventory.errors import DocumentError
from inventory.sources import load
from inventory.sources.hostlist import read


def test_a_name_or_expression_a_line_with_user_port_and_slots() -> None:
    fleet = read(
        "hosts.txt",
        "# the lab\n\nops@gpu[01-02]:2222 slots=8  # first rack\ngate\nr[1,2]n[1-2]\n10.0.0.7:22\n"
        "[fe80::1]:2200\nroot@fe80::2%eth0\n::1\n",
    )
    assert [(n.name, n.address, n.user, n.port, n.accelerators) for n in fleet.nodes.values()] == [
        ("0::1", "::1", None, None, None),
        ("10.0.0.7", None, None, 22, None),
        ("fe80::1", None, None, 2200, None),
        ("fe80::2", "fe80::2%eth0", "root", None, None),
        ("gate", None, None, None, None),
        ("gpu01", None, "ops", 2222, 8),
        ("gpu02", None, "ops", 2222, 8),
        ("r1n1", None, None, None, None),
        ("r1n2", None, None, None, None),
        ("r2n1", None, None, None, None),
        ("r2n2", None, None, None, None),
    ]
    assert fleet.node("gpu02").origin == "hosts.txt:3"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a\nb\na\n", "h:3: a: is already listed on line 1; keep one"),
        ("n[1-4]\nn[3-9]\n", "h:2: n3: is already listed on line 1"),
        ("a b\n", "h:1: 'b' is not understood; one name or expression a line"),
        ("a:0\n", "h:1: a:0: a port is a number from 1 to 65535; found 0"),
        ("a:ssh\n", "h:1: 'a:ssh' is not [user@]node[01-16][:port]"),
        ("-oProxyCommand=x\n", "is not a name"),
        ("-x@a\n", "h:1: '-x@a' is not"),
        ("n[1-5000000]\n", "h:1: n[1-5000000]: makes more than 100,000 nodes"),
        ("a[1-60000]\nb[1-60000]\n", "h:2: b[1-60000]: makes more than 100,000 nodes"),
        ("n[1-\n", "h:1: 'n[1-': the brackets"),
        ("n[1,1]\n", "names a node twice"),
    ],
)
def test_a_mistake_names_its_line(text: str, says: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read("h", text)
    assert says in str(caught.value)


def test_standard_input_is_read_where_a_dash_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in ("-", "hosts:-"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("n[1-3]\n"))
        fleet = load(spec)
        assert (list(fleet.nodes), fleet.source) == (["n1", "n2", "n3"], "standard input")

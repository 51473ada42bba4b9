"""Choosing among the nodes of a fleet."""

from __future__ import annotations

import pytest

from inventory.errors import UsageError
from inventory.fleet import Fleet, Node, Selection, expand


@pytest.fixture
def fleet() -> Fleet:
    names = [*expand("node[001-064]"), "gate"]
    groups = {
        "rack1": expand("node[001-032]"),
        "rack2": expand("node[033-064]"),
        "spares": expand("node[063-064]"),
    }
    return Fleet.build("lab", [Node(name) for name in reversed(names)], groups)


def chosen(fleet: Fleet, known: dict[str, str] | None = None, /, **selection: object) -> list[str]:
    return [node.name for node in fleet.select(Selection(**selection), known)]  # type: ignore[arg-type]


def refusal(fleet: Fleet, known: dict[str, str] | None = None, /, **selection: object) -> str:
    with pytest.raises(UsageError) as caught:
        chosen(fleet, known, **selection)
    return str(caught.value)


def test_nodes_stand_in_natural_order_and_know_their_groups(fleet: Fleet) -> None:
    assert list(fleet.nodes)[:3] == ["gate", "node001", "node002"]
    assert fleet.nodes["node064"].groups == {"rack2", "spares"}
    assert fleet.nodes["gate"].groups == frozenset()


def test_an_empty_selection_chooses_everything(fleet: Fleet) -> None:
    assert len(chosen(fleet)) == len(fleet) == 65


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("rack1,node040", expand("node[001-032,040]")),
        ("@rack1,node040", expand("node[001-032,040]")),
        ("rack[1-2]!spares", expand("node[001-062]")),
        ("rack2&spares", ["node063", "node064"]),
        ("rack2^spares", expand("node[033-062]")),
        ("all!rack1!rack2", ["gate"]),
        ("@*!rack[1-2]", ["gate"]),
        ("node06*", expand("node[060-064]")),
        ("spare?", ["node063", "node064"]),
        ("node[003,001]", ["node001", "node003"]),
    ],
)
def test_expressions_mix_nodes_and_groups(fleet: Fleet, expression: str, names: list[str]) -> None:
    assert chosen(fleet, nodes=expression) == names


def test_filters_narrow_one_after_the_other(fleet: Fleet) -> None:
    assert chosen(fleet, nodes="node[060-064]", exclude="spares") == ["node060", "node061", "node062"]
    assert chosen(fleet, nodes="node[030-035]", groups=("rack1",)) == ["node030", "node031", "node032"]
    assert len(chosen(fleet, groups=("rack1", "rack2"))) == 64
    states = {"node001": "cordoned", "node002": "available"}
    assert chosen(fleet, states, states=frozenset({"cordoned", "available"})) == ["node001", "node002"]


def test_a_node_that_the_ledger_does_not_know_is_new(fleet: Fleet) -> None:
    assert "node003" in chosen(fleet, {"node001": "available"}, states=frozenset({"new"}))


def test_an_unknown_name_is_answered_with_the_nearest_ones(fleet: Fleet) -> None:
    assert "no node or group is called 'nod001'; near it: node001" in refusal(fleet, nodes="nod001")
    assert refusal(fleet, nodes="node[064-065]").startswith(
        "--nodes: no node or group is called 'node065'; near it:"
    )
    assert "no node or group is called 'spres'; near it: spares" in refusal(fleet, nodes="spres")
    assert refusal(fleet, exclude="zzz").startswith("--exclude: no node or group is called 'zzz'")
    assert "no group is called 'rak1'; near it: rack1" in refusal(fleet, nodes="@rak1")
    assert (
        refusal(fleet, groups=("node001",))
        == "--group: no group is called 'node001'; known: rack[1-2],spares"
    )
    assert "matches 'x*'" in refusal(fleet, nodes="x*")
    with pytest.raises(UsageError, match="no node is called 'gat'; near it: gate"):
        fleet.node("gat")


def test_an_empty_result_says_which_filter_emptied_it(fleet: Fleet) -> None:
    assert refusal(fleet, nodes="rack1&rack2") == "--nodes 'rack1&rack2' chooses no node of the inventory"
    assert (
        refusal(fleet, nodes="gate", groups=("rack1",))
        == "--group rack1 leaves none of the nodes of --nodes 'gate'"
    )
    assert "--exclude 'all' takes away all 2 nodes of --group spares" in refusal(
        fleet, groups=("spares",), exclude="all"
    )
    message = refusal(fleet, {"node063": "held"}, nodes="spares", states=frozenset({"cordoned"}))
    assert message.startswith("--state cordoned leaves none of the nodes chosen so far, which are: 1 ")
    assert "1 held" in message


def test_a_state_that_does_not_exist_is_refused(fleet: Fleet) -> None:
    assert "avialable" in refusal(fleet, {}, states=frozenset({"avialable"}))


def test_a_malformed_expression_names_the_option(fleet: Fleet) -> None:
    assert refusal(fleet, exclude="node[1").startswith("--exclude: 'node[1'")


def test_a_fleet_that_no_source_may_make_is_refused() -> None:
    with pytest.raises(UsageError, match="no node"):
        Fleet.build("x", [])
    with pytest.raises(UsageError, match=r"declared twice: a"):
        Fleet.build("x", [Node("a"), Node("a")])
    with pytest.raises(UsageError, match="name of a group and of a node"):
        Fleet.build("x", [Node("a")], {"a": ["a"]})
    with pytest.raises(UsageError, match="group g holds b"):
        Fleet.build("x", [Node("a")], {"g": ["a", "b"]})
    with pytest.raises(UsageError, match="cannot be the name"):
        Fleet.build("x", [Node("-oProxyCommand=reboot")])


def test_nodes_can_be_put_into_sets() -> None:
    assert len({Node("a", labels={"rack": "1"}), Node("a", labels={"rack": "1"}), Node("b")}) == 2

"""Declarative checks: each parser finds what it should, and says what it expected where there is nothing."""

from typing import Any

import pytest

from probes.agent.api import Measure, Ran, TimedOut, Unsupported
from probes.agent.bundle import check_request
from probes.catalogue import CheckSpec
from probes.checks.declared import collect, parse, starred
from probes.model import Status
from tests.probes.agent.agent_process import run
from tests.probes.replay import ReplayHost

DF = """\
Filesystem     Type  Use% Mounted on
/dev/sda1      ext4   41% /
//nas/my share cifs   93% /mnt/my share
"""
NUMA = "Preamble\nnode size free\n0 1000 400\n1 1000 300\n"
DEVICES = """{"devices": [
{"id": "npu0", "temp": {"core": 41.5}, "ok": true},
{"id": "npu1", "temp": {"core": null}, "ok": false}]}
"""


def declared(names: list[str] | dict[str, str]) -> dict[str, str]:
    """Metric -> unit; a plain list is of metrics without a unit."""
    return names if isinstance(names, dict) else dict.fromkeys(names, "")


@pytest.mark.parametrize(
    ("parser", "text", "names", "expected"),
    [
        ({"kind": "number"}, " 42\n", ["n"], [("n", 42, None)]),
        ({"kind": "number"}, "-1.5e3", ["n"], [("n", -1500.0, None)]),
        ({"kind": "number"}, "400 Gb/s", {"n": "Gb/s"}, [("n", 400, None)]),
        ({"kind": "number"}, "41.5 C", {"n": "celsius"}, [("n", 41.5, None)]),
        ({"kind": "number"}, "87%", {"n": "percent"}, [("n", 87, None)]),
        ({"kind": "number"}, "0x1f", ["n"], [("n", 31, None)]),
        ({"kind": "text"}, "performance\n", ["t"], [("t", "performance", None)]),
        ({"kind": "lines"}, "a\n\nb\n", ["n"], [("n", 2, None)]),
        ({"kind": "lines", "pattern": "ERR"}, "ERR 1\nfine\n", ["n"], [("n", 1, None)]),
        ({"kind": "lines", "pattern": "ERR"}, "fine\n", ["n"], [("n", 0, None)]),
        (
            {"kind": "regex", "pattern": r"^(?P<device>\w+): speed (?P<speed>\d+)(?: temp (?P<temp>\d+))?"},
            "eth0: speed 100 temp 40\nnoise\neth1: speed 25\n",
            ["speed", "temp"],
            [("speed", 100, "eth0"), ("temp", 40, "eth0"), ("speed", 25, "eth1")],
        ),
        (
            {"kind": "key_value"},
            "a = 1\nb=two words\n#\n",
            ["a", "b"],
            [("a", 1, None), ("b", "two words", None)],
        ),
        ({"kind": "key_value"}, "Time: 10:30\n", ["t"], None),
        (
            {"kind": "key_value", "fields": {"serial": "Serial No", "clock": "At"}},
            "Serial No: 0012\nAt: 10:30\n",
            ["serial", "clock"],
            [("serial", "0012", None), ("clock", "10:30", None)],
        ),
        ({"kind": "key_value", "separator": "|", "fields": {"v": "x:y"}}, "x:y|7\n", ["v"], [("v", 7, None)]),
        (
            {"kind": "json", "fields": {"driver": "driver.version"}},
            '{"driver": {"version": "1.20"}}',
            ["driver"],
            [("driver", "1.20", None)],
        ),
        (
            {"kind": "json", "devices": "devices", "device": "id", "fields": {"t": "temp.core", "ok": "ok"}},
            DEVICES,
            ["t", "ok"],
            [("t", 41.5, "npu0"), ("ok", True, "npu0"), ("t", None, "npu1"), ("ok", False, "npu1")],
        ),
        (
            {"kind": "json", "fields": {"t": "*.temp"}},
            '{"card0": {"temp": 1}, "card1": {"temp": 2}}',
            ["t"],
            [("t", 1, "card0"), ("t", 2, "card1")],
        ),
        (
            {"kind": "json", "devices": ".", "fields": {"e": "ports.*.errors"}},
            '[{"ports": [{"errors": 1}, {"errors": 0}]}]',
            ["e"],
            [("e", 1, "0/0"), ("e", 0, "0/1")],
        ),
        ({"kind": "json", "fields": {"n": "list.1"}}, '{"list": [5, 6]}', ["n"], [("n", 6, None)]),
        (
            {"kind": "table", "skip": 1, "devices": "node", "fields": {"free": "free"}},
            NUMA,
            ["free"],
            [("free", 400, "0"), ("free", 300, "1")],
        ),
        (
            {"kind": "table", "separator": ","},
            "name,speed\neth0,100\n",
            ["name", "speed"],
            [("name", "eth0", None), ("speed", 100, None)],
        ),
    ],
)
def test_a_parser_finds_what_is_there(
    parser: dict[str, Any],
    text: str,
    names: list[str] | dict[str, str],
    expected: list[tuple[object, ...]] | None,
) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="no key 't'; there are: Time"):
            parse(text, parser, declared(names))
    else:
        assert parse(text, parser, declared(names)) == [Measure(*e) for e in expected]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parser", "text", "message"),
    [
        ({"kind": "number"}, "", "expected a number, found ''"),
        ({"kind": "number"}, "N/A", "expected a number, found 'N/A'"),
        ({"kind": "number"}, "1.2.3", "expected a number"),
        ({"kind": "number"}, "12 34", "expected a number"),
        ({"kind": "number"}, "10:30", "expected a number"),
        ({"kind": "number"}, "0x", "expected a number"),
        ({"kind": "number"}, "400 Gb/s", "expected a number without a unit, found '400 Gb/s'"),
        ({"kind": "text"}, " \n", "expected some text, found none"),
        ({"kind": "regex", "pattern": "(?P<v>[0-9]+)"}, "nothing\n", "no line matches"),
        ({"kind": "regex", "pattern": "(?P<v>[0-9]+)"}, "", "no line matches"),
        ({"kind": "regex", "pattern": "[0-9]+"}, "7", "no group named after a metric"),
        ({"kind": "regex", "pattern": "(?P<v>"}, "7", "not a regular expression"),
        ({"kind": "regex"}, "7", "needs a pattern"),
        ({"kind": "key_value"}, "prose without any\n", "expected lines of key=value"),
        ({"kind": "key_value"}, "w=1\n", "no key 'v'; there are: w"),
        ({"kind": "json"}, "{", "expected JSON"),
        ({"kind": "json"}, "[" * 100_000, "expected JSON"),
        ({"kind": "json"}, '{"w": 1}', "nothing is at 'v' of v; there is: w"),
        ({"kind": "json"}, '{"v": [1]}', "v is a list, not a value"),
        ({"kind": "json", "fields": {"v": "*.x"}}, "{}", "nothing is at"),
        ({"kind": "json", "fields": {"v": "*.x"}}, "7", "expected a list or a mapping at"),
        ({"kind": "json", "devices": "d"}, '{"d": []}', "nothing is at v"),
        ({"kind": "json", "devices": "d"}, '{"d": 7}', "expected a list or a mapping of devices at d"),
        ({"kind": "json", "devices": "d"}, '{"d": [{"w": 1}]}', "nothing is at 'v' of v; there is: w"),
        ({"kind": "table"}, "v\n", "expected a header and at least one row, found 1 lines"),
        ({"kind": "table"}, "w x\n1 2\n", "no column 'v'; there are: w, x"),
        ({"kind": "table", "devices": "d"}, "v x\n1 2\n", "no column 'd'"),
        ({"kind": "table"}, "v\n1\n2\n", "2 rows, and no column is given"),
        ({"kind": "table", "devices": "d"}, "d v\na 1\nb\n", "expected 2 columns, found 1 in: b"),
        ({"kind": "table", "separator": ","}, "v\n1,2\n", "expected 1 columns, found 2"),
        ({"kind": "magic"}, "7", "no parser is called 'magic'"),
    ],
)
def test_a_parser_that_finds_nothing_says_what_it_expected(
    parser: dict[str, Any], text: str, message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        parse(text, parser, declared(["v"]))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("1.20", "", "1.20"),
        ("1.2", "", 1.2),
        ("0012", "", "0012"),
        ("550.90.07", "", "550.90.07"),
        ("1e3", "", "1e3"),
        ("41.50", "celsius", 41.5),
        ("41.50 C", "celsius", 41.5),
        ("123 kB", "kB", 123),
        ("123 MB", "kB", "123 MB"),
        ("7", "", 7),
        ("N/A", "errors", "N/A"),
    ],
)
def test_text_becomes_a_number_only_where_nothing_is_lost_or_a_unit_says_so(
    text: str, unit: str, value: object
) -> None:
    found = parse(f"key={text}", {"kind": "key_value"}, {"key": unit})
    assert found == [Measure("key", value)]  # type: ignore[arg-type]
    assert type(found[0].value) is type(value)


@pytest.mark.parametrize("kind", ["number", "text", "lines"])
def test_a_parser_of_one_value_refuses_several_metrics(kind: str) -> None:
    with pytest.raises(ValueError, match="declares 2 metrics"):
        parse("1", {"kind": kind}, declared(["a", "b"]))


def test_the_last_column_of_a_table_may_hold_blanks() -> None:
    parser = {"kind": "table", "devices": "what", "fields": {"size": "size"}}
    assert parse("size what\n12 a long name\n", parser, {}) == [Measure("size", 12, "a long name")]


def test_a_row_with_more_blanks_than_columns_elsewhere_does_not_pass_for_data() -> None:
    parser = {"kind": "table", "devices": "Filesystem", "fields": {"used": "Use%"}}
    # "Mounted on" is two words: the header has one column more than it seems, the row of the share as well.
    with pytest.raises(ValueError, match="expected 5 columns, found 4"):
        parse(DF, parser, {})


@pytest.mark.parametrize(
    ("pattern", "path", "device"),
    [
        ("/sys/class/net/*/mtu", "/sys/class/net/eth0/mtu", "eth0"),
        ("/sys/x/card[0-9]/y", "/sys/x/card3/y", "3"),
        ("/sys/x/port-?.log", "/sys/x/port-7.log", "7"),
        ("/sys/*/deep/*/v", "/sys/a/deep/b/v", "a"),
    ],
)
def test_a_device_is_named_after_what_the_first_wildcard_matched(
    pattern: str, path: str, device: str
) -> None:
    assert starred(pattern, path) == device


def host_with(declared: dict[str, Any], **host: Any) -> ReplayHost:
    params = {"declared": declared, **host.pop("params", {})}
    return ReplayHost(params=params, **host)


def test_each_file_that_a_glob_matches_is_a_device() -> None:
    declared = {"file": "/sys/class/net/*/mtu", "parse": {"kind": "number"}, "metrics": {"mtu": ""}}
    files = {"/sys/class/net/eth0/mtu": "9000\n", "/sys/class/net/eth1/mtu": "1500\n"}
    host = host_with(declared, files=files)
    assert collect(host) == [Measure("mtu", 9000, "eth0"), Measure("mtu", 1500, "eth1")]


def test_one_unreadable_file_among_many_is_a_null_and_all_are_unsupported() -> None:
    declared = {"file": "/sys/class/net/*/speed", "parse": {"kind": "number"}, "metrics": {"speed": ""}}
    broken = Unsupported("/sys/class/net/eth1/speed: Invalid argument")
    host = host_with(
        declared, files={"/sys/class/net/eth0/speed": "100\n", "/sys/class/net/eth1/speed": broken}
    )
    assert collect(host) == [Measure("speed", 100, "eth0"), Measure("speed", None, "eth1")]
    assert host.evidence == ["/sys/class/net/eth1/speed: Invalid argument"]
    with pytest.raises(Unsupported, match="Invalid argument"):
        collect(host_with(declared, files={"/sys/class/net/eth1/speed": broken}))


@pytest.mark.parametrize("file", ["/sys/absent", "/sys/absent/*"])
def test_a_file_that_is_not_there_is_unsupported(file: str) -> None:
    with pytest.raises(Unsupported):
        collect(host_with({"file": file, "parse": {"kind": "text"}, "metrics": {"t": ""}}))


def test_what_could_not_be_parsed_is_kept_as_evidence() -> None:
    declared = {"command": ["tool", "-q"], "parse": {"kind": "number"}, "metrics": {"n": ""}}
    host = host_with(declared, commands={("tool", "-q"): "cannot open device\nbye\n"})
    with pytest.raises(ValueError, match="expected a number"):
        collect(host)
    assert host.evidence == ["cannot open device", "bye"]


def test_a_failing_command_is_an_error_unless_its_status_is_the_answer() -> None:
    declared = {"command": ["tool"], "parse": {"kind": "text"}, "metrics": {"t": ""}}
    commands = {("tool",): Ran(3, "looks fine", "it is not")}
    with pytest.raises(ValueError, match="status 3: it is not"):
        collect(host_with(declared, commands=commands))
    declared["parse"] = {"kind": "exit_status"}
    assert collect(host_with(declared, commands=commands)) == [Measure("t", 3)]


def test_an_absent_or_hanging_command_is_not_an_answer_even_where_the_status_is() -> None:
    declared = {"command": ["tool"], "parse": {"kind": "exit_status"}, "metrics": {"t": ""}}
    with pytest.raises(Unsupported):
        collect(host_with(declared))
    with pytest.raises(TimedOut):
        collect(host_with(declared, commands={("tool",): TimedOut("'tool' hung")}))


def test_parameters_are_put_in_as_one_word_without_and_with_a_shell() -> None:
    declared: dict[str, Any] = {
        "command": ["tool", "{path}", "awk {print}"],
        "parse": {"kind": "text"},
        "metrics": {"t": ""},
    }
    params = {"path": "/data; touch /tmp/x $(id)", "print": "{print}"}
    host = host_with(declared, commands={("tool", params["path"], "awk {print}"): "ok"}, params=params)
    assert collect(host) == [Measure("t", "ok")]
    declared.update(command=["tool {path} | wc"], shell=True)
    shell = ("sh", "-c", "tool '/data; touch /tmp/x $(id)' | wc")
    assert collect(host_with(declared, commands={shell: "ok"}, params=params)) == [Measure("t", "ok")]


def test_a_parameter_without_a_value_is_an_error() -> None:
    declared = {"command": ["tool", "{path}"], "parse": {"kind": "text"}, "metrics": {"t": ""}}
    with pytest.raises(ValueError, match=r"parameter \{path\} that has no value"):
        collect(host_with(declared, commands={("tool",): "ok"}))


def spec(**fields: Any) -> CheckSpec:
    metrics = {name: {"what": name} for name in fields.pop("metrics", ["value"])}
    return CheckSpec(what="w", why="w", fix="f", level="quick", metrics=metrics, **fields)  # type: ignore[arg-type]


def test_a_declared_check_runs_on_a_node_as_the_catalogue_says() -> None:
    specs = {
        "site.words": spec(command=["echo", "a;b", "|", "wc"], parse={"kind": "text"}),
        "site.shell": spec(command=["echo a; echo b"], shell=True, parse={"kind": "lines"}),
        "site.file": spec(file="/proc/sys/kernel/pid_max", parse={"kind": "number"}),
        "site.status": spec(command=["false"], parse={"kind": "exit_status"}),
        "site.absent": spec(command=["no-such-tool"], parse={"kind": "text"}),
        "site.slow": spec(command=["sleep", "60"], parse={"kind": "text"}, timeout=0.5),
        "site.regex": spec(
            command=["echo", "a" * 40 + "!"],
            parse={"kind": "regex", "pattern": "(?P<value>(a+)+)$"},
            timeout=0.5,
        ),
    }
    records = run(*(check_request(name, s) for name, s in specs.items()))
    values = {name: r.measures[0].value for name, r in records.items() if r.measures}
    assert values["site.words"] == "a;b | wc"
    assert values["site.shell"] == 2
    assert isinstance(values["site.file"], int)
    assert values["site.status"] == 1
    assert records["site.absent"].status is Status.UNSUPPORTED
    assert records["site.slow"].status is Status.TIMEOUT
    assert records["site.regex"].status is Status.TIMEOUT, (
        "a pattern that backtracks for ever ends with its check"
    )

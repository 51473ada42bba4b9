"""Every way in which a check can misbehave is its own record, and harms no other. Real processes."""

import time

import pytest

from probes.agent.bundle import CheckRequest
from probes.model import Status
from tests.probes.agent.agent_process import AgentProcess, ask, run


def beside_fine_ones(function: str, **fields: object):
    """The record of a function's check, run between two good ones of the same lane, which must answer."""
    records = run(ask("fine", "odd.before"), ask(function, "odd.tested", **fields), ask("fine", "odd.after"))
    assert records["odd.before"].status is Status.ANSWERED
    assert records["odd.after"].status is Status.ANSWERED
    return records["odd.tested"]


def test_an_answer_comes_with_its_metrics_devices_and_time() -> None:
    record = run(ask("fine"))["odd.fine"]
    assert [(m.metric, m.device, m.value) for m in record.measures] == [
        ("answer", None, 42),
        ("temperature", "0", 41.5),
        ("model", "0", "X-1"),
    ]
    assert 0 < record.seconds < 5


@pytest.mark.parametrize(
    ("function", "params"),
    [
        ("hangs_in_python", {}),
        ("hangs_with_signals_blocked", {}),
        ("hangs_with_signals_blocked", {"in_c": True}),
        ("leaves_a_daemon_and_hangs", {}),
    ],
)
def test_a_check_that_hangs_is_killed_at_its_limit(function: str, params: dict[str, object]) -> None:
    record = beside_fine_ones(function, timeout=0.5, params=params)
    assert record.status is Status.TIMEOUT
    assert "did not end within 0.5 s" in record.detail
    assert 0.5 <= record.seconds < 20


@pytest.mark.parametrize(
    ("function", "command"), [("hangs_in_a_command", "'sleep 3601'"), ("command_ignores_term", "'sh -c trap")]
)
def test_a_command_that_hangs_is_killed_and_named(function: str, command: str) -> None:
    record = beside_fine_ones(function, timeout=0.5)
    assert record.status is Status.TIMEOUT
    assert record.detail.startswith(command)
    assert record.seconds < 20


def test_a_command_that_hung_is_not_waited_for_again_in_its_lane() -> None:
    records = run(
        ask("hangs_in_a_command", timeout=1.0),
        ask("leaves_the_process"),
        ask("asks_for_the_same_command", timeout=10.0),
    )
    again = records["odd.asks_for_the_same_command"]
    assert again.status is Status.TIMEOUT
    assert again.detail == "'sleep 3601' hung in odd.hangs_in_a_command"
    assert again.seconds < 5


def test_a_command_runs_once_a_lane() -> None:
    records = run(
        ask("counts_runs", "odd.first"), ask("counts_runs", "odd.second"), ask("counts_runs", lane="other")
    )
    pids = {name: record.measures[1].value for name, record in records.items()}
    assert all(record.measures[0].value is True for record in records.values())
    assert pids["odd.first"] == pids["odd.second"] != pids["other.counts_runs"]


@pytest.mark.parametrize(
    "function", ["leaves_a_daemon", "own_subprocess", "leaves_a_thread", "shouts", "closes_stdout"]
)
def test_an_answer_counts_though_its_check_is_untidy(function: str) -> None:
    assert beside_fine_ones(function).status is Status.ANSWERED


def test_the_answer_of_a_check_that_forked_comes_once() -> None:
    assert beside_fine_ones("forks_and_both_come_back").status is Status.ANSWERED


@pytest.mark.parametrize(
    ("function", "status", "detail"),
    [
        ("leaves_the_process", Status.ERROR, "the check's process ended with status 3"),
        ("dies_by_a_signal", Status.ERROR, "the check's process was ended by SIGSEGV"),
        ("closes_everything", Status.ERROR, "the check's process closed the channel on which it answers"),
        ("asks_to_exit", Status.ERROR, "SystemExit: 0 (probes/checks/misbehaving.py line "),
        (
            "eats_memory",
            Status.ERROR,
            "ran out of the memory that a check may use (probes/checks/misbehaving.py line ",
        ),
        ("floods", Status.ERROR, "printed more than 8 MiB"),
        ("breaks", Status.ERROR, "KeyError: 'absent' (probes/checks/misbehaving.py line "),
        ("does_not_understand", Status.ERROR, "could not be understood: expected a table, found a poem"),
        ("lacks_its_tool", Status.UNSUPPORTED, "no such program: no-such-program-anywhere"),
        ("lacks_a_file", Status.UNSUPPORTED, "/no/such/file: No such file or directory"),
        ("says_unsupported", Status.UNSUPPORTED, "no such device"),
        ("says_timed_out", Status.TIMEOUT, "'tool' hung"),
        ("fails_by_status", Status.ERROR, "ended with status 9: the reason"),
        ("measures_nothing", Status.ERROR, "no measure at all"),
        ("measures_without_end", Status.ERROR, "more than 4096 measures"),
        ("measures_too_much_text", Status.ERROR, "more than can be sent"),
        ("measures_a_list", Status.ERROR, "answer is a list, not a number or a text"),
        ("is_not_a_measure", Status.ERROR, "not a measure: 7"),
        (
            "no_such_function",
            Status.ERROR,
            "this agent has no function no_such_function in probes.checks.misbehaving",
        ),
    ],
)
def test_what_went_wrong_is_said(function: str, status: Status, detail: str) -> None:
    record = beside_fine_ones(function)
    assert record.status is status
    assert detail in record.detail
    assert record.measures == ()


def test_the_last_words_of_a_process_that_died_are_kept() -> None:
    assert run(ask("leaves_the_process"))["odd.leaves_the_process"].evidence == ("a library says goodbye",)


def test_a_module_that_the_agent_does_not_carry_is_an_error_of_that_check_alone() -> None:
    absent = CheckRequest("odd.absent", "probes.checks.from_the_future", "f", 5.0, "odd")
    records = run(absent, ask("fine"))
    assert "no function f in probes.checks.from_the_future" in records["odd.absent"].detail
    assert records["odd.fine"].status is Status.ANSWERED


def test_a_number_that_is_not_finite_is_null_with_a_note() -> None:
    record = run(ask("is_not_finite"))["odd.is_not_finite"]
    assert [m.value for m in record.measures] == [None, None, 1]
    assert record.evidence == ("ratio of 0: nan is not a finite number", "rate: -inf is not a finite number")


def test_broken_and_hostile_text_arrives_readable_and_harmless() -> None:
    record = run(ask("prints_broken_text"))["odd.prints_broken_text"]
    text, surrogate, escape = (m.value for m in record.measures)
    assert text == "caf\ufffd \ufffd"
    assert surrogate == "\ufffd"
    assert isinstance(escape, str)
    assert "\x1b" not in escape
    assert "\x07" not in escape


def test_commands_get_plain_english_the_vendors_folders_no_input_and_write_no_bytecode() -> None:
    record = run(
        ask("environment"), env={"PATH": "/usr/bin:/bin:relative", "LC_ALL": "de_DE.UTF-8", "LC_TIME": "fr"}
    )
    seen = {m.metric: m.value for m in record["odd.environment"].measures}
    assert seen["lc_all"] == seen["lang"] == "C"
    assert seen["pythondontwritebytecode"] == "1"
    assert str(seen["path"]).startswith("/usr/bin:/bin:")
    assert {"/usr/sbin", "/usr/local/sbin", "/opt/rocm/bin"} <= set(str(seen["path"]).split(":"))
    assert "relative" not in str(seen["path"])
    assert seen["cwd"] == "/"
    assert seen["command_input"] == 0


def test_modules_beside_the_login_or_in_pythonpath_cannot_replace_standard_ones(tmp_path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    env = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    with AgentProcess([ask("python_path")], env=env, cwd=str(tmp_path)) as agent:
        values = {m.metric: m.value for m in agent.finish()["odd.python_path"].measures}
    assert values["first_is_standard"] is True


def test_a_check_about_an_absent_vendor_is_not_applicable() -> None:
    # Device nodes and PCI say that this test's machine has no Ascend NPU, or else the test proves nothing.
    records = run(ask("fine", needs="ascend"), ask("fine", "odd.unknown", needs="unobtainium"))
    with AgentProcess([ask("fine")]) as agent:
        agent.finish()
        present = str(agent.decoder.hello["vendors"]).split(",")
    assert "ascend" not in present
    assert records["odd.fine"].status is Status.NOT_APPLICABLE
    assert records["odd.fine"].detail == "this node has no ascend device"
    assert records["odd.unknown"].status is Status.ERROR


def test_lanes_run_side_by_side_and_loading_checks_alone_after_them() -> None:
    light = [ask("sleeps", lane=lane, params={"seconds": 0.5}) for lane in ("a", "b", "c")]
    load = [ask("sleeps", lane=lane, params={"seconds": 0.2}, loads=True) for lane in ("x", "y")]
    started = time.monotonic()
    records = run(load[0], *light, load[1])
    assert time.monotonic() - started < 20
    spans = {n: tuple(m.value for m in r.measures) for n, r in records.items()}
    a, b, c, x, y = (spans[f"{lane}.sleeps"] for lane in "abcxy")
    assert max(s[0] for s in (a, b, c)) < min(s[1] for s in (a, b, c))
    assert max(s[1] for s in (a, b, c)) <= x[0]
    assert x[1] <= y[0]


def test_records_come_as_their_checks_end() -> None:
    with AgentProcess([ask("fine", lane="quick"), ask("hangs_in_python", timeout=20.0)]) as agent:
        agent.read_until(lambda: "quick.fine" in agent.decoder.records, 10)
        assert agent.decoder.hello
        assert not agent.decoder.done

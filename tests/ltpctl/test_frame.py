"""The command line's frame: start-up, options, errors, exit statuses; through the real program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LTPCTL = [sys.executable, "-c", "from ltpctl.cli import main; main()"]
HEAVY = {
    "torch",
    "asyncssh",
    "sqlalchemy",
    "paramiko",
    "jinja2",
    "pydantic",
    "ClusterShell",
    "rich",
    "alembic",
}

WRITES_A_FILE = [["inventory", "import"]]
"""Commands whose output is a document already."""


def ltpctl(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LTPCTL, *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['ltpctl', '--help']\n"
        "from ltpctl.cli import main\n"
        "try: main()\n"
        f"except SystemExit: print('HEAVY', sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False, text=True, timeout=60
    )
    assert "HEAVY []" in done.stderr
    assert "validate" in done.stdout


def test_help_starts_in_under_a_fifth_of_a_second() -> None:
    def once() -> float:
        process = subprocess.Popen([*LTPCTL, "--help"], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    # CPU time, the least of several: other tests run beside this one, and an idle core is what is promised.
    assert min(once() for _ in range(5)) < 0.2


def test_every_command_has_help_with_an_example() -> None:
    import typer

    from ltpctl.cli import app

    def commands(command: object, path: list[str]) -> list[list[str]]:
        inner = getattr(command, "commands", None)
        return [p for name, sub in inner.items() for p in commands(sub, [*path, name])] if inner else [path]

    for path in commands(typer.main.get_command(app), []):
        shown = ltpctl(*path, "--help")
        assert shown.returncode == 0, path
        assert "Example:" in shown.stdout, path
        assert "--json" in shown.stdout or path in WRITES_A_FILE, path


def test_version_is_the_package_s() -> None:
    from ltpctl import __version__

    assert ltpctl("--version").stdout == f"ltpctl {__version__}\n"


def test_a_wrong_option_exits_2() -> None:
    assert ltpctl("doctor", "--colour").returncode == 2


def test_a_wrong_configuration_file_is_one_line_with_file_line_and_field(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("ssh:\n  concurency: 12\n")
    done = ltpctl("config", "show", "--config", str(file))
    assert done.returncode == 2
    assert f"{file}:2" in done.stderr
    assert "did you mean 'concurrency'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("environment", "flags", "value", "source"),
    [
        ({}, [], None, "default"),
        ({"LTP_INVENTORY": "env.yaml"}, [], "env.yaml", "environment LTP_INVENTORY"),
        ({"LTP_INVENTORY": "env.yaml"}, ["-i", "flag.yaml"], "flag.yaml", "flag --inventory"),
    ],
)
def test_flags_beat_environment_beats_defaults(
    environment: dict[str, str], flags: list[str], value: str | None, source: str
) -> None:
    settings = json.loads(ltpctl("config", "show", "--json", *flags, **environment).stdout)["settings"]
    assert next((s["value"], s["source"]) for s in settings if s["name"] == "inventory") == (value, source)


def test_environment_beats_the_file_and_the_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("inventory: a.yaml\nssh:\n  concurrency: 12\n  user: ops\n")
    done = ltpctl("config", "show", "--json", "--config", str(file), LTP_SSH_CONCURRENCY="99")
    by_name = {s["name"]: s for s in json.loads(done.stdout)["settings"]}
    assert (by_name["ssh.concurrency"]["value"], by_name["ssh.concurrency"]["source"]) == (
        99,
        "environment LTP_SSH_CONCURRENCY",
    )
    assert by_name["ssh.user"]["source"] == f"file {file}:4"


def test_a_wrong_variable_names_itself() -> None:
    done = ltpctl("config", "show", LTP_SSH_CONCURRENCY="many")
    assert done.returncode == 2
    assert "environment LTP_SSH_CONCURRENCY" in done.stderr


def test_the_ledger_s_password_is_never_shown() -> None:
    for arguments in (("config", "show"), ("config", "show", "--json"), ("doctor",), ("doctor", "--json")):
        done = ltpctl(*arguments, LTP_LEDGER="postgresql://ltp:hunter2@127.0.0.1:1/ltp")
        assert "hunter2" not in done.stdout + done.stderr, arguments


def test_the_template_is_a_configuration_that_changes_nothing(tmp_path: Path) -> None:
    template = ltpctl("config", "template").stdout
    file = tmp_path / "config.yaml"
    file.write_text(template.replace("#", "", 0))
    assert ltpctl("config", "show", "--config", str(file)).returncode == 0
    # Uncommented, every line is a valid setting at its default.
    file.write_text("\n".join(line.removeprefix("#") for line in template.splitlines()))
    settings = json.loads(ltpctl("config", "show", "--json", "--config", str(file)).stdout)["settings"]
    assert all(s["source"].startswith(f"file {file}:") for s in settings)


def test_doctor_names_a_state_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = ltpctl("doctor", "--json", "--state-dir", "/proc/nowhere")
    items = {item["name"]: item for item in json.loads(done.stdout)["items"]}
    assert items["state folder"]["state"] == "missing"
    assert done.returncode == 1


def test_text_from_elsewhere_cannot_move_the_cursor() -> None:
    from ltpctl.console import clean

    assert clean("a\x1b[2Jb\u202ec") == "a\\x1b[2Jb\\u202ec"


ENDINGS = """
import sys
sys.argv = ["t", "end"]
from ltpctl import frame
from ltpctl.exits import Exit
from inventory.errors import UsageError
from inventory.ledger import LedgerBusy
app = frame.app("Test.")

@app.callback()
def options() -> None: ...

@frame.command(app, "end", example="t end")
def end(session):
    "End."
    {body}

app()
"""


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("return None", 0, ""),
        ("return Exit.FINDINGS", 1, ""),
        ("raise UsageError('wrong file')", 2, "ltpctl: wrong file\n"),
        ("raise frame.Undetermined('nobody knows')", 3, "ltpctl: nobody knows\n"),
        ("raise frame.LockHeld('another run')", 75, "ltpctl: another run\n"),
        ("raise LedgerBusy('the ledger is busy')", 75, "ltpctl: the ledger is busy\n"),
        ("raise KeyboardInterrupt", 130, "ltpctl: interrupted\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 130, "ltpctl: interrupted\n"),
    ],
)
def test_every_ending_has_its_exit_status_and_one_line(body: str, status: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDINGS.format(body=body)],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (status, said)


def test_an_error_of_ours_is_a_traceback_and_no_exit_status_of_a_person_s_mistake() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDINGS.format(body="raise RuntimeError('a bug')")],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert "Traceback" in done.stderr
    assert done.returncode not in (0, 2, 3, 75, 130)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -c 'from ltpctl.cli import main; main()' validate list | head -1"],
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("CHECK")
    assert done.stderr == ""


def test_config_path_names_the_file_that_is_read(tmp_path: Path) -> None:
    chosen, named = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    assert ltpctl("config", "path", LTP_CONFIG=chosen).stdout == f"{chosen}\n"
    assert ltpctl("config", "path", "--config", named, LTP_CONFIG=chosen).stdout == f"{named}\n"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://keeper:s3cret@db/ltp",
        "postgresql://db/ltp?user=keeper&password=s3cret",
        "postgresql://db/ltp?sslpassword=s3cret&sslmode=require",
    ],
)
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_config_show_shows_no_password_of_the_ledger_s_url(url: str, form: tuple[str, ...]) -> None:
    shown = ltpctl("config", "show", *form, LTP_LEDGER=url)
    assert shown.returncode == 0
    assert "***" in shown.stdout
    assert "s3cret" not in shown.stdout + shown.stderr


NAMELESS = """
import pwd
def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
from ltpctl.cli import main
main()
"""


def test_a_user_without_a_name_as_in_a_container_can_set_a_state(tmp_path: Path) -> None:
    names = ("LOGNAME", "USER", "LNAME", "USERNAME")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            NAMELESS,
            "inventory",
            "set-state",
            os.uname().nodename,
            "held",
            "--reason",
            "x",
        ],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
        env={k: v for k, v in os.environ.items() if k not in names} | {"LTP_STATE_DIR": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    history = ltpctl(
        "inventory",
        "history",
        os.uname().nodename,
        "--json",
        LTP_STATE_DIR=str(tmp_path),
        **dict.fromkeys(names, ""),
    )
    assert json.loads(history.stdout)["events"][0]["actor"] == f"{os.getuid()}@{os.uname().nodename}"


def test_a_report_in_the_place_of_a_folder_is_refused_before_any_node_is_asked(tmp_path: Path) -> None:
    done = ltpctl("validate", "nodes", "--html", str(tmp_path), LTP_STATE_DIR=str(tmp_path / "state"))
    assert done.returncode == 2
    assert "this is a folder" in done.stderr
    assert not (tmp_path / "state").exists()


FAILING = """
schema: ltpctl/checks/1
family: site
checks:
  site.file:
    what: A file that is read.
    why: Test.
    fix: Test.
    level: quick
    file: {path}
    parse: {{kind: number}}
    metrics:
      value: {{what: number, limit: {{fail: "== 1"}}}}
"""


@pytest.mark.parametrize(("content", "status"), [("0", 1), ("1", 0)])
def test_a_reader_that_leaves_before_the_verdicts_takes_neither_status_nor_report_away(
    tmp_path: Path, content: str, status: int
) -> None:
    (tmp_path / "value").write_text(content)
    (tmp_path / "checks.yaml").write_text(FAILING.format(path=tmp_path / "value"))
    (tmp_path / "config.yaml").write_text(f"validate: {{checks: [{tmp_path / 'checks.yaml'}]}}\n")
    for form in ((), ("--json",)):
        reader, writer = os.pipe()
        os.close(reader)
        report = tmp_path / "report.xml"
        report.unlink(missing_ok=True)
        arguments = ("--check", "site", "--config", str(tmp_path / "config.yaml"), "--junit", str(report))
        done = subprocess.run(
            [*LTPCTL, "validate", "nodes", *arguments, *form],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
            text=True,
            timeout=60,
            env={**os.environ, "LTP_STATE_DIR": str(tmp_path / "state")},
        )
        os.close(writer)
        assert "Traceback" not in done.stderr
        assert done.returncode == status, form
        assert report.read_text().startswith("<?xml")

"""Where a ledger may be, and what is said about places that are full, damaged, foreign, closed or newer."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from sqlalchemy import inspect

from inventory.ledger import Ledger, LedgerError, VerdictRow, open_ledger
from inventory.ledger import schema as newest
from inventory.ledger.engine import postgres_engine, sqlite_engine
from inventory.ledger.migrate import upgrade
from inventory.ledger.place import find_place
from inventory.lifecycle import State
from tests.inventory.conftest import ROOT
from tests.postgres import PostgresServer


def _fill(ledger: Ledger, rounds: int = 3) -> list[int]:
    return [
        ledger.transition(f"node{i}", "available", "a", "ok", {"text": "x" * 2000}).id for i in range(rounds)
    ]


# A disk without space


def test_a_full_disk_is_one_clear_line_and_the_ledger_opens_again(small_disk: Path) -> None:
    path = small_disk / "ledger.db"
    written: list[int] = []

    def write_on() -> None:
        with open_ledger(path) as ledger:
            for i in range(2000):
                made = ledger.transition(f"node{i}", "available", "a", "ok", {"text": "x" * 4000})
                written.append(made.id)

    with pytest.raises(LedgerError, match="no space is left on the disk of the ledger"):
        write_on()
    assert len(written) > 20
    # Full as it is, it can be read.
    with open_ledger(path, read_only=True) as ledger:
        assert ledger.check() == []
        assert [event.id for event in ledger.events()] == written
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    with open_ledger(path) as ledger:
        assert ledger.check() == []
        assert [event.id for event in ledger.events()] == written
        ledger.transition("late", "available", "a", "there is space again", {})


def test_no_space_for_a_new_ledger_is_one_clear_line(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"\0" * (2 << 20))
    with pytest.raises(LedgerError, match="no space is left"):
        open_ledger(small_disk / "ledger.db")
    (small_disk / "ballast").unlink()
    with open_ledger(small_disk / "ledger.db") as ledger:
        _fill(ledger)


# Damaged and foreign files


@pytest.mark.parametrize(
    "content",
    [b"not a database at all, but somebody's notes\n" * 200, b"short", bytes(range(256)) * 64],
    ids=["text", "short", "binary"],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_is_no_ledger_is_refused_and_left_as_it_is(
    tmp_path: Path, content: bytes, read_only: bool
) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(content)
    with pytest.raises(
        LedgerError, match=r"ledger\.db is damaged or not an SQLite file.*nothing was written to it"
    ):
        open_ledger(path, read_only=read_only)
    assert path.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger.db"]


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A closed ledger with a few hundred events."""
    path = tmp_path / "ledger.db"
    with open_ledger(path) as ledger:
        with ledger.transaction() as tx:
            for i in range(300):
                tx.transition(f"node{i}", "available", "a", "ok", {"text": "x" * 1000})
        run = ledger.begin_run("validate", "quick", "a", "all")
        ledger.record_verdicts(run, [VerdictRow("node1", "healthy")])
    return path


def test_a_ledger_with_a_damaged_head_is_refused_and_left_as_it_is(sound: Path) -> None:
    content = bytearray(sound.read_bytes())
    content[0:100] = os.urandom(100)
    sound.write_bytes(content)
    with pytest.raises(LedgerError, match="damaged or not an SQLite file"):
        open_ledger(sound)
    assert sound.read_bytes() == content


def test_damage_in_the_middle_of_a_ledger_is_found_and_said(sound: Path) -> None:
    content = bytearray(sound.read_bytes())
    # All but the first pages, which hold the schema and the version.
    content[len(content) // 3 :] = b"\xff" * (len(content) - len(content) // 3)
    sound.write_bytes(content)
    with open_ledger(sound) as ledger, pytest.raises(LedgerError, match="damaged or not an SQLite file"):
        ledger.events()


def test_a_ledger_cut_to_nothing_beside_its_log_is_refused(sound: Path) -> None:
    sound.write_bytes(b"")
    sound.with_name("ledger.db-wal").write_bytes(b"what is left of the last changes")
    with pytest.raises(LedgerError, match=r"ledger\.db is empty but ledger\.db-wal is not"):
        open_ledger(sound)
    assert sound.with_name("ledger.db-wal").exists()


def test_a_database_of_another_program_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "photos.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE photos (id INTEGER)")
    other.close()
    before = hashlib.sha256(path.read_bytes()).digest()
    with pytest.raises(
        LedgerError, match=r"photos\.db is a database of something else \(with the tables photos\)"
    ):
        open_ledger(path)
    assert hashlib.sha256(path.read_bytes()).digest() == before


@pytest.mark.postgres
def test_a_postgresql_database_whose_tables_are_anothers_is_refused(postgres_url: str) -> None:
    _sql(postgres_url, "CREATE TABLE nodes (name text)")
    with pytest.raises(LedgerError, match=r"database of something else \(with the tables nodes\)"):
        open_ledger(postgres_url)


# Folders and file systems


def test_missing_folders_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "a" / "b" / "ledger.db") as ledger:
        _fill(ledger)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"is a folder; the ledger is a file: name one in it"):
        open_ledger(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match=r"cannot be (opened|made)"):
        open_ledger(tmp_path / "file" / "ledger.db")


@pytest.fixture
def closed_folder(small_disk: Path) -> Iterator[Path]:
    """A file system that is mounted read-only, with a ledger in it."""
    with open_ledger(small_disk / "ledger.db") as ledger:
        _fill(ledger)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    yield small_disk
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


def test_a_ledger_on_a_read_only_file_system_is_read_but_not_opened_for_writing(closed_folder: Path) -> None:
    with open_ledger(closed_folder / "ledger.db", read_only=True) as ledger:
        assert len(ledger.states(None)) == 3
        assert ledger.check() == []
    with pytest.raises(LedgerError, match="is not writable by this user"):
        open_ledger(closed_folder / "ledger.db")


def test_a_new_ledger_in_an_unwritable_folder_is_one_clear_line(closed_folder: Path) -> None:
    with pytest.raises(LedgerError, match="is not writable by this user"):
        open_ledger(closed_folder / "another.db")
    with pytest.raises(LedgerError, match=r"folder .* cannot be made"):
        open_ledger(closed_folder / "sub" / "ledger.db")


def test_a_reader_sees_what_a_killed_writer_left_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    _python(
        "import os, sys; from inventory.ledger import open_ledger; ledger = open_ledger(sys.argv[1]);"
        "ledger.transition('node1', 'available', 'a', 'ok', {}); os.kill(os.getpid(), 9)",
        str(path),
        status=-9,
    )
    assert path.with_name("ledger.db-wal").stat().st_size > 0
    with open_ledger(path, read_only=True) as ledger:
        assert list(ledger.states(None)) == ["node1"]


# Migrations


def _make_old(url: str) -> None:
    """A ledger as the first revision left it, with history."""
    place = find_place(url)
    engine = sqlite_engine(place.path, 5, "rwc") if place.path else postgres_engine(place, 5)
    upgrade(engine, place, to=newest.REVISIONS[0])
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO events (time, kind, node, actor, reason, evidence, run, source, target)"
            " VALUES (1.5, 'transition', 'node1', 'a', 'old', '{\"x\": 1}', NULL, 'new', 'available')"
        )
        connection.exec_driver_sql("INSERT INTO nodes (node, state, event) VALUES ('node1', 'available', 1)")
    engine.dispose()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_ledger_of_the_first_version_is_brought_up_to_date_and_keeps_its_history(
    ledger_url: str, read_only: bool
) -> None:
    _make_old(ledger_url)
    with open_ledger(ledger_url, read_only=read_only) as ledger:
        state = ledger.states(None)["node1"]
        assert (state.state, state.since, state.reason, state.evidence) == (
            State.AVAILABLE,
            1.5,
            "old",
            {"x": 1},
        )
        assert ledger.runs() == []
        assert ledger.check() == []
    with open_ledger(ledger_url) as ledger:
        run = ledger.begin_run("validate", "quick", "a", "all")
        ledger.record_verdicts(run, [VerdictRow("node1", "healthy")])
        assert ledger.transition("node1", "cordoned", "a", "bad", {}).id == 2


def test_a_ledger_of_a_newer_program_is_refused_and_left_as_it_is(ledger_url: str) -> None:
    with open_ledger(ledger_url) as ledger:
        _fill(ledger)
    _sql(ledger_url, f"UPDATE {newest.VERSION_TABLE} SET version_num = '0999'")
    for read_only in (False, True):
        with pytest.raises(
            LedgerError, match=r"newer version of this program \(its schema is 0999.*upgrade ltpctl"
        ):
            open_ledger(ledger_url, read_only=read_only)


def test_the_migrations_lead_to_the_tables_that_the_program_uses(ledger_url: str) -> None:
    with open_ledger(ledger_url) as ledger, ledger.transaction() as tx:
        found = inspect(tx.connection)
        assert set(found.get_table_names()) == {*newest.metadata.tables, newest.VERSION_TABLE}
        for table in newest.metadata.tables.values():
            columns = {
                c["name"]: (bool(c["nullable"]), str(c["type"])) for c in found.get_columns(table.name)
            }
            dialect = tx.connection.dialect
            expected = {c.name: (bool(c.nullable), str(c.type.compile(dialect))) for c in table.columns}
            assert {k: v[0] for k, v in columns.items()} == {k: v[0] for k, v in expected.items()}
            assert {k: _type(v[1]) for k, v in columns.items()} == {
                k: _type(v[1]) for k, v in expected.items()
            }
            key = found.get_pk_constraint(table.name)["constrained_columns"]
            assert key == [c.name for c in table.primary_key]
            assert {
                i["name"] for i in found.get_indexes(table.name) if not i.get("duplicates_constraint")
            } == {i.name for i in table.indexes}


def test_every_migration_ships_and_is_known() -> None:
    folder = files("inventory.ledger") / "migrations" / "versions"
    shipped = sorted(p.name[1:5] for p in folder.iterdir() if p.name.startswith("r0"))
    assert shipped == list(newest.REVISIONS)


# What it costs and who may use it


def test_importing_the_ledger_imports_no_database_library() -> None:
    _python(
        "import sys, inventory.ledger, inventory.lifecycle;"
        "heavy = {'sqlalchemy', 'alembic', 'psycopg', 'pydantic', 'yaml'} & set(sys.modules);"
        "assert not heavy, heavy"
    )


def test_the_command_line_starts_without_the_ledger() -> None:
    _python("import sys, ltpctl.cli; assert 'inventory.ledger' not in sys.modules")


def test_opening_a_ledger_that_is_up_to_date_does_not_import_alembic(ledger_url: str) -> None:
    with open_ledger(ledger_url) as ledger:
        _fill(ledger)
    _python(
        "import sys; from inventory.ledger import open_ledger; ledger = open_ledger(sys.argv[1]);"
        "assert len(ledger.states(None)) == 3; assert 'alembic' not in sys.modules",
        ledger_url,
    )


def test_a_forked_child_is_refused_the_ledger_of_its_parent(tmp_path: Path) -> None:
    _python(
        "import os, sys\n"
        "from inventory.ledger import open_ledger\n"
        "ledger = open_ledger(sys.argv[1])\n"
        "if os.fork() == 0:\n"
        "    try: ledger.states(None)\n"
        "    except RuntimeError as error: os._exit(0 if 'open it again after a fork' in str(error) else 1)\n"
        "    os._exit(2)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 0\n",
        str(tmp_path / "ledger.db"),
    )


# URLs and their passwords


@pytest.mark.postgres
def test_two_ledgers_in_schemas_of_one_database_do_not_meet(postgres_url: str) -> None:
    for name in ("east", "west"):
        _sql(postgres_url, f"CREATE SCHEMA {name}")
    east, west = (f"{postgres_url}&options=-csearch_path%3D{name}" for name in ("east", "west"))
    with open_ledger(east) as first, open_ledger(west, timeout=1) as second, first.transaction() as tx:
        tx.transition("node1", "available", "a", "ok", {})
        # Neither waits for the other's turn, nor sees the other's nodes.
        second.transition("node2", "available", "a", "ok", {})
        assert list(second.states(None)) == ["node2"]
        assert list(tx.states(None)) == ["node1"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "the ledger's place is empty"),
        ("mysql://root:hunter22@db/ledger", "cannot be kept in 'mysql'"),
        ("sqlite://", "names no file"),
        ("postgresql://u:hunter22@host:port/db", "cannot be understood"),
        ("://hunter22", "cannot be understood"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(LedgerError, match=said) as caught:
        open_ledger(url)
    assert "hunter22" not in "".join(traceback.format_exception(caught.value))


def test_a_sqlite_url_and_a_path_name_the_same_ledger(tmp_path: Path) -> None:
    odd = tmp_path / "100% odd?name #1.db"
    with open_ledger(odd) as ledger:
        _fill(ledger)
    assert odd.exists()
    plain = tmp_path / "plain.db"
    with open_ledger(f"sqlite:///{plain}") as ledger:
        _fill(ledger)
        assert str(ledger) == str(plain)
    with open_ledger(str(plain)) as ledger:
        assert len(ledger.events()) == 3


def _shown_everywhere(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error) + str(error)


@pytest.mark.postgres
def test_a_password_works_and_is_never_shown(
    postgres_server: PostgresServer, postgres_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    url = postgres_server.tcp_url(postgres_url)
    with open_ledger(url) as ledger:
        _fill(ledger)
        shown = f"{ledger} {ledger!r} {vars(ledger)}"
    assert f"postgresql://keeper:***@127.0.0.1:{postgres_server.port}" in shown
    assert postgres_server.password not in shown
    assert postgres_server.password not in "".join(capfd.readouterr())


@pytest.mark.postgres
@pytest.mark.parametrize(
    "form", ["wrong password", "in the query", "no database", "no server", "unknown option"]
)
def test_a_server_that_refuses_is_one_clear_line_without_the_password(
    postgres_server: PostgresServer, postgres_url: str, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    secret = "hunter22-secret"
    good = postgres_server.tcp_url(postgres_url)
    wrong = postgres_server.tcp_url(postgres_url, secret)
    url, said = {
        "wrong password": (wrong, "password authentication failed"),
        "in the query": (
            wrong.replace(f":{secret}@", "@") + f"?password={secret}",
            "password authentication failed",
        ),
        "no database": (good.rsplit("/", 1)[0] + "/absent", 'database "absent" does not exist'),
        "no server": (wrong.replace(f":{postgres_server.port}/", ":1/"), "cannot be reached"),
        "unknown option": (wrong + f"?sslpassword={secret}&nonsense=1", "nonsense"),
    }[form]
    with pytest.raises(LedgerError, match=said) as caught:
        open_ledger(url)
    everything = _shown_everywhere(caught.value) + caplog.text
    assert secret not in everything
    assert postgres_server.password not in everything
    assert "\n" not in str(caught.value)


@pytest.mark.postgres
def test_a_user_who_may_only_read_gets_a_clear_line_for_writing(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    with open_ledger(postgres_url) as ledger:
        _fill(ledger)
    name = postgres_url.split("/")[3].split("?")[0]
    _sql(postgres_url, f"CREATE ROLE {name}_guest LOGIN")
    _sql(postgres_url, f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}_guest")
    guest = postgres_url.replace("keeper@", f"{name}_guest@")
    with open_ledger(guest) as ledger:
        assert len(ledger.states(None)) == 3
        with pytest.raises(LedgerError, match="cannot be written by this user: permission denied"):
            ledger.transition("node1", "cordoned", "a", "b", {})


def _sql(url: str, statement: str) -> None:
    place = find_place(url)
    engine = sqlite_engine(place.path, 5, "rw") if place.path else postgres_engine(place, 5)
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()


def _type(name: str) -> str:
    """SERIAL columns are integers, and the databases have two names for a double."""
    plain = name.upper().replace("BIGSERIAL", "BIGINT").replace("SERIAL", "INTEGER")
    return "DOUBLE" if plain.startswith("DOUBLE") else plain


def _python(code: str, *arguments: str, status: int = 0) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == status, done.stderr

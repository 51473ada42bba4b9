"""What every command has in common: global options, selection, settings, errors as exit statuses."""

from __future__ import annotations

import errno
import functools
import inspect
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ltpctl.exits import Exit

if TYPE_CHECKING:
    from types import FrameType

    from inventory.fleet import Fleet, Node, Selection
    from inventory.ledger import Ledger
    from inventory.transport.settings import SshSettings
    from ltpctl.console import Output
    from ltpctl.settings import Configuration

_GLOBAL: dict[str, Any] = {
    "inventory": Annotated[
        str | None,
        typer.Option(
            "--inventory", "-i", metavar="SOURCE", help="cluster.yaml, or KIND:PATH of another source"
        ),
    ],
    "state_dir": Annotated[
        str | None, typer.Option("--state-dir", metavar="DIR", help="where ledger and reports live")
    ],
    "ledger": Annotated[
        str | None, typer.Option("--ledger", metavar="URL", help="ledger file or database URL")
    ],
    "config": Annotated[str | None, typer.Option("--config", metavar="FILE", help="configuration file")],
    "json": Annotated[bool, typer.Option("--json", help="one JSON document on stdout")],
    "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="more detail")],
    "no_color": Annotated[bool, typer.Option("--no-color", help="plain text, as with NO_COLOR=1")],
}
_SELECTION: dict[str, Any] = {
    "nodes": Annotated[
        str | None,
        typer.Option("--nodes", "-n", metavar="SET", help="node set and groups: 'rack1,node[200-210]'"),
    ],
    "exclude": Annotated[str | None, typer.Option("--exclude", "-x", metavar="SET", help="all but these")],
    "group": Annotated[
        list[str] | None, typer.Option("--group", "-g", metavar="NAME", help="a group; repeatable")
    ],
    "state": Annotated[
        list[str] | None, typer.Option("--state", metavar="STATE", help="ledger state; repeatable")
    ],
}


class LockHeld(Exception):
    """Another run holds the lock that this command needs: exit 75."""


class Undetermined(Exception):
    """The answer could not be found out: exit 3."""


@dataclass
class Session:
    """One invocation: its global options, and what they lead to, each made when first asked for."""

    options: dict[str, Any] = field(default_factory=dict)
    selection_options: dict[str, Any] = field(default_factory=dict)
    found: Exit = Exit.OK
    """The answer as far as it is known: the exit status if the reader of stdout leaves before the end."""

    @functools.cached_property
    def out(self) -> Output:
        from ltpctl.console import Output

        return Output(
            json=bool(self.options.get("json")),
            verbose=bool(self.options.get("verbose")),
            color=False if self.options.get("no_color") else None,
        )

    @functools.cached_property
    def configuration(self) -> Configuration:
        from ltpctl.settings import resolve

        flags = {name: self.options.get(name) for name in ("inventory", "state_dir", "ledger")}
        return resolve(self.options.get("config"), flags)

    @functools.cached_property
    def fleet(self) -> Fleet:
        from inventory.sources import load

        return load(self.configuration.settings.inventory)

    @property
    def selection(self) -> Selection:
        from inventory.fleet import Selection

        chosen = self.selection_options
        return Selection(
            nodes=chosen.get("nodes"),
            exclude=chosen.get("exclude"),
            groups=tuple(chosen.get("group") or ()),
            states=frozenset(chosen.get("state") or ()),
        )

    def nodes(self) -> tuple[Node, ...]:
        """The nodes that the selection options choose."""
        states = None
        if self.selection.states:
            with self.ledger(read_only=True) as ledger:
                states = {name: entry.state for name, entry in ledger.states(self.fleet.nodes).items()}
        return self.fleet.select(self.selection, states)

    def ledger(self, read_only: bool = False) -> Ledger:
        """Open the ledger (a context manager)."""
        from inventory.ledger import open_ledger

        return open_ledger(self.configuration.ledger, read_only=read_only)

    def ssh_settings(self, accept_new: bool = False) -> SshSettings:
        """The transport's settings as the configuration says."""
        from ltpctl.wiring import ssh_settings

        return ssh_settings(self.configuration.settings.ssh, accept_new)


def command(
    app: typer.Typer,
    name: str,
    *,
    example: str,
    selection: bool = False,
    globals_: tuple[str, ...] = tuple(_GLOBAL),
) -> Callable[[Callable[..., Exit | None]], Callable[..., None]]:
    """Register ``function(session, ...) -> Exit | None`` as a command, with the global options added.

    `example` is shown below ``--help``. `selection` adds ``--nodes --exclude --group --state``.
    """
    common = {key: _GLOBAL[key] for key in globals_}
    chosen = _SELECTION if selection else {}

    def register(function: Callable[..., Exit | None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        def run(**values: Any) -> None:
            session = Session(
                {key: values.pop(key) for key in common}, {key: values.pop(key) for key in chosen}
            )
            _finish(session, lambda: function(session, **values))

        added = [
            inspect.Parameter(
                key, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=False if key in _FLAGS else None
            )
            for key, kind in (chosen | common).items()
        ]
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature(keyword_only + added)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in keyword_only + added}
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        app.command(name, help=function.__doc__, epilog=_example(example))(run)
        return run

    return register


def app(help_text: str, **options: Any) -> typer.Typer:
    """A typer app in the house's manner. Plain help: rich's costs 100 ms at every ``--help``."""
    return typer.Typer(
        help=help_text, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, **options
    )


_FLAGS = {"json", "verbose", "no_color"}


def _example(text: str) -> str:
    lines = "\n".join(f"  {line}" for line in inspect.cleandoc(text).splitlines())
    return f"\b\nExample:\n{lines}"


def _finish(session: Session, work: Callable[[], Exit | None]) -> NoReturn:
    """Run a command; turn how it ended into an exit status."""
    from inventory.errors import UsageError
    from inventory.ledger.errors import LedgerBusy

    interruptible()
    try:
        status = session.found = work() or Exit.OK
        sys.stdout.flush()
    except (LockHeld, LedgerBusy) as error:
        session.out.error(str(error))
        status = Exit.LOCKED
    except UsageError as error:
        session.out.error(str(error))
        status = Exit.USAGE
    except Undetermined as error:
        session.out.error(str(error))
        status = Exit.UNDETERMINED
    except KeyboardInterrupt:
        session.out.error("interrupted")
        status = Exit.INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # The reader has seen enough (`| head`); nothing more can be written, not even at exit. rich says that
        # by SystemExit, which nothing else here raises.
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115
        status = session.found
    except Exception as error:  # noqa: BLE001
        if isinstance(error, OSError) and error.errno == errno.EIO and session.found is not Exit.OK:
            # The terminal is gone; what was found is kept.
            raise typer.Exit(int(session.found)) from None
        traceback.print_exc()
        session.out.error(f"a defect of ltpctl itself, please report it: {type(error).__name__}: {error}")
        status = Exit.DEFECT
    raise typer.Exit(int(status))


def interruptible() -> None:
    """SIGTERM ends a command as Ctrl-C does, and so does a terminal that is closed, but for nohup."""
    for number in ending_signals():
        signal.signal(number, _interrupt)


def ending_signals() -> tuple[signal.Signals, ...]:
    """Signals beside SIGINT that ask a command to end."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return (signal.SIGTERM,)
    return (signal.SIGTERM, signal.SIGHUP)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt

"""Configuration: defaults < file < environment < flags, and for each value where it came from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from platformdirs import user_config_path, user_state_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inventory.document import read
from inventory.errors import UsageError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SshSection(_Section):
    concurrency: int = Field(64, ge=1, le=4096, description="nodes worked on at once")
    user: str | None = Field(None, description="login name where the inventory gives none")
    config: tuple[str, ...] | None = Field(
        None,
        description="ssh_config files that are honoured; none means ~/.ssh/config and /etc/ssh/ssh_config",
    )
    known_hosts: tuple[str, ...] = Field(
        (), description="files of trusted host keys; empty means what ssh_config says, else the usual two"
    )
    accept_new: bool = Field(
        False, description="add unknown host keys to the first known_hosts file; changed keys stay refused"
    )
    identity: tuple[str, ...] = Field(
        (), description="private keys tried beside the agent's and ssh_config's"
    )
    attempts: int = Field(2, ge=1, le=10, description="attempts to connect; a command is never repeated")
    resolve: float = Field(5, gt=0, description="seconds for name resolution")
    connect: float = Field(10, gt=0, description="seconds for the TCP connection")
    banner: float = Field(10, gt=0, description="seconds until the server has sent its version")
    handshake: float = Field(10, gt=0, description="seconds for key exchange and host key")
    auth: float = Field(15, gt=0, description="seconds for authentication")


class ValidateSection(_Section):
    plan: Literal["quick", "standard", "comprehensive"] = Field(
        "standard", description="plan when no flag names one"
    )
    checks: tuple[str, ...] = Field((), description="files or folders of further checks and adapters")
    profiles: tuple[str, ...] = Field((), description="files or folders of further SKU profiles")
    baseline_days: float = Field(28, gt=0, description="days of history that baselines are learned from")


class Settings(_Section):
    """Everything that can be configured. Its fields are the keys of the file and, upper case, ``LTP_...``."""

    inventory: str | None = Field(None, description="inventory file or source; none means this machine alone")
    state_dir: str | None = Field(
        None,
        description="folder of the ledger and locks; none means ltpctl in XDG_STATE_HOME (~/.local/state)",
    )
    ledger: str | None = Field(
        None, description="ledger file or database URL; none means ledger.db in state_dir"
    )
    ssh: SshSection = SshSection()
    validate_: ValidateSection = Field(ValidateSection(), alias="validate")


@dataclass(frozen=True)
class Setting:
    """One value of the configuration and where it came from."""

    name: str
    value: Any
    source: str
    """``default``, ``file PATH:LINE``, ``environment NAME`` or ``flag --name``."""
    description: str


@dataclass(frozen=True)
class Configuration:
    settings: Settings
    origins: tuple[Setting, ...]

    @property
    def state_dir(self) -> Path:
        chosen = self.settings.state_dir
        return Path(chosen).expanduser() if chosen else user_state_path("ltpctl")

    @property
    def ledger(self) -> str:
        """Path or URL of the ledger."""
        return self.settings.ledger or str(self.state_dir / "ledger.db")


def default_file() -> Path:
    return user_config_path("ltpctl") / "config.yaml"


def chosen_file(config: str | None, environment: Mapping[str, str] = os.environ) -> tuple[Path, bool]:
    """The file that is read, and whether somebody named it: then it has to exist."""
    named = config or environment.get("LTP_CONFIG")
    return (Path(named).expanduser(), True) if named else (default_file(), False)


def variable(name: str) -> str:
    """The environment variable of a setting: ``ssh.concurrency`` -> ``LTP_SSH_CONCURRENCY``."""
    return "LTP_" + name.upper().replace(".", "_")


def resolve(
    config: str | None, flags: Mapping[str, object], environment: Mapping[str, str] = os.environ
) -> Configuration:
    """Lay the four sources over each other. `flags` maps dotted names to values; None means "not given".

    Raises UsageError (DocumentError for the file) that names the source of a wrong value.
    """
    declared = {leaf.name: leaf for leaf in leaves(Settings)}
    origins = {n: Setting(n, leaf.default, "default", leaf.description) for n, leaf in declared.items()}

    def put(name: str, value: object, source: str) -> None:
        origins[name] = Setting(name, value, source, origins[name].description)

    path, named = chosen_file(config, environment)
    if named or path.exists():
        document = read(path)
        if document.data is not None:
            document.parse(Settings)
            for name in origins:
                place = tuple(name.split("."))
                if place in document.lines:
                    put(name, _at(document.data, place), f"file {path}:{document.lines[place]}")
    for name in origins:
        if (text := environment.get(variable(name))) is not None:
            put(name, _scalar(text, declared[name].kind), f"environment {variable(name)}")
    for name, value in flags.items():
        if value is not None:
            put(name, value, f"flag --{name.rsplit('.', 1)[-1].replace('_', '-')}")
    return Configuration(_checked(origins), tuple(origins.values()))


@dataclass(frozen=True)
class Leaf:
    """One setting as the schema declares it."""

    name: str
    default: Any
    description: str
    kind: Any

    @property
    def variable(self) -> str:
        return variable(self.name)


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[Leaf]:
    """Every setting of a section and of the sections in it, in the order of declaration."""
    for name, field in model.model_fields.items():
        dotted = prefix + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{dotted}.")
        else:
            yield Leaf(dotted, field.default, field.description or "", field.annotation)


def _checked(origins: Mapping[str, Setting]) -> Settings:
    tree: dict[str, Any] = {}
    for setting in origins.values():
        *sections, leaf = setting.name.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = setting.value
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        where = origins[name].source if name in origins else "configuration"
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise UsageError(f"{where}: {name}: {message}, found {first['input']!r}") from None


def _scalar(text: str, kind: Any) -> object:
    """A variable's text as the setting wants it; lists are separated by commas."""
    if any(get_origin(part) is tuple for part in (kind, *get_args(kind))):
        return [part.strip() for part in text.split(",") if part.strip()]
    if kind in (str, str | None):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _at(data: Any, place: tuple[str, ...]) -> object:
    for key in place:
        data = data[key]
    return data

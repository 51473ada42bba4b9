"""What ``cluster.yaml`` may hold: the pydantic models of the file, before ranges are expanded."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from inventory.errors import UsageError
from inventory.nodeset import pattern


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _one_word(value: str) -> str:
    if not value or value.startswith("-") or re.search(r"[\s\x00-\x1f\x7f]", value):
        raise ValueError("wants one word that does not begin with '-'")
    return value


def _plain_data(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain_data(item) for key, item in value.items()}
        case list():
            return [_plain_data(item) for item in value]
        case float() if not math.isfinite(value):
            raise ValueError(
                "holds something that is not plain data: infinities and NaN have no place in JSON"
            )
        case None | str() | int() | float():
            return value
    raise ValueError(f"holds something that is not plain data; put {value} in quotes")


def _port(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("wants a port number, or as many by range: [2201-2264]")
    try:
        numbers = pattern(str(value)).names()
    except UsageError as error:
        raise ValueError(str(error)) from None
    for number in numbers:
        if not (number.isascii() and number.isdecimal() and 1 <= int(number) <= 65535):
            raise ValueError(f"a port is a number from 1 to 65535; found {number}")
    return str(value)


def _template(value: str) -> str:
    if re.search(r"[{}]", value.replace("{name}", "")):
        raise ValueError("only {name} may stand in braces")
    if any(piece.strip().startswith("-") for piece in value.split(",")) or not value.strip():
        raise ValueError("wants an address, which does not begin with '-'")
    try:
        pattern(value)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return value


Text = Annotated[str, BeforeValidator(_number_as_text)]
Word = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_one_word)]
Addresses = Annotated[str, AfterValidator(_template)]
"""One address, as many by range as there are nodes, or a template with ``{name}``."""
Ports = Annotated[str, BeforeValidator(_port)]
Data = Annotated[dict[str, Any], BeforeValidator(_plain_data)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BmcEntry(_Entry):
    """``{redfish: URL}``, ``{ipmi: HOST}`` or ``{ssh: HOST}``, with who logs in and where the password is."""

    redfish: Addresses | None = None
    ipmi: Addresses | None = None
    ssh: Addresses | None = None
    user: Word | None = None
    password_env: str | None = None
    password_file: str | None = None
    verify_tls: bool = Field(True, strict=True)
    password: Any = Field(None, exclude=True)

    @field_validator("password", mode="before")
    @classmethod
    def _no_secret(cls, _value: object) -> None:
        raise ValueError(
            "a secret does not belong in this file; name where it is: "
            "password_env: VARIABLE or password_file: PATH"
        )

    @field_validator("password_env")
    @classmethod
    def _variable_name(cls, value: str | None) -> str | None:
        # The value is not shown: it may be the password itself.
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("wants the name of an environment variable, e.g. BMC_PASSWORD")
        return value

    @field_validator("redfish")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.startswith(("https://", "http://")):
            raise ValueError("wants a URL, e.g. https://10.9.1.9")
        if "@" in value.split("/")[2]:
            raise ValueError("must not hold a login; give user, and password_env or password_file")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> BmcEntry:
        given = [kind for kind in ("redfish", "ipmi", "ssh") if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give one of redfish, ipmi and ssh; found {found}")
        if self.password_env and self.password_file:
            raise ValueError("give password_env or password_file, not both")
        return self


class Attributes(_Entry):
    """What may be said of nodes: in an entry of ``nodes``, in a group, in ``defaults``."""

    address: Addresses | None = None
    user: Word | None = None
    port: Ports | None = None
    jump: Word | None = None
    identity: Text | None = None
    sku: Word | None = None
    accelerators: int | None = Field(None, ge=0, le=1024, strict=True)
    labels: dict[str, Text] = {}
    bmc: BmcEntry | None = None
    python: Word | None = None
    vars: Data = {}
    local: bool | None = Field(None, strict=True)
    shared_address: bool | None = Field(None, strict=True)
    password: Any = Field(None, exclude=True)

    @field_validator("labels", "vars", mode="before")
    @classmethod
    def _nothing_is_empty(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("password", mode="before")
    @classmethod
    def _no_secret(cls, _value: object) -> None:
        raise ValueError(
            "passwords are not used for SSH; log in with a key (identity: PATH), an agent or a certificate"
        )


class NodesEntry(Attributes):
    """One entry of ``nodes``. An address alone may stand for the mapping."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: object) -> object:
        if value is None:
            return {}
        return {"address": value} if isinstance(value, str) else value


class GroupEntry(Attributes):
    """One group: an expression, a list of them, or a mapping with ``nodes`` and attributes."""

    nodes: str | list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: object) -> object:
        return value if isinstance(value, dict) else {"nodes": value}

    @field_validator("nodes", mode="before")
    @classmethod
    def _expressions(cls, value: object) -> object:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise ValueError("wants a node expression, e.g. node[001-032], or a list of them")


class ClusterFile(_Entry):
    """The whole file."""

    cluster: Word | None = None
    defaults: Attributes = Attributes()
    groups: dict[str, GroupEntry] = {}
    nodes: dict[str, NodesEntry]

    @field_validator("groups", mode="before")
    @classmethod
    def _nothing_is_empty(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("defaults", mode="before")
    @classmethod
    def _nothing_is_default(cls, value: object) -> object:
        return Attributes() if value is None else value

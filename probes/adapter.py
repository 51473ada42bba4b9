"""Adapters: one YAML file teaches the checks a make of accelerator that the program does not know.

An adapter names how the device is recognised, a command, and how its JSON or lines become the metrics of the
checks of the family ``accelerator``. What those metrics mean, their limits and what to do come from the
catalogue, so a device of any make is judged in the same words: ``tenstorrent.temperature`` by the limits of
``accelerator.temperature``. The command runs on the nodes that show the device, and nowhere else.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from inventory.document import Document, load
from probes.catalogue import (
    BUILT_IN,
    CatalogueFile,
    CheckSpec,
    LimitSpec,
    MetricName,
    MetricSpec,
    ParserSpec,
    Strict,
)

FAMILY = "accelerator"

PciId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{4}:([0-9a-f]{4}|\*)$")]
DeviceNode = Annotated[str, StringConstraints(pattern=r"^/dev/\S+$")]
CheckWord = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class Recognition(Strict):
    """Exactly one of the two."""

    pci: tuple[PciId, ...] = ()
    """``vendor:device`` in lower-case hex; ``*`` for every device of the vendor. One of them is enough."""
    node: DeviceNode | None = None
    """Pattern of device nodes, for nodes whose PCI bus cannot be seen."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Recognition:
        if bool(self.pci) == (self.node is not None):
            raise ValueError("needs either 'pci' (ids) or 'node' (a device node pattern), not both")
        return self

    @property
    def needs(self) -> str:
        """What `CheckSpec.needs` says for this device."""
        return self.node or " ".join(self.pci)


class AdapterCheck(Strict):
    """How one check is answered. `command` and `timeout` default to the adapter's."""

    parse: ParserSpec
    command: tuple[str, ...] | None = None
    timeout: float | None = Field(default=None, gt=0)
    limits: dict[MetricName, LimitSpec] = Field(default_factory=dict)
    """For this make, in place of the catalogue's."""


class AdapterFile(Strict):
    """One file, ``schema: ltpctl/adapter/1``."""

    schema_: Literal["ltpctl/adapter/1"] = Field(alias="schema")
    vendor: CheckWord
    """Family of the checks that it makes: ``tenstorrent``."""
    what: str
    recognise: Recognition
    command: tuple[str, ...] = Field(min_length=1)
    timeout: float = Field(default=30.0, gt=0)
    checks: dict[CheckWord, AdapterCheck] = Field(min_length=1)
    """Last name of a check of the family ``accelerator`` -> how it is answered."""


def read_adapter(document: Document) -> dict[str, CheckSpec]:
    """The checks that an adapter file makes, by full name. Raises DocumentError for a mistake in it."""
    file = document.parse(AdapterFile)
    known = load(BUILT_IN / f"{FAMILY}.yaml", CatalogueFile)
    if file.vendor == known.family:
        raise document.error(("vendor",), f"'{FAMILY}' is the program's own family; give the make's name")
    made = {}
    for word, check in file.checks.items():
        model = known.checks.get(f"{FAMILY}.{word}")
        if model is None:
            names = [name.partition(".")[2] for name in known.checks]
            raise document.error(
                ("checks", word), f"no check is called '{FAMILY}.{word}'; {_advice(word, names)}"
            )
        made[f"{file.vendor}.{word}"] = CheckSpec(
            what=f"{model.what} ({file.what})",
            why=model.why,
            fix=model.fix,
            level=model.level,
            tags=(*model.tags, file.vendor),
            timeout=(check.timeout or file.timeout) + 5.0,
            needs=file.recognise.needs,
            command=check.command or file.command,
            parse=check.parse,
            metrics=_metrics(document, word, check, model),
        )
    return made


def _metrics(
    document: Document, word: str, check: AdapterCheck, model: CheckSpec
) -> dict[MetricName, MetricSpec]:
    named = _named(check.parse) or list(check.limits)
    if not named:
        message = "says no metric; list them under 'fields', or give 'limits' for them"
        raise document.error(("checks", word, "parse"), message)
    metrics = {}
    for metric in named:
        spec = model.metrics.get(metric)
        if spec is None:
            message = f"'{FAMILY}.{word}' has no metric '{metric}'; {_advice(metric, list(model.metrics))}"
            raise document.error(("checks", word, "parse", "fields", metric), message)
        own = check.limits.get(metric)
        metrics[metric] = spec.model_copy(update={"limit": own}) if own else spec
    for metric in check.limits:
        if metric not in metrics:
            message = f"this metric is not read; {_advice(metric, list(metrics))}"
            raise document.error(("checks", word, "limits", metric), message)
    return metrics


def _named(parser: ParserSpec) -> list[str]:
    """The metrics that a parser says it finds. The catalogue tells of a wrong pattern, with its line."""
    if parser.kind != "regex" or parser.pattern is None:
        return list(parser.fields)
    return [group for group in re.findall(r"\(\?P<(\w+)>", parser.pattern) if group != "device"]


def _advice(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"

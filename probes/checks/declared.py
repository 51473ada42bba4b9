"""Checks that a YAML file declares: a command or files, and a parser that turns their text into measures.

`params["declared"]` is the declaration: ``command`` (list) or ``file`` (path or glob), ``shell``,
``timeout``, ``parse`` (the fields of `probes.catalogue.ParserSpec` that are set) and ``metrics`` (name ->
unit). Every other parameter may be named in the command as ``{name}``; a value is put in as one word, also
for a shell.

A parser never gives an empty answer: text in which it finds nothing is a ValueError that says what was
expected.
"""

import json
import re
import shlex
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from probes.agent.api import Host, Measure, Ran, Scalar, Unsupported

Spec = Mapping[str, Any]
Names = Mapping[str, str]
"""The metrics that a check declares, with their units."""

MATCHES = 256
"""Most files that a glob may match."""


def collect(host: Host) -> List[Measure]:
    """The measures of the declaration in ``params["declared"]``."""
    spec: Spec = host.params["declared"]
    parser: Spec = spec.get("parse") or {"kind": "text"}
    names: Names = spec["metrics"]
    if spec.get("command"):
        return _of_command(host, spec, parser, names)
    if spec.get("file"):
        return _of_files(host, str(spec["file"]), parser, names)
    raise ValueError("the declaration names neither a command nor a file")


def _of_command(host: Host, spec: Spec, parser: Spec, names: Names) -> List[Measure]:
    argv = filled([str(word) for word in spec["command"]], host.params, bool(spec.get("shell")))
    if spec.get("shell"):
        argv = ["/bin/sh", "-c", " ".join(argv)]
    status_is_answer = parser["kind"] == "exit_status"
    ran = host.run(argv, timeout=float(spec.get("timeout") or 10.0), ok=() if status_is_answer else (0,))
    if status_is_answer:
        return exit_status(ran, names)
    try:
        return parse(ran.out, parser, names)
    except ValueError:
        _note(host, ran.out or ran.err)
        raise


def _of_files(host: Host, pattern: str, parser: Spec, names: Names) -> List[Measure]:
    if not any(c in pattern for c in "*?["):
        text = host.read(pattern)
        try:
            return parse(text, parser, names)
        except ValueError:
            _note(host, text)
            raise
    paths = host.glob(pattern)
    if not paths:
        raise Unsupported("no file matches " + pattern)
    if len(paths) > MATCHES:
        raise ValueError("%s matches %d files, more than %d" % (pattern, len(paths), MATCHES))
    found: List[Measure] = []
    unreadable: List[str] = []
    for path in paths:
        device = starred(pattern, path)
        try:
            text = host.read(path)
        except Unsupported as error:
            # Files of one kind come and go together; one that alone cannot be read is a null, not an absence.
            unreadable.append(str(error))
            found += [Measure(name, None, device) for name in names]
            continue
        try:
            measures = parse(text, parser, names)
        except ValueError as error:
            _note(host, text)
            raise ValueError("%s: %s" % (path, error)) from None
        found += [
            m._replace(device=device if m.device is None else device + "/" + m.device) for m in measures
        ]
    if len(unreadable) == len(paths):
        raise Unsupported(unreadable[0])
    for line in unreadable:
        host.note(line)
    return found


def filled(argv: List[str], params: Mapping[str, Any], shell: bool) -> List[str]:
    """The command with ``{name}`` replaced by that parameter. Raises ValueError if there is none.

    Anything else in braces (awk, JSON) stays as it is.
    """

    def value(match: "re.Match[str]") -> str:
        name = match.group(1)
        if name not in params or name == "declared":
            raise ValueError("the command names a parameter {%s} that has no value" % name)
        text = _plain(params[name])
        return shlex.quote(text) if shell else text

    return [re.sub(r"\{([a-z][a-z0-9_]*)\}", value, word) for word in argv]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, str)):
        return str(value)
    raise ValueError("a list or a mapping cannot be put into a command")


def starred(pattern: str, path: str) -> str:
    """What the first part with a wildcard of `pattern` matched in `path`, without literal text around it."""
    for want, have in zip(pattern.strip("/").split("/"), path.strip("/").split("/")):
        if any(c in want for c in "*?["):
            before = re.split(r"[*?\[]", want, maxsplit=1)[0]
            after = re.split(r"[*?\]]", want[::-1], maxsplit=1)[0][::-1]
            return have[len(before) : len(have) - len(after)] or have
    return path


def _note(host: Host, text: str) -> None:
    for line in text.splitlines()[:5]:
        host.note(line)


# Parsers: pure functions of text.


def parse(text: str, parser: Spec, names: Names) -> List[Measure]:
    """Measures that a parser finds in a text.

    Raises ValueError, saying what was expected, when it finds none.
    """
    kind = str(parser["kind"])
    if kind not in PARSERS:
        raise ValueError("no parser is called %r" % kind)
    return PARSERS[kind](text, parser, names)


def number(text: str, parser: Spec, names: Names) -> List[Measure]:
    name = _only(names, "number")
    return [Measure(name, to_number(text.strip(), names[name]))]


def plain_text(text: str, parser: Spec, names: Names) -> List[Measure]:
    if not text.strip():
        raise ValueError("expected some text, found none")
    return [Measure(_only(names, "text"), text.strip())]


def lines(text: str, parser: Spec, names: Names) -> List[Measure]:
    """How many lines are not blank; with a pattern, in how many it is found. None is an answer: 0."""
    wanted = _compiled(parser) if parser.get("pattern") else re.compile(r"\S")
    return [Measure(_only(names, "lines"), sum(1 for line in text.splitlines() if wanted.search(line)))]


def exit_status(ran: Ran, names: Names) -> List[Measure]:
    """0 to 255; negative for a signal."""
    return [Measure(_only(names, "exit_status"), ran.code)]


def regex(text: str, parser: Spec, names: Names) -> List[Measure]:
    pattern = _compiled(parser)
    metrics = [g for g in pattern.groupindex if g != "device"]
    if not metrics:
        raise ValueError(
            "the pattern has no group named after a metric, such as (?P<%s>...)" % next(iter(names))
        )
    found = []
    for line in text.splitlines():
        match = pattern.search(line)
        if match:
            device = match.groupdict().get("device")
            found += [
                Measure(g, to_scalar(match.group(g), names.get(g, "")), device)
                for g in metrics
                if match.group(g) is not None
            ]
    if not found:
        raise ValueError("no line matches %s" % pattern.pattern)
    return found


def key_value(text: str, parser: Spec, names: Names) -> List[Measure]:
    separator = parser.get("separator")
    pairs: Dict[str, str] = {}
    for line in text.splitlines():
        key, value = _split_pair(line, separator)
        if key and key not in pairs:
            pairs[key] = value
    if not pairs:
        raise ValueError("expected lines of key%svalue, found none" % (separator or "="))
    fields = _fields(parser, names)
    absent = [key for key in fields.values() if key not in pairs]
    if absent:
        raise ValueError(
            "no key %s; there are: %s" % (", ".join(map(repr, absent)), ", ".join(list(pairs)[:20]))
        )
    return [Measure(metric, to_scalar(pairs[key], names.get(metric, ""))) for metric, key in fields.items()]


def _split_pair(line: str, separator: Optional[str]) -> Tuple[str, str]:
    if separator is None:
        places = [line.find(s) for s in "=:" if s in line]
        if not places:
            return "", ""
        separator = line[min(places)]
    key, found, value = line.partition(separator)
    return (key.strip(), value.strip()) if found else ("", "")


def table(text: str, parser: Spec, names: Names) -> List[Measure]:
    separator = parser.get("separator")
    rows = [line for line in text.splitlines()[int(parser.get("skip") or 0) :] if line.strip()]
    if len(rows) < 2:
        raise ValueError("expected a header and at least one row, found %d lines" % len(rows))
    header = _cells(rows[0], separator)
    fields, by = _fields(parser, names), parser.get("devices")
    absent = [c for c in list(fields.values()) + ([by] if by else []) if c not in header]
    if absent:
        raise ValueError("no column %s; there are: %s" % (", ".join(map(repr, absent)), ", ".join(header)))
    if not by and len(rows) > 2:
        raise ValueError(
            "%d rows, and no column is given (devices) by which to tell them apart" % (len(rows) - 1)
        )
    found = []
    for row in rows[1:]:
        cells = _cells(row, separator)
        if len(cells) < len(header):
            raise ValueError("expected %d columns, found %d in: %.100s" % (len(header), len(cells), row))
        if len(cells) > len(header):
            if separator is not None:
                raise ValueError("expected %d columns, found %d in: %.100s" % (len(header), len(cells), row))
            # Between blanks, only the last column may hold blanks itself.
            cells = row.split(None, len(header) - 1)
        named = dict(zip(header, cells))
        device = named[by] if by else None
        found += [
            Measure(metric, to_scalar(named[column], names.get(metric, "")), device)
            for metric, column in fields.items()
        ]
    return found


def _cells(row: str, separator: Optional[str]) -> List[str]:
    return [cell.strip() for cell in row.split(separator)]


def from_json(text: str, parser: Spec, names: Names) -> List[Measure]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValueError("expected JSON: %s" % error) from None
    except RecursionError:
        raise ValueError("expected JSON, found it nested too deeply") from None
    fields = _fields(parser, names)
    found = []
    for device, item in _devices(document, parser):
        for metric, path in fields.items():
            for sub, value in _walk(item, path.split("."), path, ""):
                if isinstance(value, (dict, list)):
                    raise ValueError(
                        "%s is a %s, not a value" % (path, "mapping" if isinstance(value, dict) else "list")
                    )
                of = "/".join(part for part in (device, sub) if part)
                found.append(
                    Measure(
                        metric,
                        to_scalar(value, names.get(metric, "")) if isinstance(value, str) else value,
                        of or None,
                    )
                )
    if not found:
        raise ValueError("nothing is at %s" % ", ".join(fields.values()))
    return found


def _devices(document: Any, parser: Spec) -> Iterator[Tuple[str, Any]]:
    path = parser.get("devices")
    if not path:
        yield "", document
        return
    container = document
    for _, value in _walk(document, [] if path == "." else path.split("."), path, ""):
        container = value
    items = (
        container.items()
        if isinstance(container, dict)
        else enumerate(container)
        if isinstance(container, list)
        else None
    )
    if items is None:
        raise ValueError("expected a list or a mapping of devices at %s" % path)
    for key, item in items:
        name = str(key)
        if parser.get("device"):
            for _, value in _walk(item, parser["device"].split("."), parser["device"], ""):
                name = str(value)
        yield name, item


def _walk(value: Any, path: List[str], whole: str, device: str) -> Iterator[Tuple[str, Any]]:
    """(device, value) of everything at a path; ``*`` goes through a list or a mapping and names devices."""
    for at, step in enumerate(path):
        if step == "*":
            if not isinstance(value, (dict, list)):
                raise ValueError("expected a list or a mapping at * of %s" % whole)
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                below = "%s/%s" % (device, key) if device else str(key)
                yield from _walk(item, path[at + 1 :], whole, below)
            return
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            there = ", ".join(map(str, list(value)[:20])) if isinstance(value, dict) else type(value).__name__
            raise ValueError("nothing is at %r of %s; there is: %s" % (step, whole, there))
    yield device, value


PARSERS: Dict[str, Callable[[str, Spec, Names], List[Measure]]] = {
    "number": number,
    "text": plain_text,
    "regex": regex,
    "key_value": key_value,
    "json": from_json,
    "table": table,
    "lines": lines,
}


def _only(names: Names, kind: str) -> str:
    if len(names) != 1:
        raise ValueError(
            "the parser %s gives one value, but the check declares %d metrics" % (kind, len(names))
        )
    return next(iter(names))


def _fields(parser: Spec, names: Names) -> Dict[str, str]:
    """Metric -> where to look; without `fields`, each metric under its own name."""
    return dict(parser.get("fields") or {name: name for name in names})


def _compiled(parser: Spec) -> "re.Pattern[str]":
    if not parser.get("pattern"):
        raise ValueError("the parser %s needs a pattern" % parser["kind"])
    try:
        return re.compile(parser["pattern"])
    except re.error as error:
        raise ValueError("the pattern is not a regular expression: %s" % error) from None


_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_HEXADECIMAL = re.compile(r"0[xX][0-9a-fA-F]{1,32}")

UNIT_SIGNS = {
    "celsius": ("C", "\u00b0C"),
    "watts": ("W",),
    "seconds": ("s", "sec"),
    "milliseconds": ("ms",),
    "bytes": ("B",),
    "percent": ("%",),
    "volts": ("V",),
}
"""What tools print for a unit that the catalogue spells out."""


def to_number(text: str, unit: str) -> Scalar:
    """A number, decimal or 0x hexadecimal, alone or with the metric's own unit; else ValueError."""
    if _HEXADECIMAL.fullmatch(text):
        return int(text, 16)
    match = _NUMBER.match(text)
    if not match:
        raise ValueError("expected a number, found %.100r" % text)
    digits, sign = match.group(), text[match.end() :].strip()
    if sign and sign not in (unit, *UNIT_SIGNS.get(unit, ())):
        raise ValueError(
            "expected a number%s, found %.100r" % (" in " + unit if unit else " without a unit", text)
        )
    return int(digits) if re.fullmatch(r"[-+]?\d{1,30}", digits) else float(digits)


def to_scalar(text: str, unit: str) -> Scalar:
    """The number that a text is, else the text.

    Without a unit only if the number is written back the same: versions ("1.20") and serials ("0012") stay
    text.
    """
    text = text.strip()
    try:
        value = to_number(text, unit)
    except ValueError:
        return text
    return value if unit or str(value) == text else text

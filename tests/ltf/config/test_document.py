from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ltf.config.document import MAX_BYTES, MAX_DEPTH, load, parse
from ltf.config.errors import ConfigError


def mistake(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, "a.yaml")
    assert len(caught.value.mistakes) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E6", 1e6),
        ("-.5", -0.5),
        ("4", 4),
        ("-4", -4),
        ("100_000", 100_000),
        ("012", 12),
        ("true", True),
        ("no", "no"),
        ("'4'", "4"),
        ('"null"', "null"),
        ("!!str 4", "4"),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        (".inf", math.inf),
        ("1" * 200, "1" * 200),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_plain_words_mean_what_yaml_1_2_says(text: str, value: Any) -> None:
    read = parse(f"x: {text}", "a.yaml").data["x"]
    assert read == value
    assert type(read) is type(value)


def test_every_value_knows_its_line() -> None:
    read = parse("# first\na:\n  b: 1\n  c:\n  - d: 2\n  - e\n", "a.yaml")
    assert read.lines[("a", "b")] == 3
    assert read.lines[("a", "c", 0, "d")] == 5
    assert read.lines[("a", "c", 1)] == 6


def test_an_alias_is_a_copy_of_its_anchor() -> None:
    data = parse("a: &x {b: [1]}\nc: *x\n", "a.yaml").data
    assert data == {"a": {"b": [1]}, "c": {"b": [1]}}
    assert data["a"]["b"] is not data["c"]["b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "a.yaml:3: found the key 'a' twice, expected only that on line 1"),
        ("a: &x [*x]\n", "a.yaml:1: found the alias *x"),
        ("a: *x\n", "a.yaml:1: found the alias *x"),
        (
            "a: 1\nb: !!python/object/apply:os.system [ls]\n",
            "a.yaml:2: found the tag tag:yaml.org,2002:python",
        ),
        ("a: !secret x\n", "a.yaml:1: found the tag !secret"),
        ("a: !!int x\n", "a.yaml:1: found 'x', expected a value of the tag !!int"),
        ("a: &x {b: 1}\nc: {<<: *x}\n", "a.yaml:2: found the merge key '<<'"),
        ("? [a]\n: b\n", "a.yaml:1: found a key that is no plain word"),
        ("a: 1\n---\nb: 2\n", "a.yaml:2: found a second document"),
        ("a: [1\nb: 2\n", "a.yaml:2: found a slip of syntax"),
        ("a: \x07\n", "a.yaml: found what no YAML has"),
        ("[" * (MAX_DEPTH + 2), "a.yaml:1: found deeper nesting"),
        ("[" * 200_000, "a.yaml:1: found deeper nesting"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_line(text: str, says: str) -> None:
    assert mistake(text).startswith(says)


def test_a_few_lines_of_aliases_cannot_stand_for_billions_of_values() -> None:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 10):
        laughs += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    assert "more values, aliases followed" in mistake(laughs)


def test_files_that_cannot_be_configurations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="found Is a directory"):
        load(tmp_path)
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="expected at most 1,000,000 bytes"):
        load(tmp_path / "large.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match="found byte 0xe9 at 3, expected UTF-8"):
        load(tmp_path / "latin.yaml")

"""YAML that people write: every mistake is one line with file, line, field and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from inventory.document import MAX_DEPTH, load, read
from inventory.errors import DocumentError


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = Field(ge=1)
    names: list[str] = []


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")
    title: str
    parts: dict[str, Part] = {}
    ratio: float = 1.0
    on: bool = Field(True, strict=True)


def mistake(text: str, model: type[BaseModel] | None = Whole) -> str:
    with pytest.raises(DocumentError) as caught:
        read("f.yaml", text) if model is None else load("f.yaml", model, text)
    return str(caught.value)


def test_a_right_document_is_read_with_the_line_of_every_place() -> None:
    document = read("f.yaml", "title: x\nparts:\n  one:\n    size: 3\n    names:\n      - a\n      - b\n")
    assert document.parse(Whole) == Whole(title="x", parts={"one": Part(size=3, names=["a", "b"])})
    assert document.line(("parts", "one", "size")) == 4
    assert document.line(("parts", "one", "names", 1)) == 7
    assert document.line(("parts", "one", "nothing")) == 3


def test_a_duplicate_key_names_both_lines() -> None:
    assert mistake("title: x\nparts:\n  one: {size: 1}\n  two: {size: 2}\n  one: {size: 3}\n") == (
        "f.yaml:5: parts.one: this key is already given on line 3; keep one"
    )


def test_an_unknown_key_names_the_nearest_known_one() -> None:
    assert mistake("title: x\nparts:\n  one: {siez: 1}\n") == (
        "f.yaml:3: parts.one.siez: unknown key; did you mean 'size'?"
    )
    assert mistake("title: x\nqqq: 1\n") == "f.yaml:2: qqq: unknown key; known keys: on, parts, ratio, title"


def test_a_missing_key_names_where_it_is_missing() -> None:
    assert mistake("title: x\nparts:\n  one: {}\n") == (
        "f.yaml:3: parts.one.size: this key is required and is missing"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "title: x\nparts: {a: {size: many}}",
            "f.yaml:2: parts.a.size: must be a whole number; found the text 'many'",
        ),
        (
            "title: x\nparts: {a: {size: 0}}",
            "f.yaml:2: parts.a.size: must be greater than or equal to 1; found 0",
        ),
        (
            "title: x\nparts: {a: {size: 1, names: b}}",
            "f.yaml:2: parts.a.names: must be a list; found the text 'b'",
        ),
        ("title: x\nparts: {a: {size: 1, names: [1]}}", "f.yaml:2: parts.a.names[0]: must be text; found 1"),
        ("title: x\nparts: [1]", "f.yaml:2: parts: must be a mapping of keys to values; found a list"),
        ("title: x\nparts: {a: }", "f.yaml:2: parts.a: must be a mapping of keys to values; found nothing"),
        ("title: x\non: 1", "f.yaml:2: on: must be true or false; found 1"),
        ("title: x\nratio: fast", "f.yaml:2: ratio: must be a number; found the text 'fast'"),
        ("title: yes", "f.yaml:1: title: must be text; found the truth value true"),
    ],
)
def test_a_wrong_type_says_what_is_wanted_and_what_was_found(text: str, says: str) -> None:
    assert mistake(text) == says


def test_the_first_mistake_of_the_file_is_the_one_that_is_told() -> None:
    assert mistake("parts:\n  a: {size: x}\n  b: {size: y}\ntitle: 3\n").startswith("f.yaml:2: parts.a.size")


def test_merge_keys_bring_values_in_and_own_values_win() -> None:
    text = "base: &base {size: 1, kind: a}\none: &one {<<: *base, size: 2}\ntwo: *one\n"
    text += "three: {<<: [*one, *base]}\n"
    data = read("f.yaml", text).data
    assert data["one"] == data["two"] == data["three"] == {"size": 2, "kind": "a"}


def test_a_value_brought_in_by_a_merge_has_the_line_where_it_was_written() -> None:
    text = "title: x\nparts:\n  one: &one\n    size: nine\n  two:\n    <<: *one\n"
    assert mistake(text).startswith("f.yaml:4: parts.one.size")


@pytest.mark.parametrize("text", ["a: &a\n  b: *a\n", "a: &a\n  <<: *a\n", "a: &a\n  - *a\n"])
def test_an_alias_that_contains_itself_is_refused(text: str) -> None:
    assert "an alias contains itself" in mistake(text, None)


def test_aliases_that_stand_for_billions_of_values_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "holds more than" in mistake("\n".join(lines), None)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "a: " + "[" * 50_000 + "]" * 50_000, "- " * 50_000, "{a: " * 20_000]
)
def test_nesting_that_would_overrun_the_stack_is_refused(text: str) -> None:
    assert mistake(text, None) == f"f.yaml: is nested more than {MAX_DEPTH} levels deep"


def test_brackets_in_quoted_text_are_not_nesting() -> None:
    assert read("f.yaml", f"a: '{'[' * 1000}'").data == {"a": "[" * 1000}


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a:\n\tb: 1\n", 2, "a tab"),
        ("a: b: c\n", 1, "indent like the lines around it"),
        ("a: 1\n b: 2\n", 2, "indent like the lines around it"),
        ("a: [1, 2\nb: 3\n", 2, "a list in brackets is not closed"),
        ("a: {b: 1\nc: 2\n", 2, "a mapping in braces is not closed"),
        ("a: 1\n---\nb: 2\n", 2, "one file holds one"),
        ("a: *b\n", 1, "no anchor"),
        ("a: 1\nb: \x01\n", 2, "U+0001 is not allowed"),
        ("a: 1\né: ü\nb: \x02\n", 3, "U+0002 is not allowed"),
        ("a: !!python/object:os.system x\n", 1, "could not determine a constructor"),
        ("nodes:\n  [n1, n2]: 3\n", 2, "put it in quotes"),
        ("a: {<<: 3}\n", 1, "'<<' takes a mapping"),
    ],
)
def test_what_is_not_plain_yaml_is_answered_with_its_line(text: str, line: int, says: str) -> None:
    message = mistake(text, None)
    assert message.startswith(f"f.yaml:{line}: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(("text", "number"), [("012", 10), ("12:30:45", 45045), ("22:22", 1342)])
def test_a_number_that_yaml_reads_otherwise_than_people_is_refused(text: str, number: int) -> None:
    assert f"YAML reads {text} as the number {number}" in mistake(f"a: 1\nb: {text}\n", None)
    assert read("f.yaml", f"b: '{text}'").data == {"b": text}


def test_ordinary_numbers_are_numbers() -> None:
    assert read("f.yaml", "[0, -3, 1_000, 0x1b, 1.5]").data == [0, -3, 1000, 27, 1.5]


def test_a_missing_file_a_folder_and_bytes_that_are_not_text_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="cannot be read: No such file"):
        load(tmp_path / "none.yaml", Whole)
    with pytest.raises(DocumentError, match="cannot be read: Is a directory"):
        load(tmp_path, Whole)
    (tmp_path / "latin.yaml").write_bytes(b"title: caf\xe9\n")
    with pytest.raises(DocumentError, match=r"latin\.yaml: is not UTF-8 text \(byte 10\)"):
        load(tmp_path / "latin.yaml", Whole)


@pytest.mark.parametrize(
    ("text", "found"), [("", "nothing"), ("- a\n", "a list"), ("hello", "the text 'hello'")]
)
def test_a_document_that_is_no_mapping_is_refused(text: str, found: str) -> None:
    assert mistake(text).endswith(f"expected a mapping of keys to values, found {found}")


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbftitle: x\n")
    assert load(tmp_path / "bom.yaml", Whole).title == "x"

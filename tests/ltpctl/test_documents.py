"""One JSON document on stdout, as programs read it."""

from __future__ import annotations

import io
import json
import math
from pathlib import PurePosixPath
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltpctl.console import Output


def printed(value: object) -> str:
    stdout = io.StringIO()
    Output(json=True, stdout=stdout).document(value)
    return stdout.getvalue()


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)


@given(
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
    )
)
def test_what_is_printed_reads_as_what_was_meant(value: object) -> None:
    assert json.loads(printed(value)) == value


def test_a_document_is_laid_out_in_the_order_given_for_people_too() -> None:
    value = {"b": [1, 2.5, True, None], "a": {}, "c": [], "d": {"ü": "\u2028"}}
    assert printed(value) == json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def test_sets_are_sorted_and_paths_are_text() -> None:
    assert json.loads(printed({"set": {"c", "a", "b"}, "path": PurePosixPath("/a/b")})) == {
        "set": ["a", "b", "c"],
        "path": "/a/b",
    }


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_has_not_is_refused_before_anything_is_printed(number: float) -> None:
    stdout = io.StringIO()
    with pytest.raises(ValueError, match="not JSON compliant"):
        Output(json=True, stdout=stdout).document({"a": 1, "b": [number]})
    assert stdout.getvalue() == ""


def test_what_has_no_json_form_is_refused_by_its_name() -> None:
    with pytest.raises(TypeError, match="SimpleNamespace has no JSON form"):
        printed(SimpleNamespace())


def test_a_file_name_that_is_no_utf8_is_printed_as_escapes() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    text = printed({"file": name})
    assert text == '{\n  "file": "caf\\udce9"\n}\n'
    assert json.loads(text) == {"file": name}

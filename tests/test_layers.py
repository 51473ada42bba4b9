"""Who may import whom: ``ltpctl -> recovery -> probes -> inventory``, never back; ``ltf`` stands alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "inventory": set(),
    "probes": {"inventory"},
    "recovery": {"inventory", "probes"},
    "ltpctl": {"inventory", "probes", "recovery"},
    "ltf": set(),
}


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_layer_imports_only_what_lies_below_it(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        up = (imports(file) & set(MAY_IMPORT)) - MAY_IMPORT[package] - {package}
        assert not up, f"{file.relative_to(ROOT)} imports {', '.join(sorted(up))}"


def test_only_the_console_prints() -> None:
    for file in (ROOT / "ltpctl").rglob("*.py"):
        calls = [
            node.lineno
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
        assert not calls, f"{file.relative_to(ROOT)} prints on lines {calls}"

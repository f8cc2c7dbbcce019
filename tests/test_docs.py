"""What the documents say of the tests is so: each file and each test that they name is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", [file for file in DOCUMENTS if file.exists()], ids=lambda file: file.name)
def test_every_test_that_a_document_names_is_there(document: Path) -> None:
    for name, test in re.findall(r"\b(test_\w+\.py)(?:::(\w+))?", document.read_text(encoding="utf-8")):
        file = ROOT / "tests" / name
        assert file.is_file(), name
        assert not test or test in functions(file), f"{name}::{test}"


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_the_readme_names_a_test_for_each_promise() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("the test that holds it to it")[2]
    rows = [line for line in table.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    assert not [row for row in rows[1:] if not re.search(r"`test_\w+\.py", row.rsplit(" | ", 1)[1])]

"""The documents and the program are held together: tests, endpoints, commands, metrics and links are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from starlette.routing import Route

from gpu_service import Settings, command_line, create_app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "deploy/README.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_test_that_a_document_names_is_there(document: Path) -> None:
    for name, test in re.findall(r"\b(test_\w+\.py)(?:::(\w+))?", document.read_text(encoding="utf-8")):
        file = ROOT / "tests" / name
        assert file.is_file(), name
        assert not test or test in functions(file), f"{name}::{test}"


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_each_promise_names_a_test() -> None:
    rows = [line for line in read("docs/reliability.md").splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    for row in rows[1:]:
        tests = row.rsplit(" | ", 1)[1]
        named = re.findall(r"`test_\w+\.py(?:::\w+)?`", tests)
        assert named, row
        assert tests.count("`") == 2 * len(named), f"a name that this test can't read: {tests}"


def endpoints() -> set[str]:
    """Every method and path that a caller may ask for; what the pages fetch for themselves is theirs."""
    routes = [route for route in create_app(Settings()).routes if isinstance(route, Route)]
    paths = {f"{method} {route.path}" for route in routes for method in (route.methods or set()) - {"HEAD"}}
    return {re.sub(r"{\w+:path}", "{id}", path) for path in paths if not re.search(r" (/web/|/openapi\.json)", path)}


def documented(text: str) -> set[str]:
    """The endpoints that the first columns of a document's tables name; a path without a method has the last one's."""
    found: set[str] = set()
    for row in re.findall(r"^\| (.*`(?:GET|POST) /.*)", text, re.MULTILINE):
        method = ""
        for cell in row.split(" | ")[:2]:
            for named, path in re.findall(r"`(?:(GET|POST) )?(/[^`]*)`", cell):
                method = named or method
                found.add(f"{method} {path}")
    return found


def test_every_endpoint_is_documented_and_no_other_is() -> None:
    assert documented(read("README.md")) | documented(read("docs/api.md")) == endpoints()


def test_every_command_is_documented() -> None:
    commands = re.findall(r"^    (\w+) ", command_line().format_help(), re.MULTILINE)
    assert set(commands) >= {"serve", "download", "check"}
    documented = re.findall(r"`gpu-service (\w+)[^`]*`.* \|", read("README.md"))
    assert set(documented) == set(commands)


def test_every_metric_is_documented() -> None:
    names = set(re.findall(r'"(gpu_service_(?!web)\w+)"', (ROOT / "gpu_service.py").read_text(encoding="utf-8")))
    assert not [name for name in names if name not in read("docs/operations.md")]


def anchors(text: str) -> set[str]:
    """What a document's headings can be linked as."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_link_between_documents_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_readme_leads_to_every_document() -> None:
    for document in DOCUMENTS[1:]:
        assert f"]({document.relative_to(ROOT).as_posix()})" in read("README.md"), document.name

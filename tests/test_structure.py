"""Files, and functions of the library, stay short enough to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.conftest import ROOT

PACKAGE = ROOT / "t5_trt"
FOLDERS = ("t5_trt", "tests", "benchmarks", "examples", "audit")
LONGEST_FILE = 400
#: lines of code, with the signature and without the docstring: one line for each argument of a public function is no reason to split it
LONGEST_FUNCTION = 50


def functions(node: ast.AST, owner: str = "") -> Iterator[tuple[str, int]]:
    """(qualified name, lines without the docstring) of every function inside a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (child.end_lineno or 0) - child.lineno + 1
            if ast.get_docstring(child) is not None:
                lines -= (child.body[0].end_lineno or 0) - child.body[0].lineno + 1
            yield owner + child.name, lines
        named = isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        yield from functions(child, f"{owner}{child.name}." if named else owner)


def test_files_have_at_most_400_lines() -> None:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    sources = [path for path in found if path.suffix in {".py", ".cu", ".cuh", ".c", ".h"}]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert len(lines) > 200
    assert not {name: count for name, count in lines.items() if count > LONGEST_FILE}


def test_functions_have_at_most_50_lines_of_code() -> None:
    found = {
        (str(path.relative_to(ROOT)), name): lines
        for path in PACKAGE.rglob("*.py")
        for name, lines in functions(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(found) > 500
    assert not {key: lines for key, lines in found.items() if lines > LONGEST_FUNCTION}

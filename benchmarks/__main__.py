"""List the benchmarks, or run one by its name.

``python -m benchmarks`` prints the list; ``python -m benchmarks decode --help`` is ``python -m benchmarks.decode --help``.
"""

from __future__ import annotations

import argparse
import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def benchmarks() -> dict[str, str]:
    """Name of each module that can be run -> the first line of its docstring."""
    found = {}
    for path in sorted(FOLDER.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.name != "__main__.py" and '\nif __name__ == "__main__":\n' in source:
            name = ".".join(path.relative_to(FOLDER).with_suffix("").parts)
            found[name] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: without a name, print the list; with one, run that module with the other arguments."""
    known = benchmarks()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="%(prog)s [NAME [ARGUMENTS ...]]",
        description="List the benchmarks, or run one with its arguments.",
    )
    parser.add_argument("name", nargs="?", choices=known, metavar="NAME", help="benchmark to run")
    given = sys.argv[1:] if arguments is None else list(arguments)
    name = parser.parse_args(given[:1]).name
    if name is None:
        width = max(map(len, known))
        print("\n".join(f"{each:{width}}  {line}" for each, line in known.items()))
        return
    sys.argv[1:] = given[1:]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

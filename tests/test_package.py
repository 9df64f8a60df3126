"""The wheel and the sdist build and hold what they should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


def test_contents(dist: Path) -> None:
    names = zipfile.ZipFile(next(dist.glob("*.whl"))).namelist()
    sources = [
        path for path in (ROOT / "t5_trt").rglob("*") if path.suffix in {".py", ".cu", ".cuh", ".c", ".h", ".typed"}
    ]
    wanted = {path.relative_to(ROOT).as_posix() for path in sources}
    assert wanted <= set(names) and "t5_trt/kernels/cpu/decode_step.c" in wanted
    assert not [name for name in names if not name.startswith(("t5_trt/", "t5_trt-"))]
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted | {"tests/conftest.py"} <= inside


def test_the_sdist_makes_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    """Outside of the checkout; what the wheel does when it is installed is tested in tests/test_install.py."""
    make = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    calm = {**os.environ, "PYTHONWARNINGS": ""}  # an older pip uses what a newer Python deprecates
    subprocess.run([*make, next(dist.glob("*.tar.gz"))], check=True, cwd=tmp_path, env=calm)
    contents = []
    for folder in (dist, tmp_path):
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            contents.append({name: wheel.read(name) for name in wheel.namelist()})
    assert contents[0] == contents[1]


def test_both_readmes_say_the_same() -> None:
    """Code, commands, options and figures of the Japanese README are those of the English one."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md")]
    blocks = [re.findall(r"^```.*?^```", text, re.M | re.S) for text in texts]
    assert len(blocks[0]) == len(blocks[1]) >= 5
    for left, right in zip(*blocks, strict=True):
        codes = [re.sub(r"\s*#.*", "", block) for block in (left, right)]
        assert codes[0] == codes[1]
    speed = [text.split("begin: cpu-speed -->")[1].split("<!-- end")[0] for text in texts]
    assert speed[0] == speed[1] and "int8" in speed[0]
    headings = [len(re.findall(r"^## ", text, re.M)) for text in texts]
    rows = [len(re.findall(r"^\| `", text, re.M)) for text in texts]
    assert headings[0] == headings[1] and rows[0] == rows[1]

"""The wheel and the sdist build, hold what they should, and work in an environment outside of this checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, SHIPPED


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


def test_contents(dist: Path) -> None:
    names = zipfile.ZipFile(next(dist.glob("*.whl"))).namelist()
    assert "t5_trt/py.typed" in names and "t5_trt/modeling.py" in names
    assert not [name for name in names if not name.startswith(("t5_trt/", "t5_trt-"))]
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        assert any(name.endswith("/tests/conftest.py") for name in archive.getnames())


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_installed_elsewhere(dist: Path, tmp_path: Path, pattern: str) -> None:
    """In a new environment that sees this one's dependencies, the README's quickstart runs far from the checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    package = str(next(dist.glob(pattern)))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    calm = {**os.environ, "PYTHONWARNINGS": ""}  # an older pip uses what a newer Python deprecates
    subprocess.run([*install, package], check=True, cwd=tmp_path, env=calm)
    (site / "dependencies.pth").write_text("\n".join(entry for entry in sys.path if entry.endswith("site-packages")))
    quickstart = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    script = re.sub(r'"sonoisa/[^"]+"', repr(str(SHIPPED)), quickstart) + "import t5_trt\nprint(t5_trt.__file__)\n"
    assert script.count(str(SHIPPED)) == 2  # no hub can be reached from every machine that runs this
    (tmp_path / "quickstart.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": ""}
    run = subprocess.run([python, "quickstart.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    printed, home = run.stdout.strip().rsplit("\n", 1)
    assert home == str(site / "t5_trt" / "__init__.py") and len(printed) > 10


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

"""The wheel and the sdist build, hold what they should, and work in an environment outside of this checkout."""

from __future__ import annotations

import os
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
    """Installed into a new environment that sees this one's dependencies, the quickstart runs far from the checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    package = str(next(dist.glob(pattern)))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*install, package], check=True, cwd=tmp_path)
    (site / "dependencies.pth").write_text("\n".join(entry for entry in sys.path if entry.endswith("site-packages")))
    script = (
        "import t5_trt\n"
        "from transformers import AutoTokenizer\n"
        "from t5_trt import TRTT5ForConditionalGeneration\n"
        f"folder = {str(SHIPPED)!r}\n"
        "tokenizer, model = AutoTokenizer.from_pretrained(folder), TRTT5ForConditionalGeneration.from_pretrained(folder)\n"
        "tokens = model.generate(**tokenizer('がっこう', return_tensors='pt'))\n"
        "print(t5_trt.__file__, tokenizer.decode(tokens[0], skip_special_tokens=True))\n"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    run = subprocess.run([python, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(site / "t5_trt" / "__init__.py"), "gakkō"]

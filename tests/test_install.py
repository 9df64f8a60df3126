"""The wheel in an environment of its own, with what it depends on and nothing else: what README.md shows runs there as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.hub_folders import HUB_FOLDERS, TEXTS, put_into_cache

BLOCKS = [
    block
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    if "from openai import" not in block  # a client of a server, which tests/cli/test_serve.py runs
]
MODELS = sorted(set(re.findall(r'"([\w-]+/[\w.-]+)"', "\n".join(BLOCKS))))  # ids on the hub

pytestmark = pytest.mark.timeout(1200)  # for a slow network


def as_a_user(**variables: str) -> dict[str, str]:
    """The environment variables of a process that knows nothing of this checkout."""
    ours = ("PYTHONPATH", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "T5_TRT_BACKEND", "T5_TRT_CACHE")
    return {**{name: value for name, value in os.environ.items() if name not in ours}, **variables}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    calm = as_a_user()  # an older pip uses what a newer Python deprecates
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True, env=calm)
    python = folder / "env" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, next(folder.glob("*.whl"))], check=True, cwd=folder, env=calm)
    return python


def test_nothing_of_development_is_there(bare: Path) -> None:
    site = next((bare.parent.parent / "lib").glob("python*/site-packages"))
    names = {found.metadata["Name"].lower().replace("_", "-") for found in Distribution.discover(path=[str(site)])}
    assert {"t5-trt", "sentencepiece", "protobuf", "torch"} <= names
    assert not {"tiktoken", "accelerate", "pytest", "ray", "tensorrt-rtx-cu13"} & names


@pytest.mark.parametrize("kind", ["old-t5", "new-t5"])
def test_the_readme_runs_on_a_repository(bare: Path, tmp_path: Path, kind: str) -> None:
    """All of its blocks one after the other, with the names that they have on the hub.

    The other kinds of `HUB_FOLDERS` need no other packages; tests/checkpoint/test_hub_folders.py loads them.
    """
    assert BLOCKS and MODELS
    for name in MODELS:
        put_into_cache(tmp_path / "hub", name, HUB_FOLDERS[kind])
    (tmp_path / "input.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    (tmp_path / "readme.py").write_text("\n".join([*BLOCKS, "import t5_trt; print(t5_trt.__file__)"]), encoding="utf-8")
    here = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "T5_TRT_CACHE": str(tmp_path / "engines")}
    command = [bare, "readme.py"]
    run = subprocess.run(
        command, cwd=tmp_path, env=as_a_user(**here, PYTHONIOENCODING="utf-8"), capture_output=True, encoding="utf-8"
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[-1].startswith(str(bare.parent.parent)) and len(lines) > len(TEXTS)


def test_the_command_answers(bare: Path) -> None:
    command = bare.parent / "t5-trt"
    shown = subprocess.run([command, "--version"], env=as_a_user(), capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"t5-trt \d+\.\d+\.\d+\n", shown)
    for option in ("-h", "--help"):
        assert "info" in subprocess.run([command, option], env=as_a_user(), capture_output=True, text=True).stdout


def test_commands_of_messages_need_no_t5_trt_on_the_index(bare: Path) -> None:
    """pip takes the extras from the package that is installed."""
    command = [bare, "-m", "pip", "install", "--dry-run", "t5-trt[verify]"]
    done = subprocess.run(command, env=as_a_user(), capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"Would install.*polygraphy", done.stdout), done.stderr

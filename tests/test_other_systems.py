"""Systems that lack what only POSIX has: the library imports and runs on their CPUs. Here by taking it away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5_trt.engine import store_check
from t5_trt.engine.store import EngineStore
from tests.conftest import ROOT, SHIPPED

#: of what Windows does not have, what a library like this one might call (without fchmod, which filelock calls on this system)
MISSING = (
    "O_DIRECTORY", "O_NOFOLLOW", "chown", "fork", "geteuid", "getgid", "getpgid", "getuid", "killpg", "mkfifo", "nice",
    "register_at_fork", "sched_getaffinity", "setsid", "statvfs", "sysconf", "uname", "wait3",
)  # fmt: skip
SCRIPT = f"""
import os, sys
import filelock, onnxruntime, platformdirs, torch, transformers  # they know such systems themselves
from transformers import AutoTokenizer, T5ForConditionalGeneration
import transformers.models.t5.modeling_t5, transformers.models.mt5, transformers.models.umt5, transformers.generation

for name in {MISSING!r}:
    delattr(os, name)
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None

from t5_trt import TRTT5ForConditionalGeneration, generate_many

tokenizer = AutoTokenizer.from_pretrained({str(SHIPPED)!r})
for turn in range(2):  # the second one reads what the first one stored
    for precision in ("fp32", "int8"):
        model = TRTT5ForConditionalGeneration.from_pretrained({str(SHIPPED)!r}, precision=precision)
        print(*generate_many(model, tokenizer, ["がっこう", "コーヒー"], num_beams=2, batch_size=1))
model.save_pretrained("saved")
"""


def test_without_what_only_posix_has(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "T5_TRT_CACHE": str(tmp_path / "store")}
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(
        command, cwd=tmp_path, env={**environment, "PYTHONIOENCODING": "utf-8"}, capture_output=True, encoding="utf-8"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["gakkō kōhī"] * 4
    assert "not used" not in run.stderr and (tmp_path / "saved" / "model.safetensors").is_file()


def test_store_of_a_system_without_ids_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Owner and mode say nothing there, as files show 0666; the digest is still checked."""
    monkeypatch.delattr(os, "getuid")
    monkeypatch.delattr(os, "O_DIRECTORY")
    store = EngineStore(tmp_path / "store")

    def build(folder: Path) -> None:
        (folder / "engine.plan").write_bytes(b"engine")

    key = "0" * 32
    store.get_or_build(key, {}, build)
    for path in (store.root, *store.root.rglob("*")):
        path.chmod(path.stat().st_mode | 0o666)
    assert store.get(key) == b"engine" and store_check.check_store(store) == []
    (store.root / key / "engine.plan").write_bytes(b"changed")
    assert store.get(key) is None


def test_no_signal_is_sent_to_ask_for_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal was sent"))
    (tmp_path / f".timing-rtx.{os.getpid()}").touch()
    assert store_check.check_store(EngineStore(tmp_path)) == []

"""Faults while an engine is stored: whatever is lost at whatever step, the next call works and the store is whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from t5_trt.cli import app
from t5_trt.engine import store as store_module
from t5_trt.engine.cache_key import engine_key
from t5_trt.engine.store import LOCKS, MANIFEST, PLAN, STAGING, EngineStore
from t5_trt.engine.store_check import check_store

KEY, OTHER = engine_key({"graph": "encoder"}), engine_key({"graph": "decoder"})
PROCESSES = multiprocessing.get_context("forkserver")  # pytest has threads, and a fork of them may wait for ever
PROCESSES.set_forkserver_preload(
    ["tests.engine.test_faults", "tests.engine.test_store"]
)  # else each of them imports for a second
#: audit events of Python that touch files: each of them is a step at which a process may die
STEPS = ("open", "os.", "shutil.", "tempfile.", "fcntl.")


def write(folder: Path) -> None:
    (folder / "model.onnx").write_text("graph")
    (folder / PLAN).write_bytes(b"plan")


def store_until(root: Path, last: int) -> None:
    """Store an engine, and be killed before the step of that number."""
    store, seen = EngineStore(root), 0

    def count(event: str, arguments: Any) -> None:
        nonlocal seen
        if event.startswith(STEPS):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    store.get_or_build(KEY, {}, write)
    os._exit(0)


def test_killed_at_every_step(tmp_path: Path) -> None:
    """A damaged engine of the same key is there already, as its removal is among the steps."""
    killed = 0
    for last in range(1, 200):
        root = tmp_path / str(last)
        store = EngineStore(root)
        store.get_or_build(KEY, {}, write)
        (root / KEY / PLAN).write_bytes(b"evil")
        process = PROCESSES.Process(target=store_until, args=(root, last))
        process.start()
        process.join(30)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        assert store.get(KEY) in (None, b"plan")
        check_store(store, repair=True)
        assert check_store(store) == [] and not list(root.glob(f"{STAGING}*"))
        assert store.get_or_build(KEY, {}, write) == b"plan" == store.get(KEY)
        assert check_store(store) == []
    assert killed >= 20 and process.exitcode == 0


def test_bytes_are_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut leaves: an engine has its name only once its bytes are safe, and then the name is made safe."""
    order: list[str] = []
    sync, rename = store_module._sync, os.rename
    monkeypatch.setattr(store_module, "_sync", lambda path: (order.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda source, target: (order.append("rename"), rename(source, target)))
    EngineStore(tmp_path / "store").get_or_build(KEY, {}, write)
    assert order[:2] == [PLAN, MANIFEST] and order[2].startswith(STAGING) and order[3:] == ["rename", "store"]


def test_slow_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network's file system: those who ask in the meantime wait, and one build serves all."""
    store, rename, built = EngineStore(tmp_path / "store"), os.rename, []
    monkeypatch.setattr(os, "rename", lambda *names: (time.sleep(0.3), rename(*names)))
    results: list[bytes] = []

    def ask() -> None:
        results.append(EngineStore(store.root).get_or_build(KEY, {}, lambda folder: (built.append(1), write(folder))))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [b"plan"] * 4 and len(built) == 1


def damaged_store(root: Path) -> EngineStore:
    """One whole engine, and everything that can be wrong."""
    store = EngineStore(root)
    store.get_or_build(KEY, {}, write)
    store.get_or_build(OTHER, {}, write)
    (root / OTHER / PLAN).write_bytes(b"pla")
    (root / f"{STAGING}{OTHER}-x1").mkdir()
    (root / ("0" * 32)).mkdir()
    (root / ("1" * 32)).symlink_to(root / KEY)
    (root / "timing-rtx-1.7-encoder-fp16.cache").write_bytes(b"times")
    (root / ".timing-rtx-1.7-encoder-fp16.cache.4194305").write_bytes(b"ti")  # above the largest process number
    return store


def test_check_and_repair(tmp_path: Path) -> None:
    store = damaged_store(tmp_path / "store")
    store.root.chmod(0o770)
    arguments = ["cache", "check", "--cache-dir", str(store.root)]
    looked = CliRunner().invoke(app, arguments)
    assert looked.exit_code == 1 and looked.output.count("wrong: ") == 6 and "6 left" in looked.output
    mended = CliRunner().invoke(app, [*arguments, "--repair"])
    assert mended.exit_code == 0 and mended.output.count("mended: ") == 6
    assert sorted(path.name for path in store.root.iterdir()) == sorted(
        [LOCKS, KEY, "timing-rtx-1.7-encoder-fp16.cache"]
    )
    assert store.get(KEY) == b"plan" and CliRunner().invoke(app, arguments).output.endswith("0 left\n")


def test_what_others_work_on_is_left_alone(tmp_path: Path) -> None:
    store = damaged_store(tmp_path / "store")
    with FileLock(store.root / LOCKS / f"{OTHER}.lock"):
        paths = {problem.path.name for problem in check_store(store, repair=True)}
    assert OTHER not in paths and (store.root / OTHER).is_dir() and (store.root / f"{STAGING}{OTHER}-x1").is_dir()
    assert {problem.path.name for problem in check_store(store)} == {OTHER, f"{STAGING}{OTHER}-x1"}


def test_what_is_not_the_stores_is_left_alone(tmp_path: Path) -> None:
    store = damaged_store(tmp_path / "store")
    (store.root / "thesis.txt").write_text("mine")
    left = [problem for problem in check_store(store, repair=True) if not problem.mended]
    assert [problem.path.name for problem in left] == ["thesis.txt"] and left[0].path.read_text() == "mine"


def test_check_of_a_missing_store_succeeds(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["cache", "check", "--cache-dir", str(tmp_path / "none")])
    assert run.exit_code == 0 and not (tmp_path / "none").exists()

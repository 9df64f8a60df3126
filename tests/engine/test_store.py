"""The engine store: one build however many ask, nothing half-written, nothing damaged handed out, nobody else's code."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from t5_trt import BackendError
from t5_trt.engine.cache_key import engine_key
from t5_trt.engine.store import LOCKS, MANIFEST, PLAN, EngineStore
from t5_trt.engine.store_check import check_store

KEY = engine_key({"graph": "encoder"})
PROCESSES = multiprocessing.get_context("forkserver")  # pytest has threads, and a fork of them may wait for ever
PROCESSES.set_forkserver_preload(
    ["tests.engine.test_faults", "tests.engine.test_store"]
)  # else each of them imports for a second


def writing(text: str = "plan", log: Path | None = None, wait_s: float = 0.0) -> Any:
    def build(folder: Path) -> None:
        if log is not None:
            with log.open("a") as file:
                file.write("built\n")
        time.sleep(wait_s)
        (folder / "model.onnx").write_text("graph")
        (folder / PLAN).write_text(text)

    return build


def never(folder: Path) -> None:
    raise AssertionError("nothing should be built")


def leftovers(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.name.startswith(".building-"))


def test_built_once_then_loaded(tmp_path: Path) -> None:
    store = EngineStore(tmp_path / "store")
    assert store.get_or_build(KEY, {"graph": "encoder"}, writing()) == b"plan"
    assert store.get_or_build(KEY, {"graph": "encoder"}, never) == b"plan"
    (entry,) = store.entries()
    assert entry.manifest["graph"] == "encoder" and entry.size_bytes == 4
    assert sorted(path.name for path in entry.folder.iterdir()) == sorted((PLAN, MANIFEST))
    assert oct((tmp_path / "store").stat().st_mode)[-3:] == "700"


def damage_plan(folder: Path) -> None:
    (folder / PLAN).write_text("evil")


def truncate_plan(folder: Path) -> None:
    (folder / PLAN).write_bytes((folder / PLAN).read_bytes()[:2])


def drop_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def foreign_manifest(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "key": "0" * 32}))


@pytest.mark.parametrize("damage", [damage_plan, truncate_plan, drop_manifest, break_manifest, foreign_manifest])
def test_damaged_engines_are_built_again(tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = EngineStore(tmp_path / "store")
    store.get_or_build(KEY, {}, writing())
    damage(store.root / KEY)
    with caplog.at_level(logging.WARNING, "t5_trt"):
        assert store.get(KEY) is None
    assert "will be built again" in caplog.text
    assert store.get_or_build(KEY, {}, writing("new")) == b"new" == store.get(KEY)


@pytest.mark.parametrize("error", [RuntimeError("TensorRT said no"), KeyboardInterrupt(), MemoryError()])
def test_failed_build_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    store = EngineStore(tmp_path / "store")

    def fail(folder: Path) -> None:
        (folder / PLAN).write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.get_or_build(KEY, {}, fail)
    assert store.get(KEY) is None and not leftovers(store.root)
    assert store.get_or_build(KEY, {}, writing()) == b"plan"


def test_full_disk(tmp_path: Path) -> None:
    store = EngineStore(tmp_path / "store")

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(BackendError, match=r"No space left on device.*Make room"):
        store.get_or_build(KEY, {}, full)
    assert not leftovers(store.root)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BackendError, match="T5_TRT_CACHE"):
        EngineStore(tmp_path / "file" / "store").get_or_build(KEY, {}, writing())


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_folder_that_others_may_write_to(tmp_path: Path, mode: int) -> None:
    store = EngineStore(tmp_path / "store")
    store.get_or_build(KEY, {}, writing())
    store.root.chmod(mode)
    for ask in (lambda: store.get(KEY), lambda: store.get_or_build(KEY, {}, never)):
        with pytest.raises(BackendError, match=r"may be written by others.*chmod 700"):
            ask()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to somebody else")
@pytest.mark.parametrize("name", ["", PLAN, MANIFEST])
def test_engines_of_another_owner_are_not_used(tmp_path: Path, name: str) -> None:
    """While the folder was open to others, or into one that they made: its mode alone does not show it."""
    store = EngineStore(tmp_path / "store")
    store.get_or_build(KEY, {}, writing())
    os.chown(store.root / KEY / name, 65534, 65534)
    assert [problem.what for problem in check_store(store)] == [
        f"it may be written by others (owner 65534, mode {'600' if name else '700'}): {name or KEY}"
    ]
    assert store.get(KEY) is None
    assert store.get_or_build(KEY, {}, writing("mine")) == b"mine"
    os.chown(store.root, 65534, 65534)
    with pytest.raises(BackendError, match="may be written by others"):
        store.get(KEY)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_nothing_is_open_to_others_at_any_moment(tmp_path: Path, umask: int) -> None:
    """Not even while it is built, whatever the umask."""
    store, modes = EngineStore(tmp_path / "store"), []

    def build(folder: Path) -> None:
        (folder / PLAN).write_text("plan")
        modes.extend(path.stat().st_mode & 0o777 for path in (store.root, folder, store.root / LOCKS))

    before = os.umask(umask)
    try:
        store.get_or_build(KEY, {}, build)
    finally:
        os.umask(before)
    assert modes == [0o700] * 3
    files = {path.name: path.stat().st_mode & 0o777 for path in (store.root / KEY).iterdir()}
    assert files == {PLAN: 0o600, MANIFEST: 0o600} and (store.root / KEY).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("manifest", ["[]", "null", '"text"', "7"])
def test_invalid_manifest_is_rejected(tmp_path: Path, manifest: str) -> None:
    store = EngineStore(tmp_path / "store")
    store.get_or_build(KEY, {}, writing())
    (store.root / KEY / MANIFEST).write_text(manifest)
    assert store.entries() == [] and store.get(KEY) is None


def test_least_recently_used_go_first(tmp_path: Path) -> None:
    store = EngineStore(tmp_path / "store", max_bytes=25)
    keys = [engine_key({"n": n}) for n in range(3)]
    for age, key in zip((300, 200), keys, strict=False):
        store.get_or_build(key, {}, writing("x" * 10))
        moment = time.time() - age
        os.utime(store.root / key / MANIFEST, (moment, moment))
    assert store.get(keys[0]) is not None  # used: now the second is the oldest
    store.get_or_build(keys[2], {}, writing("x" * 10))
    assert {entry.key for entry in store.entries()} == {keys[0], keys[2]}
    assert store.clear() == 2 and store.entries() == []


def _ask(root: Path, log: Path) -> None:
    assert EngineStore(root).get_or_build(KEY, {}, writing("shared", log, 0.5)) == b"shared"


@pytest.mark.parametrize("count", [2, 8])
def test_many_processes_build_once(tmp_path: Path, count: int) -> None:
    log = tmp_path / "log"
    processes = [PROCESSES.Process(target=_ask, args=(tmp_path / "store", log)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "built\n"


def _hang(root: Path, log: Path) -> None:
    EngineStore(root).get_or_build(KEY, {}, writing("never", log, 60))


def test_killed_while_building(tmp_path: Path) -> None:
    """The lock of a dead process is free, and what it left is swept by the next build."""
    log = tmp_path / "log"
    process = PROCESSES.Process(target=_hang, args=(tmp_path / "store", log))
    process.start()
    while not log.exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    store = EngineStore(tmp_path / "store")
    assert leftovers(store.root) and store.get(KEY) is None
    assert store.get_or_build(KEY, {}, writing()) == b"plan"
    assert not leftovers(store.root)


def test_the_key_follows_everything_that_the_engine_depends_on() -> None:
    facts = {"graph": "encoder", "architecture": {"d_model": 64}, "shapes": {"B": 1}, "precision": "fp16", "gpu": "a"}
    changes = {"graph": "cross", "architecture": {"d_model": 65}, "shapes": {"B": 2}, "precision": "fp32", "gpu": "b"}
    keys = {engine_key(facts), *(engine_key({**facts, name: value}) for name, value in changes.items())}
    assert len(keys) == 6 and engine_key(dict(reversed(facts.items()))) == engine_key(facts)


def test_facts_are_added_to_a_manifest(tmp_path: Path) -> None:
    store = EngineStore(tmp_path / "store")
    store.add_to_manifest(KEY, {"encoder_ms": 1.0})
    assert store.manifest(KEY) == {} and not store.root.exists(), "there is no such engine"
    store.get_or_build(KEY, {"graph": "encoder"}, writing())
    before = store.manifest(KEY)
    store.add_to_manifest(KEY, {"encoder_ms": 1.0})
    assert store.manifest(KEY) == before | {"encoder_ms": 1.0}
    assert store.get(KEY) == b"plan" and check_store(store) == []
    assert sorted(path.name for path in (store.root / KEY).iterdir()) == sorted((PLAN, MANIFEST))
    (store.root / KEY / MANIFEST).write_text("no JSON")
    store.add_to_manifest(KEY, {"encoder_ms": 1.0})
    assert store.manifest(KEY) == {}


def test_manifest_that_cannot_be_written_causes_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = EngineStore(tmp_path / "store")
    store.get_or_build(KEY, {"graph": "encoder"}, writing())

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("t5_trt.engine.store.os.replace", full)
    store.add_to_manifest(KEY, {"encoder_ms": 1.0})
    assert "is not kept: no space left" in caplog.text and store.get(KEY) == b"plan"

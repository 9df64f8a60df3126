"""Engines on disk: one folder per key with ``engine.plan`` and ``manifest.json``; safe for many processes at once.

Loading a plan can run code. So the folder belongs to the user alone (0700), and a plan is used only if its bytes have the digest in
its manifest and nobody else can have written it. New engines are written to a temporary folder and renamed: a reader sees a
complete engine or none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from t5_trt.engine.ownership import user_id, writable_by_others
from t5_trt.errors import BackendError

logger = logging.getLogger("t5_trt")
PLAN, MANIFEST = "engine.plan", "manifest.json"
#: in the manifest of an encoder engine: milliseconds by "engine" and by our own "kernels", measured side by side
TIMES = "encoder_ms"
STAGING, LOCKS = ".building-", ".locks"
#: in the manifest: size and time of change (ns) of the plan
WRITTEN = "written"
Found = TypeVar("Found")


@dataclass(frozen=True)
class StoredEngine:
    """One entry of a store: its key, folder, manifest, size and time of last use (seconds since 1970)."""

    key: str
    folder: Path
    manifest: dict[str, Any]
    size_bytes: int
    used_at: float


def read_engine(folder: Path, key: str, owners: Collection[int | None]) -> tuple[str | None, bytes]:
    """(what is wrong with an engine's folder or None, its plan); only `owners` may be able to write to any of it."""
    try:
        if problem := writable_problem(folder, owners):
            return problem, b""
        manifest = json.loads((folder / MANIFEST).read_text())
        plan = (folder / PLAN).read_bytes()
    except (OSError, ValueError) as error:
        return f"it is incomplete ({type(error).__name__})", b""
    if not isinstance(manifest, dict) or manifest.get("key") != key:
        return "its manifest belongs to another engine", b""
    if hashlib.sha256(plan).hexdigest() != manifest.get("sha256"):
        return "its bytes are not those that were built", b""
    return None, plan


def find_plan(folder: Path, key: str, owners: Collection[int | None]) -> tuple[str | None, Path]:
    """As `read_engine`, with the plan's path: a plan whose size and time of change are those that it was written with is not read."""
    plan = folder / PLAN
    try:
        if problem := writable_problem(folder, owners):
            return problem, plan
        manifest = json.loads((folder / MANIFEST).read_text())
        if not isinstance(manifest, dict) or manifest.get("key") != key:
            return "its manifest belongs to another engine", plan
        if manifest.get(WRITTEN) != _written(plan) and manifest.get("sha256") != _sha256(plan):
            return "its bytes are not those that were built", plan
    except (OSError, ValueError) as error:
        return f"it is incomplete ({type(error).__name__})", plan
    return None, plan


def writable_problem(folder: Path, owners: Collection[int | None]) -> str | None:
    """Why others than `owners` may write to an engine's folder or its files, or None.

    Raises:
        OSError: one of them is missing.
    """
    for path in (folder, folder / MANIFEST, folder / PLAN):
        if problem := writable_by_others(path, owners):
            return f"{problem}: {path.name}"
    return None


class EngineStore:
    """A folder of engines.

    Args:
        root: the folder; created with mode 0700 at the first write.
        max_bytes: above this size the least recently used engines are removed; None keeps all.
    """

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        self.root = root
        self.max_bytes = max_bytes

    def get(self, key: str) -> bytes | None:
        """The plan of an engine; None if it is missing or damaged.

        Raises:
            BackendError: others may write to the folder.
        """
        return self._used(key, read_engine)

    def get_or_build(self, key: str, facts: dict[str, Any], build: Callable[[Path], None]) -> bytes:
        """The plan of an engine, built if it is missing; other processes that need it wait.

        Args:
            key: of the engine.
            facts: the values behind the key, for the manifest.
            build: called with an empty folder, into which it must write ``engine.plan``. Its exceptions are passed on,
                and the folder is removed.

        Raises:
            BackendError: the folder cannot be written, or others may write to it.
        """
        return self._found_or_built(key, facts, build, self.get, Path.read_bytes)

    def file(self, key: str) -> Path | None:
        """Where the plan of an entry lies, for data that is read in parts; None if it is missing or damaged.

        A plan whose size and time of change are those that it was written with is not read; another one is compared with its digest.

        Raises:
            BackendError: others may write to the folder.
        """
        return self._used(key, find_plan)

    def file_or_build(self, key: str, facts: dict[str, Any], build: Callable[[Path], None]) -> Path:
        """As `get_or_build`, for `file`. Another process may remove the file at any time."""
        return self._found_or_built(key, facts, build, self.file, lambda built: self.root / key / built.name)

    def _used(
        self, key: str, read: Callable[[Path, str, Collection[int | None]], tuple[str | None, Found]]
    ) -> Found | None:
        """What `read` gives for an entry, which counts as used then; None if the entry is missing, or something is wrong with it."""
        folder = self.root / key
        if not folder.is_dir():
            return None
        self._check_private()
        problem, found = read(folder, key, (user_id(),))
        if problem:
            logger.warning("the stored engine %s is not used and will be built again: %s.", folder, problem)
            return None
        os.utime(folder / MANIFEST)
        return found

    def _found_or_built(
        self,
        key: str,
        facts: dict[str, Any],
        build: Callable[[Path], None],
        find: Callable[[str], Found | None],
        take: Callable[[Path], Found],
    ) -> Found:
        """What `find` gives for a key, or after a build what `take` gives for the plan in its temporary folder."""
        found = find(key)
        if found is not None:
            return found
        self._make_root()
        with self._lock(key):
            found = find(key)  # another process may have built it meanwhile
            if found is not None:
                return found
            self._sweep(key)
            staging = Path(tempfile.mkdtemp(prefix=f"{STAGING}{key}-", dir=self.root))
            try:
                started = time.time()
                build(staging)
                plan = staging / PLAN
                found = take(plan)
                for leftover in staging.iterdir():
                    if leftover.name != PLAN:
                        leftover.unlink()
                manifest = {
                    "key": key,
                    "sha256": _sha256(plan),
                    "size_bytes": plan.stat().st_size,
                    WRITTEN: _written(plan),
                    "built_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                    "build_s": round(time.time() - started, 2),
                    **facts,
                }
                self._publish(staging, self.root / key, manifest)
            except OSError as error:
                raise BackendError(
                    f"cannot store an engine in {self.root}: {error}. Make room, or set T5_TRT_CACHE or "
                    "engine_cache_dir to a folder that can be written."
                ) from error
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        self.prune(self.max_bytes, keep=key)
        return found

    def entries(self) -> list[StoredEngine]:
        """All engines with a readable manifest, most recently used first."""
        found = []
        for folder in sorted(self.root.glob("*")) if self.root.is_dir() else []:
            manifest = self.manifest(folder.name)
            if not manifest:
                continue
            try:
                used_at, size = (folder / MANIFEST).stat().st_mtime, (folder / PLAN).stat().st_size
            except OSError:
                continue
            found.append(StoredEngine(folder.name, folder, manifest, size, used_at))
        return sorted(found, key=lambda entry: -entry.used_at)

    def manifest(self, key: str) -> dict[str, Any]:
        """The manifest of an engine; empty if it is missing."""
        try:
            found = json.loads((self.root / key / MANIFEST).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def add_to_manifest(self, key: str, facts: dict[str, Any]) -> None:
        """Add to the manifest of an engine; no-op if it is missing, or (with a warning) if the folder cannot be written."""
        target = self.root / key / MANIFEST
        if not self.manifest(key):
            return
        try:
            with self._lock(key):
                found = self.manifest(key)
                if found:
                    new = target.with_name(f"{MANIFEST}.new")
                    new.write_text(json.dumps(found | facts, indent=2) + "\n")
                    new.chmod(0o600)
                    os.replace(new, target)
        except OSError as error:
            logger.warning("what was found out about the engine %s is not kept: %s.", key, error)

    def remove(self, key: str) -> None:
        """Delete one engine."""
        with self._lock(key):
            shutil.rmtree(self.root / key, ignore_errors=True)

    def prune(self, max_bytes: int | None, keep: str | None = None) -> list[str]:
        """Delete the least recently used engines until the rest takes at most `max_bytes`; return their keys."""
        if max_bytes is None:
            return []
        total, removed = 0, []
        for entry in self.entries():
            total += entry.size_bytes
            if total > max_bytes and entry.key != keep:
                self.remove(entry.key)
                removed.append(entry.key)
        return removed

    def clear(self) -> int:
        """Delete all engines and leftovers of interrupted builds; return the number of engines."""
        entries = self.entries()
        for entry in entries:
            self.remove(entry.key)
        for folder in self.root.glob(f"{STAGING}*") if self.root.is_dir() else []:
            shutil.rmtree(folder, ignore_errors=True)
        return len(entries)

    def _publish(self, staging: Path, target: Path, manifest: dict[str, Any]) -> None:
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for name in (PLAN, MANIFEST):  # on disk before the rename: a power cut must not leave a name without content
            (staging / name).chmod(0o600)  # independent of the umask
            _sync(staging / name)
        _sync(staging)
        shutil.rmtree(target, ignore_errors=True)  # a damaged engine of the same key
        os.rename(staging, target)
        _sync(self.root)

    def _sweep(self, key: str) -> None:
        """Remove leftovers of a killed build of this key, whose lock this process holds."""
        for folder in self.root.glob(f"{STAGING}{key}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _make_root(self) -> None:
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.root / LOCKS).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise BackendError(
                f"cannot make the engine cache {self.root}: {error}. Set T5_TRT_CACHE or engine_cache_dir to a folder that "
                "can be written."
            ) from error
        self._check_private()

    def problem_of_permissions(self) -> str | None:
        """Why others may write to the folder, or None."""
        return writable_by_others(self.root, (user_id(),))

    def _check_private(self) -> None:
        problem = self.problem_of_permissions()
        if problem is not None:
            raise BackendError(
                f"the engine cache {self.root} cannot be trusted: {problem}; engines are code, so it must be yours alone: "
                "chmod 700 it, or set T5_TRT_CACHE to another folder."
            )

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        with FileLock(self.root / LOCKS / f"{key}.lock", mode=0o600):
            yield


def _written(path: Path) -> list[int]:
    info = path.stat()
    return [info.st_size, info.st_mtime_ns]


def _sha256(path: Path) -> str:
    """The digest of a file, read in parts."""
    digest, part = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(part):
            digest.update(part[:count])
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders, nor sync a file that is open for reading only
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

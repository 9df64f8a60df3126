"""Checks an engine store for damaged engines and leftovers, for ``t5-trt cache check``.

Requests do not need this: damaged engines are not used, and the next build of a key removes its leftovers. It finds leftovers of
killed processes whose keys are no longer requested.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from t5_trt.engine.ownership import user_id
from t5_trt.engine.store import LOCKS, STAGING, EngineStore, read_engine

#: temporary files of TensorRT's timing cache, with the id of the writing process
_UNFINISHED = re.compile(r"^\.timing-.*\.(\d+)$")


_FOLDER = re.compile(rf"^(?:{re.escape(STAGING)}(?P<building>[0-9a-f]{{32}})-.*|(?P<built>[0-9a-f]{{32}}))$")
_FOREIGN = "it is nothing of the store's and is left alone"


@dataclass(frozen=True)
class Problem:
    """A problem in a store.

    Attributes:
        path: of the file or folder.
        what: is wrong with it.
        mended: the file was removed, or its mode was corrected.
    """

    path: Path
    what: str
    mended: bool


def check_store(store: EngineStore, *, repair: bool = False) -> list[Problem]:
    """Check everything in a store, except what a running process is working on.

    Args:
        store: to check; an empty or missing one has no problems.
        repair: remove damaged engines and leftovers, and others' write permission. Foreign files are kept.

    Raises:
        OSError: the folder cannot be read, or something cannot be removed.
    """
    found: list[Problem] = []
    if not store.root.is_dir():
        return found
    problem = store.problem_of_permissions()
    if problem:
        mine = store.root.stat().st_uid == user_id()
        if repair and mine:
            store.root.chmod(0o700)
        found.append(Problem(store.root, problem, repair and mine))
    for path in sorted(store.root.iterdir()):
        with _unless_busy(store, path) as free:
            what = _problem(path) if free else None
            if what is not None:
                removable = what != _FOREIGN
                if repair and removable:
                    _remove(path)
                found.append(Problem(path, what, repair and removable))
    return found


def _problem(path: Path) -> str | None:
    """What is wrong with an entry of the store that no process works on; None if nothing is."""
    if path.name == LOCKS or (path.name.startswith("timing-") and path.is_file()):
        return None
    if unfinished := _UNFINISHED.match(path.name):
        return None if _alive(int(unfinished[1])) else "a process that is gone left it"
    key = _key_of(path)
    if key is None:
        return _FOREIGN
    if path.is_symlink() or not path.is_dir():
        return "it is no folder, as an engine's is"
    return (
        "a build that was killed left it" if path.name.startswith(STAGING) else read_engine(path, key, (user_id(),))[0]
    )


def _key_of(path: Path) -> str | None:
    """The key of an engine's folder or of its temporary folder; None for anything else."""
    found = _FOLDER.match(path.name)
    return found["building"] or found["built"] if found else None


@contextmanager
def _unless_busy(store: EngineStore, path: Path) -> Iterator[bool]:
    """Hold the lock of a folder's key, if it has one; yields False if another process holds it."""
    key = _key_of(path)
    if key is None:
        yield True
        return
    lock = FileLock(store.root / LOCKS / f"{key}.lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _alive(process: int) -> bool:
    if sys.platform == "win32":  # on Windows the signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

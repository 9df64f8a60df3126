"""Is everything in an engine store whole, and what may go? Behind ``t5-trt cache check``.

A request never needs this: damaged engines are not used and leftovers of a key are swept by its next build. It is for people
who want to know, and for disks that fill up with what killed processes left of keys that nobody asks for any more.
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

#: what TensorRT's timing cache is written to before it is renamed; the number is the writing process
_UNFINISHED = re.compile(r"^\.timing-.*\.(\d+)$")


_FOLDER = re.compile(rf"^(?:{re.escape(STAGING)}(?P<building>[0-9a-f]{{32}})-.*|(?P<built>[0-9a-f]{{32}}))$")
_FOREIGN = "it is nothing of the store's and is left alone"


@dataclass(frozen=True)
class Problem:
    """Something in a store that should not be as it is.

    Attributes:
        path: of the file or folder.
        what: is wrong with it.
        mended: it was removed, or its mode was set.
    """

    path: Path
    what: str
    mended: bool


def check_store(store: EngineStore, *, repair: bool = False) -> list[Problem]:
    """Look at everything in a store. What a living process is working on is left alone and is no problem.

    Args:
        store: to look at; one that was never written to has no problems.
        repair: remove damaged engines and leftovers, and take write permission from others. What is not the store's stays.

    Raises:
        OSError: the folder cannot be read, or what is to be removed cannot be.
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
    """What is wrong with an entry of the store that nobody works on."""
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
    """The key of an engine's folder, or of one in which it was to be built; None for anything else."""
    found = _FOLDER.match(path.name)
    return found["building"] or found["built"] if found else None


@contextmanager
def _unless_busy(store: EngineStore, path: Path) -> Iterator[bool]:
    """Hold the lock of a folder's key, if it has one; gives False, without it, where another process holds it."""
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
    if sys.platform == "win32":  # the signal 0 asks nothing there, it is Ctrl-C
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

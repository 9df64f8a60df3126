"""Checks who may write to a file or folder: engines are code, so only their user may."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path


def user_id() -> int | None:
    """The id of this process's user; None on systems without user ids (Windows)."""
    return os.getuid() if hasattr(os, "getuid") else None


def writable_by_others(path: Path, owners: Collection[int | None]) -> str | None:
    """Why others may change a file or folder (the target, if it is a link), or None.

    None on systems without user ids, where owner and mode have no meaning.

    Args:
        path: of the file or folder.
        owners: ids of the users who may own it. Access lists (ACLs) are detected: they show in the group's bits.

    Raises:
        OSError: it cannot be read.
    """
    info = path.stat()
    if user_id() is None:
        return None
    if info.st_uid in owners and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    return f"it may be written by others (owner {info.st_uid}, mode {stat.S_IMODE(info.st_mode):o})"

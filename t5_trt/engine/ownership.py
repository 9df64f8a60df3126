"""Who may write to a file or folder: engines are code, so nobody but their user may."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path


def user_id() -> int | None:
    """Of the user whom this process belongs to; None on systems without such ids (Windows)."""
    return os.getuid() if hasattr(os, "getuid") else None


def writable_by_others(path: Path, owners: Collection[int | None]) -> str | None:
    """Why others may change a file or folder (what it leads to, if it is a link), or None.

    On a system without ids of users it is None: owner and mode mean nothing there.

    Args:
        path: of it.
        owners: ids of the users who may own it. Access lists (ACLs) are seen: they show in the group's bits.

    Raises:
        OSError: it cannot be looked at.
    """
    info = path.stat()
    if user_id() is None:
        return None
    if info.st_uid in owners and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    return f"it may be written by others (owner {info.st_uid}, mode {stat.S_IMODE(info.st_mode):o})"

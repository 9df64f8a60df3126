"""Who may write to a file or folder: engines are code, so nobody but their user may."""

from __future__ import annotations

import stat
from collections.abc import Collection
from pathlib import Path


def who_else_may_write(path: Path, owners: Collection[int]) -> str | None:
    """Why others may change a file or folder (what it leads to, if it is a link), or None.

    Args:
        path: of it.
        owners: ids of the users who may own it. Access lists (ACLs) are seen: they show in the group's bits.

    Raises:
        OSError: it cannot be looked at.
    """
    info = path.stat()
    if info.st_uid in owners and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    return f"it may be written by others (owner {info.st_uid}, mode {stat.S_IMODE(info.st_mode):o})"

"""Engines that are stored with a checkpoint, and used if they fit this GPU and this TensorRT.

Loading a plan can run code. So engines in the user's own folders are used, and downloaded ones only with ``trust_engines=True``.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from t5_trt.engine.ownership import user_id, writable_by_others
from t5_trt.engine.store import MANIFEST, PLAN, read_engine
from t5_trt.errors import BackendError

logger = logging.getLogger("t5_trt")
FOLDER = "t5_trt_engines"
_HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only")


def find_bundle(name_or_path: str, trust: bool | None, **hub_arguments: Any) -> Path | None:
    """The folder of engines stored with a checkpoint; None if there is none that may be used.

    Args:
        name_or_path: hub id or folder of the checkpoint.
        trust: use it; None uses it only if the checkpoint is a folder that is not a download. Engines in a folder that
            are not used are mentioned in the log.
        hub_arguments: cache_dir, revision, token, local_files_only, subfolder.
    """
    inner = "/".join(filter(None, (hub_arguments.get("subfolder"), FOLDER)))
    if os.path.isdir(name_or_path):
        folder = Path(name_or_path) / inner
        if not folder.is_dir():
            return None
        if trust or (trust is None and not _is_download(Path(name_or_path))):
            return folder
        logger.info(
            "the engines in %s are not used, as engines are code. If you trust who wrote them: trust_engines=True.",
            folder,
        )
        return None
    if not trust:
        return None
    from huggingface_hub import snapshot_download

    wanted = {key: hub_arguments[key] for key in _HUB_ARGUMENTS if hub_arguments.get(key) is not None}
    try:
        folder = Path(snapshot_download(name_or_path, allow_patterns=[f"{inner}/*/*"], **wanted)) / inner
    except Exception as error:  # the hub's errors share no base class; without stored engines, new ones are built
        logger.warning("the engines of %s were not fetched and will be built: %s", name_or_path, error)
        return None
    return folder if folder.is_dir() else None


def _is_download(folder: Path) -> bool:
    """Whether the hub's client filled a folder: one in its cache, or a user's folder with its metadata."""
    snapshots = folder.resolve().parent
    cached = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return cached or (folder / ".cache" / "huggingface").is_dir()


def read_bundled(bundle: Path, key: str) -> bytes | None:
    """The plan of a key from a bundle; None if it is missing or incomplete, or others may write to it."""
    folder = bundle / key
    if not folder.is_dir():
        return None
    owners = (user_id(), 0)
    if writable_by_others(bundle, owners):
        logger.warning("the engines in %s are not used: others may write to that folder. chmod go-w it.", bundle)
        return None
    problem, plan = read_engine(folder, key, owners)
    if problem:
        logger.warning("the engine %s is not used and will be built: %s.", folder, problem)
        return None
    return plan


def write_bundle(engines: Iterable[Path], checkpoint: Path) -> Path:
    """Copy engines beside a checkpoint; existing ones are kept.

    Args:
        engines: their folders, named by key.
        checkpoint: its folder.

    Returns:
        The bundle's folder.

    Raises:
        BackendError: it cannot be written.
    """
    bundle = checkpoint / FOLDER
    try:
        bundle.mkdir(mode=0o755, parents=True, exist_ok=True)
        for folder in engines:
            if folder.parent.resolve() == bundle.resolve():
                continue
            with tempfile.TemporaryDirectory(prefix=".writing-", dir=bundle) as staging:
                copy = Path(shutil.copytree(folder, Path(staging) / folder.name))
                copy.chmod(0o755)  # to be read by all and written by nobody else, as the bundle's own folder
                for name in (PLAN, MANIFEST):
                    (copy / name).chmod(0o644)
                shutil.rmtree(bundle / folder.name, ignore_errors=True)
                os.rename(copy, bundle / folder.name)
    except OSError as error:
        raise BackendError(
            f"cannot write engines to {bundle}: {error}. Make room, or choose another folder."
        ) from error
    return bundle

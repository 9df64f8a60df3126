"""Checks whether a model of a name exists, without torch or Transformers, so that a mistyped folder fails at once."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from t5_trt.errors import CheckpointError

#: timeout in seconds for the hub's answer
_HUB_TIMEOUT = 10.0


def check_folder(name: str, subfolder: str = "") -> bool:
    """Whether a name is a folder with a config; False means that it may be the id of a model on the hub.

    Args:
        name: a folder or a hub id.
        subfolder: of it, where the config is.

    Raises:
        CheckpointError: it is a folder without a config, a path that does not exist, or not a valid hub id.
    """
    folder = Path(name)
    if name and folder.is_dir():
        if not (folder / subfolder / "config.json").is_file():
            found = sorted(entry.name for entry in folder.iterdir())[:10]
            raise CheckpointError(
                f"the folder {name!r} has no config.json (it holds {found}); expected a folder written by "
                "save_pretrained(). Check the path, or save the model and its config there first."
            )
        return True
    if _is_path(name):
        raise CheckpointError(
            f"there is no folder {name!r}; expected a folder written by save_pretrained() or the id of a model on the "
            "Hugging Face hub. Check the path."
        )
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise CheckpointError(
            f"{name!r} is no folder here and no possible id of a model on the Hugging Face hub; expected one of the two."
        ) from None
    return False


def check_model_name(name: str) -> None:
    """Refuse a name for which there is no model here and, as far as it answers, none on the hub.

    Raises:
        CheckpointError: naming it.
    """
    if name and Path(name).exists() and not Path(name).is_dir():
        raise CheckpointError(
            f"{name!r} is a file; expected the folder that holds the model's config.json and weights."
        )
    if check_folder(name) or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    missing = f"there is no folder {name!r} here, and the Hugging Face hub's model of that id is not in the cache"
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{missing}; HF_HUB_OFFLINE forbids to ask for it. Check the name, or go online.")
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder {name!r} here, and no model of that id on the Hugging Face hub that you may read. Check the "
            "name, or log in with `hf auth login`."
        ) from None
    except Exception as error:
        if _is_answer(error):
            return  # the download will give a better message
        raise CheckpointError(
            f"{missing}; the hub cannot be reached ({error}). Check the name or the network."
        ) from error


def _is_path(name: str) -> bool:
    """Whether a name cannot be a hub id, which is NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


def _is_answer(error: Exception) -> bool:
    """Whether the hub answered with an error status."""
    return getattr(error, "response", None) is not None

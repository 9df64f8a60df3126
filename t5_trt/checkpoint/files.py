"""The files of a checkpoint: checks them, and reads the shapes of embeddings before the model is loaded."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from t5_trt.errors import CheckpointError

_READ = {".json", ".safetensors", ".bin", ".model", ".txt"}
#: the embedding shared by both stacks
EMBEDDING = "shared.weight"
#: every tensor with one row per token, the embedding first
TABLES = (EMBEDDING, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


def check_files(folder: Path) -> None:
    """Refuse a folder with pipes or devices among its files: reading one may never end.

    Raises:
        CheckpointError: it has such a file.
    """
    for path in folder.iterdir():
        if path.suffix in _READ and path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{str(path)!r} is a pipe, a socket or a device; expected an ordinary file.")


def check_indexes(name_or_path: str, config: Any, variant: str | None = None, **hub_arguments: Any) -> None:
    """Refuse a checkpoint whose config or weight index names files outside of its folder.

    Args:
        name_or_path: hub id or folder.
        config: of the model.
        variant: of the weights, as in ``model.safetensors.index.fp16.json``.
        hub_arguments: see `t5_trt.checkpoint.load.HUB_ARGUMENTS`.

    Raises:
        CheckpointError: one of them does.
    """
    folder = Path(name_or_path) / hub_arguments.get("subfolder", "")
    if folder.is_dir():
        check_files(folder)  # the config may come from elsewhere
    chosen = getattr(config, "transformers_weights", None)
    if chosen is not None and not _is_name(chosen):
        raise CheckpointError(
            f"the config of {name_or_path!r} names the weights {chosen!r}; expected the name of a file beside it. Do not use "
            "this checkpoint."
        )
    names = [SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME]
    names += [_with_variant(name, variant) for name in names if variant]
    for name in (*names, *([chosen] if chosen is not None and chosen.endswith(".json") else [])):
        if (path := _find(name_or_path, name, hub_arguments)) is not None:
            shards_of(Path(path))


def _is_name(value: Any) -> bool:
    """Whether a value is a plain file name."""
    return isinstance(value, str) and Path(value).name == value and "\\" not in value and value not in ("", "..")


def shards_of(index: Path) -> dict[str, str]:
    """Tensor -> file name, from the index of a checkpoint in several files.

    Raises:
        CheckpointError: it is not a valid index, or names files elsewhere.
    """
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name) for name in shards.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the index {str(index)!r} cannot be read ({type(error).__name__}: {error}); expected JSON with a weight_map. "
            "Download or save the checkpoint again."
        ) from error
    outside = sorted(name for name in names if not _is_name(name))
    if outside:
        raise CheckpointError(
            f"the index {str(index)!r} names {outside[0]!r}; expected names of files beside it. Do not use this checkpoint."
        )
    return shards  # type: ignore[no-any-return]


def correct_vocabulary(
    name_or_path: str, config: Any, variant: str | None = None, *, encoder_only: bool = False, **hub_arguments: Any
) -> None:
    """Set the config's vocab_size to the number of rows of the embedding, read from a safetensors header.

    Some published configs disagree with their weights (sonoisa's say 32128 or 32000, the tokenizer 32100); the matrix decides.

    Args:
        name_or_path: hub id or folder.
        config: of the model.
        variant: of the weights.
        encoder_only: decoder and output matrix are not loaded.
        hub_arguments: see `t5_trt.checkpoint.load.HUB_ARGUMENTS`.

    Raises:
        CheckpointError: the file is damaged, embeddings and output matrix have different shapes, or those of a ``.bin`` file not
            the config's.
    """
    keys = TABLES[:2] if encoder_only else TABLES
    paths = _files_of(keys, name_or_path, variant, hub_arguments)
    try:
        shapes = {key: shape for path in paths for key, shape in _shapes_in(path, keys)}
    except Exception as error:  # of safetensors, pickle, torch and the system, which share no base class
        raise CheckpointError(weights_message(name_or_path, error)) from error
    first = next((key for key in keys if key in shapes), None)
    if first is None:
        return
    if paths[0].endswith(".safetensors"):
        config.vocab_size = shapes[first][0]
    expected = (config.vocab_size, config.d_model)
    for key, shape in shapes.items():
        if shape != expected:
            raise CheckpointError(
                f"{key} of {name_or_path!r} has shape {shape}; expected {expected}, the config's vocab_size and d_model"
                f"{'' if key == first else f', as {first} has'}. Engines look up and score one vocabulary: check that config.json and "
                "the weights belong together."
            )


def _files_of(
    keys: tuple[str, ...], name_or_path: str, variant: str | None, hub_arguments: dict[str, Any]
) -> list[str]:
    """The files with the tensors `keys` among those that Transformers would load."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        for place in (variant, None) if variant else (None,):
            path = _find(name_or_path, _with_variant(single, place), hub_arguments)
            if path is not None:
                return [path]
            path = _find(name_or_path, _with_variant(index, place), hub_arguments)
            if path is not None:
                shards = shards_of(Path(path))
                names = sorted({shards[key] for key in keys if key in shards})
                return [found for name in names if (found := _find(name_or_path, name, hub_arguments))]
    return []


def _shapes_in(path: str, keys: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes of the tensors `keys` in one file, without reading the tensors."""
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as tensors:
            for key in set(keys).intersection(tensors.keys()):
                yield key, tuple(tensors.get_slice(key).get_shape())
        return
    stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    for key in keys:
        if key in stored:
            yield key, tuple(stored[key].shape)


def _with_variant(name: str, variant: str | None) -> str:
    """As Transformers names files: model.safetensors of variant fp16 is model.fp16.safetensors."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _find(name_or_path: str, filename: str, hub_arguments: dict[str, Any]) -> str | None:
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        path: str | None = cached_file(name_or_path, filename, **hub_arguments, **quiet)
    except OSError:  # loading the weights gives the better message
        return None
    return path


def weights_message(name_or_path: str, error: Exception) -> str:
    """The error message for weights that cannot be loaded: why, and what is expected."""
    return (
        f"cannot load the weights of {name_or_path!r}: {type(error).__name__}: {error} Expected model.safetensors (or its "
        "shards, or pytorch_model.bin) beside config.json, complete. Download or save the checkpoint again."
    )

"""A Hugging Face ``from_pretrained`` that keeps its report, and optionally accepts missing or mismatched tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Loading:
    """The loader that `t5_trt.checkpoint.load.load_checked` calls.

    Args:
        load: a Hugging Face ``from_pretrained``.
        ignore_mismatched_sizes: leave tensors whose shapes do not fit the config newly initialised, with Transformers' warning.
        reports: the caller gets the report, so missing tensors are accepted and newly initialised.

    Attributes:
        info: Transformers' dictionary about the last loading: missing, unexpected and mismatched keys.
    """

    def __init__(self, load: Callable[..., Any], *, ignore_mismatched_sizes: bool, reports: bool) -> None:
        self.info: dict[str, Any] = {}
        passing = {"mismatched_keys": ignore_mismatched_sizes, "missing_keys": reports}
        self._load, self._passing = load, [name for name, passes in passing.items() if passes]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Load the model; return it with the part of the report that can be an error."""
        model, self.info = self._load(*args, **kwargs)
        return model, self.info | {name: set() for name in self._passing}

"""Values that are kept for keys, as many as were used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def keep(known: OrderedDict[K, V], key: K, most: int, make: Callable[[], V]) -> V:
    """The value of a key, which is made if it is not there; of more than `most` values the least recently used ones go."""
    if key not in known:
        known[key] = make()
    known.move_to_end(key)
    while len(known) > most:
        known.popitem(last=False)
    return known[key]

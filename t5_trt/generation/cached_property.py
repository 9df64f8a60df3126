"""`functools.cached_property` as Python 3.12 has it: without a lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class cached_property(Generic[T]):  # noqa: N801 - a decorator, named as Python's
    """A property that is computed at its first use and kept in the object's ``__dict__``.

    Two threads that use it first at the same time may both compute it. Python 3.10 and 3.11 hold a lock instead, one for all
    objects of the class, and a process that is forked while a thread holds it waits for it for ever
    (https://docs.python.org/3/library/functools.html#functools.cached_property).
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> cached_property[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> cached_property[T] | T:
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.compute(instance)
        return value

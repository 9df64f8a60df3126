"""Which class an instance gets: ours, or one derived from it, combined with the stock class of the config's family."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar, cast

from t5_trt.architecture import check_family

Self = TypeVar("Self", bound="FamilyClass")


class FamilyClass:
    """The part of `t5_trt.engine_model.EngineModel` that chooses classes."""

    _families: dict[str, Any]  # model_type -> the class that combines a subclass of this one with a stock class
    _stock_class: Any
    _encoder_only = False
    _combines: type
    config: Any

    def __new__(cls: type[Self], config: Any = None, *args: Any, **kwargs: Any) -> Self:
        """Make an instance of the class that combines this one with the config's stock class."""
        chosen = cls if "_stock_class" in cls.__dict__ or config is None else cls._class_for(config)
        return super().__new__(chosen)

    @classmethod
    def _class_for(cls: type[Self], config: Any) -> type[Self]:
        family = cls._families[check_family(config, encoder_only=cls._encoder_only)]
        if issubclass(cls, family) or issubclass(family, cls):
            return cast("type[Self]", cls if issubclass(cls, family) else family)
        return cast("type[Self]", _combined(cls, family))  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Of a user's subclass, name that class: the one that combines it with a family is made again."""
        if "_combines" not in type(self).__dict__:
            return super().__reduce_ex__(protocol)
        state = cast("Any", self).__getstate__()  # which Python 3.10 does not know of every object
        return _blank, (type(self)._combines, self.config), state


@cache
def _combined(cls: type, family: type) -> type:
    """A user's subclass of ours, together with the class of a family."""
    said = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, family), {**said, "_stock_class": family._stock_class, "_combines": cls})  # type: ignore[attr-defined]


def _blank(cls: type, config: Any) -> Any:
    """An instance of a user's subclass without anything in it, for unpickling."""
    return cls.__new__(cls, config)

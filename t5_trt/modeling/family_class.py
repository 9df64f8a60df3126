"""Which class an instance gets: ours, or one derived from it, combined with the stock class of the config's family."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from t5_trt.checkpoint.families import check_family

Self = TypeVar("Self", bound="FamilyClass")


class FamilyClass:
    """The part of `t5_trt.modeling.base.EngineModel` that chooses classes."""

    _families: dict[str, Any]  # model_type -> the class that combines a subclass of this one with a Hugging Face class
    _stock_class: Any = None
    _encoder_class: Any  # the encoder-only class of the same family
    _encoder_only = False
    _combines: type
    config_class: Any
    if TYPE_CHECKING:
        config: Any  # Transformers would take an annotation for the config's class

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Set `config_class`: the Hugging Face class's, or none for a class of all families."""
        cls.config_class = None if cls._stock_class is None else cls._stock_class.config_class
        super().__init_subclass__(**kwargs)
        if cls._stock_class is None:
            cls.config_class = _NoConfigClass()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: Transformers does not let what it takes for custom code initialise single tensors of its own modules."""
        return False

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


class _NoConfigClass:
    """`config_class` of a class that takes several: as if there were none, so that Auto classes register it for each of them."""

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(
            f"{owner.__name__} has no config_class: it takes a T5Config, an MT5Config or a UMT5Config."
        )


@cache
def _combined(cls: type, family: type) -> type:
    """A user's subclass of ours, together with the class of a family."""
    said = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, family), {**said, "_stock_class": family._stock_class, "_combines": cls})  # type: ignore[attr-defined]


def _blank(cls: type, config: Any) -> Any:
    """An instance of a user's subclass without anything in it, for unpickling."""
    return cls.__new__(cls, config)

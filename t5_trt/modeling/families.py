"""Chooses the class of an instance: a public class (or a subclass) combined with the Hugging Face class of the config's family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from transformers import (
    MT5EncoderModel,
    MT5ForConditionalGeneration,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5EncoderModel,
    UMT5ForConditionalGeneration,
)

from t5_trt.checkpoint.families import check_family

Self = TypeVar("Self", bound="FamilyClass")


@dataclass(frozen=True)
class Family:
    """The Hugging Face classes of one family.

    Attributes:
        whole: with encoder and decoder.
        encoder: without a decoder.
    """

    whole: Any
    encoder: Any


#: model_type -> family
FAMILIES = {
    "t5": Family(T5ForConditionalGeneration, T5EncoderModel),
    "mt5": Family(MT5ForConditionalGeneration, MT5EncoderModel),
    "umt5": Family(UMT5ForConditionalGeneration, UMT5EncoderModel),
}


def encoder_class(config: Any) -> Any:
    """The Hugging Face class of encoder-only models with this config.

    Raises:
        UnsupportedModelError: the config is of another family.
    """
    return FAMILIES[check_family(config, encoder_only=True)].encoder


class FamilyClass:
    """The part of `t5_trt.modeling.base.EngineModel` that chooses classes."""

    _hf_class: Any = None  # None for a class of all families
    _encoder_only = False
    config_class: Any
    if TYPE_CHECKING:
        config: Any  # Transformers would read an annotation as the config's class

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Set `config_class`: the Hugging Face class's, or none for a class of all families."""
        cls.config_class = None if cls._hf_class is None else cls._hf_class.config_class
        super().__init_subclass__(**kwargs)
        if cls._hf_class is None:
            cls.config_class = _NoConfigClass()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: Transformers does not let custom code initialise single tensors of its own modules."""
        return False

    def __new__(cls: type[Self], config: Any = None, *args: Any, **kwargs: Any) -> Self:
        """Make an instance of the class that combines this one with the config's Hugging Face class."""
        chosen = cls if config is None or "_hf_class" in cls.__dict__ else cls._class_for(config)
        return super().__new__(chosen)

    @classmethod
    def _class_for(cls: type[Self], config: Any) -> type[Self]:
        family = FAMILIES[check_family(config, encoder_only=cls._encoder_only)]
        hf_class = family.encoder if cls._encoder_only else family.whole
        combined = cls._hf_class is not None and issubclass(cls, hf_class)
        return cast("type[Self]", cls if combined else family_class(cls, hf_class))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the public class by name; unpickling combines it with the family's class again."""
        state = cast("Any", self).__getstate__()  # Python 3.10 does not define it for every object
        return _blank, (type(self).__dict__.get("_combines", type(self)), self.config), state


class _NoConfigClass:
    """`config_class` of a class for several configs: it behaves as missing, so that Auto classes register the class for each of them."""

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(
            f"{owner.__name__} has no config_class: it takes a T5Config, an MT5Config or a UMT5Config."
        )


_made: dict[tuple[type, Any], type] = {}


def family_class(cls: Any, hf_class: Any) -> Any:
    """The class that combines one of ours, or a user's subclass of it, with the Hugging Face class of a family.

    Args:
        cls: of all families.
        hf_class: of one.
    """
    if (cls, hf_class) not in _made:
        own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _made[cls, hf_class] = type(cls.__name__, (cls, hf_class), {**own, "_hf_class": hf_class, "_combines": cls})
    return _made[cls, hf_class]


def named_family_class(cls: Any, hf_class: Any, name: str) -> Any:
    """`family_class` of a public class, under a name that diffusers' pipelines can look up in our module."""
    made = family_class(cls, hf_class)
    made.__name__ = made.__qualname__ = name
    made.__doc__ = f"`{cls.__name__}` of a {hf_class.config_class.__name__}; also an instance of `{hf_class.__name__}`."
    made._is_public = True
    return made


def _blank(cls: Any, config: Any) -> Any:
    """An empty instance, for unpickling."""
    return cls.__new__(cls, config)

"""The errors that t5_trt raises on purpose. Every message says what was got, what was expected and what to do.

Each kind also derives from the built-in exception that Hugging Face code would see in the same place, so existing
``except OSError`` around ``from_pretrained`` or ``except ValueError`` around ``generate`` keeps working.
"""

from __future__ import annotations

from collections.abc import Iterator


class T5TRTError(Exception):
    """Base of every error raised by t5_trt."""


class InputError(T5TRTError, ValueError):
    """An argument or a tensor given to the model has a value, shape or dtype that it cannot run."""


class CheckpointError(T5TRTError, OSError):
    """A checkpoint is missing, incomplete or damaged, or its weights do not fit its config."""


class UnsupportedModelError(T5TRTError, ValueError):
    """The checkpoint is of a model family, or uses an option, that t5_trt has no graph for."""


class BackendError(T5TRTError, RuntimeError):
    """A backend (TensorRT, ONNX Runtime) is missing, unusable on this machine, or failed while running."""


class StrictModeError(T5TRTError, RuntimeError):
    """``strict=True`` and the request would have needed the Hugging Face model or a new engine."""


class QueueFullError(T5TRTError, RuntimeError):
    """The queue of waiting requests is full; try again later, or elsewhere."""


class RequestCancelledError(T5TRTError):
    """The request was cancelled before its end."""


class RequestTimeoutError(T5TRTError, TimeoutError):
    """The request did not end within its timeout."""


class EngineClosedError(T5TRTError, RuntimeError):
    """The engine accepts no more requests, or was closed before the end of this one."""


def raise_hidden_interrupt(error: BaseException) -> None:
    """Raise the KeyboardInterrupt that an error is or came out of, if there is one; else do nothing.

    Ctrl-C at the wrong moment makes clean-up in Python's library or in torch fail: a file is closed twice, a stack is empty. That
    error would hide it.
    """
    interrupt = next((cause for cause in causes(error) if isinstance(cause, KeyboardInterrupt)), None)
    try:
        if interrupt is not None:
            raise interrupt from None
    finally:  # else the error and this frame keep each other, and all that the error's frames hold
        del interrupt, error


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, the one that was being handled when it was raised, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__context__

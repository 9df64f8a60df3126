"""The engine: requests of any length and settings share the decoder steps of one model, and join and leave between them."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from t5_trt.errors import BackendError, EngineClosedError, InputError
from t5_trt.modeling import TRTT5ForConditionalGeneration
from t5_trt.runtime.row_buffers import RowSession
from t5_trt.serving.handle import Handle, Job
from t5_trt.serving.scheduler import Scheduler
from t5_trt.serving.settings import SettingsReader
from t5_trt.serving.stats import Stats
from t5_trt.validation import check_length, check_mask, check_token_ids


class Engine:
    """Runs requests of one model, each in a row of its own, from any number of threads and event loops.

    Requests take free rows in the order in which they came. Every row has its own position, source, end and settings, and gets the tokens
    that ``generate()`` alone would give it. Requests with beams or several results run in ``generate()``, in a second thread: those that
    wait and have equal settings in one batch. The model's weights must stay as they are while the engine is open; ``model.generate()``
    can be used beside it.

        with Engine(model) as engine:
            handle = engine.submit(tokenizer("some text"), max_new_tokens=32)
            tokens = handle.result()  # await handle.result(), for token in handle, async for token in handle

    Args:
        model: on ONNX Runtime, or on a GPU where the library's kernels do the decoder step: with ``backend="cuda"``, or
            ``backend="tensorrt"`` and ``decode="kernels"``. The first `Engine` of a model waits there until kernels are compiled. With
            TensorRT, requests may wait for encoder engines of new sizes; ``building="background"`` avoids that.
        max_rows: requests that decode at a time; also the rows (requests times beams or results) of a batch in ``generate()``.
        max_waiting: requests that may wait for a row; more are refused.

    Raises:
        BackendError: what does the model's decoder step has no rows at positions of their own.
        InputError: an argument has no meaning.
    """

    def __init__(self, model: TRTT5ForConditionalGeneration, *, max_rows: int = 16, max_waiting: int = 256) -> None:
        if not isinstance(model, TRTT5ForConditionalGeneration):
            raise InputError(f"Engine got {type(model).__name__}; expected a TRTT5ForConditionalGeneration.")
        for name, value in (("max_rows", max_rows), ("max_waiting", max_waiting)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} got {value!r}; expected a positive number.")
        session = model.session
        reason = session.rows_refusal() if isinstance(session, RowSession) else "it has no rows"
        if reason is not None:
            raise BackendError(f"Engine got a model on the backend {session.backend!r}: {reason}.")
        assert isinstance(session, RowSession)
        self._model, self._arch = model, session.arch
        self._reader, self._reading = SettingsReader(model), threading.Lock()
        self._scheduler = Scheduler(model, session, max_rows, max_waiting)
        self._process = os.getpid()
        weakref.finalize(self, self._scheduler.stop).atexit = False

    def submit(
        self,
        inputs: Any,
        generation_config: Any = None,
        *,
        seed: int | None = None,
        timeout: float | None = None,
        **settings: Any,
    ) -> Handle:
        """Give the engine one request; this does not wait.

        Args:
            inputs: token ids of one source: a list, a tensor [S] or [1, S]; or what a tokenizer returns for one text, with
                ``input_ids`` and ``attention_mask``.
            generation_config: a ``GenerationConfig``; None for the model's.
            seed: of sampling: the tokens are those of ``torch.manual_seed(seed); model.generate(...)``. None draws others each time.
            timeout: seconds until the request ends with `t5_trt.errors.RequestTimeoutError`; None sets no limit.
            settings: of ``generate()``, by the names of ``GenerationConfig``; they override `generation_config`.

        Returns:
            The request; dropping it cancels the request.

        Raises:
            QueueFullError: the queue is full.
            EngineClosedError: after `close`.
            InputError: the inputs or a setting cannot be served.
            ValueError: Transformers refuses a setting.
        """
        if self._process != os.getpid():
            raise EngineClosedError(
                "the engine was made in another process; its threads do not exist here. Make another."
            )
        self._scheduler.check_open()
        if timeout is not None and not timeout > 0:
            raise InputError(f"timeout got {timeout!r}; expected a positive number of seconds.")
        ids, mask = self._source(inputs)
        with self._reading:
            prepared = self._reader.read(generation_config, settings)
        job = Job(ids, mask, prepared, seed, timeout)
        handle = Handle(job)
        self._scheduler.submit(job)
        return handle

    def check_open(self) -> None:
        """Check that a request can be queued now: `submit` does it, too, but a request that is refused need not be tokenized.

        Raises:
            QueueFullError: the queue is full; the request counts as refused.
            EngineClosedError: after `close`.
        """
        self._scheduler.check_open()

    def stats(self) -> Stats:
        """Counts of waiting, running and ended requests."""
        return self._scheduler.stats()

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: after `close`, or because its rows could not be made again after an error."""
        return self._scheduler.closed

    def close(self, grace: float = 0.0) -> None:
        """Accept no more requests, let the accepted ones run for a while, and end the rest with `EngineClosedError`.

        Args:
            grace: time in seconds for accepted requests.
        """
        self._scheduler.close(grace)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _source(self, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of one source, int64 [1, S] each."""
        mask = None
        if isinstance(inputs, Mapping):
            if "input_ids" not in inputs:
                raise InputError(f"inputs got {', '.join(map(str, inputs))}; expected input_ids and attention_mask.")
            inputs, mask = inputs["input_ids"], inputs.get("attention_mask")
        home = torch.device("cpu")  # batches of sources go to a GPU, and nobody waits for one to check ids
        ids = check_token_ids("inputs", _as_row("inputs", inputs), self._arch.vocab_size, home)
        if len(ids) != 1:
            raise InputError(f"inputs got {len(ids)} sources; expected one. Submit each by itself.")
        limit = self._model.runtime_config.max_source_tokens
        check_length("source", ids.shape[1], limit, self._arch.longest_source)
        mask = None if mask is None else _as_row("attention_mask", mask)
        return ids, check_mask("attention_mask", mask, 1, ids.shape[1], home)


def _as_row(name: str, given: Any) -> torch.Tensor:
    """A list or tensor [S] or [1, S] as [rows, S]."""
    try:
        # NumPy reads a list in a tenth of the time
        row = torch.from_numpy(np.array(given)) if isinstance(given, list) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} got {type(given).__name__}; expected token ids of one source: {error}") from error
    return row[None] if row.dim() == 1 else row

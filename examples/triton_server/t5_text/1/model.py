"""T5 in Triton's Python backend: TEXT to RESULT, whole or in pieces, one engine in each model instance.

Triton starts this file in a process of its own; the README two folders up has the commands.
"""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from pydantic import ValidationError
from transformers import AutoTokenizer

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.errors import RequestCancelledError
from t5_trt.serving.http.answer import Answer
from t5_trt.serving.http.failures import as_request_error, invalid
from t5_trt.serving.http.generate import GenerateBody, results, settings_at_fault, submitted
from t5_trt.serving.http.limits import Limits
from t5_trt.serving.http.record import Record
from t5_trt.serving.http.service import Service

#: seconds between two looks whether a client has left
LOOK_S = 0.02
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
#: statuses of HTTP as Triton's kinds of errors; others are internal
KINDS = {
    400: pb_utils.TritonError.INVALID_ARG,
    429: pb_utils.TritonError.UNAVAILABLE,
    503: pb_utils.TritonError.UNAVAILABLE,
    504: pb_utils.TritonError.UNAVAILABLE,
}


class TritonPythonModel:
    """One instance: one model on one GPU, or on the CPU. All of its requests share the rows of one engine."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model and fill its rows once, so that the server is ready only when they are."""
        config = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in config["parameters"].items()}
        beside = Path(args["model_repository"]) / settings["model"]
        name = str(beside) if beside.is_dir() else settings["model"]
        if args["model_instance_kind"] == "GPU":
            where: dict[str, Any] = {"device": f"cuda:{args['model_instance_device_id']}"}
        else:
            where = {"backend": "onnxruntime", "num_threads": int(settings["num_threads"])}
        model = TRTT5ForConditionalGeneration.from_pretrained(
            name, engine_cache_dir=settings["engine_cache_dir"] or None, **where
        )
        limits = Limits(
            source_tokens=int(settings["max_source_tokens"]),
            new_tokens=int(settings["max_new_tokens"]),
            results=int(settings["max_results"]),
            seconds=float(settings["timeout"]),
        )
        rows = {size: int(settings[size]) for size in ("max_rows", "max_waiting")}
        self.service = Service(model, AutoTokenizer.from_pretrained(name), "t5_text", limits, **rows)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="t5_text answers", daemon=True)
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self.service.warm_up(), self.loop).result()

    def execute(self, requests: list[Any]) -> None:
        """Take requests; each is answered by its own sender, when its answer is there."""
        for request in requests:
            sender = request.get_response_sender()
            inputs = [pb_utils.get_input_tensor_by_name(request, name) for name in ("TEXT", "STREAM", "SETTINGS")]
            values = [None if tensor is None else tensor.as_numpy().reshape(-1)[0] for tensor in inputs]
            asyncio.run_coroutine_threadsafe(self._answer(sender, *values), self.loop)

    def finalize(self) -> None:
        """End the engine: requests that run get an error."""
        asyncio.run_coroutine_threadsafe(self.service.close(0), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    async def _answer(self, sender: Any, text: Any, stream: Any, settings: Any) -> None:
        record = Record("infer")
        watching = asyncio.ensure_future(_watch(sender, record))
        try:
            (handle,) = submitted(_body(text, stream, settings), self.service, record)
            with settings_at_fault():
                if stream:
                    async for piece in Answer(handle, self.service.decoder).pieces():
                        sender.send(_success([piece]))
                    sender.send(flags=FINAL)
                else:
                    sender.send(_success((await results(handle, self.service))[0]), flags=FINAL)
        except Exception as error:
            sender.send(_failure(error), flags=FINAL)
        finally:
            watching.cancel()


async def _watch(sender: Any, record: Record) -> None:
    """End what runs for a client that has left."""
    while not sender.is_cancelled():
        await asyncio.sleep(LOOK_S)
    for handle in record.handles:
        handle.cancel()


def _body(text: Any, stream: Any, settings: Any) -> GenerateBody:
    """The request in the form of ``/generate``."""
    try:
        named = json.loads(settings) if settings else {}
        if not isinstance(named, dict):
            raise invalid("SETTINGS got other JSON than an object.")
        return GenerateBody.model_validate({**named, "text": bytes(text).decode("utf-8"), "stream": bool(stream)})
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        raise invalid(f"SETTINGS: {'.'.join(map(str, found['loc']))[:60]}: {found['msg']}") from None
    except UnicodeDecodeError:
        raise invalid("TEXT or SETTINGS is not UTF-8.") from None
    except json.JSONDecodeError:
        raise invalid("SETTINGS is no JSON.") from None


def _success(texts: list[str]) -> Any:
    encoded = np.array([text.encode("utf-8") for text in texts], dtype=np.object_)
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("RESULT", encoded)])


def _failure(error: Exception) -> Any:
    """What a client is told; of an error that nobody expected the server's log has more."""
    if isinstance(error, RequestCancelledError):
        told = pb_utils.TritonError("cancelled: the client has left.", pb_utils.TritonError.CANCELLED)
    else:
        failure = as_request_error(error)
        if failure.status == 500:
            pb_utils.Logger.log_error(f"t5_text failed: {error!r}")
        kind = KINDS.get(failure.status, pb_utils.TritonError.INTERNAL)
        told = pb_utils.TritonError(f"{failure.reason}: {failure}", kind)
    return pb_utils.InferenceResponse(output_tensors=[], error=told)

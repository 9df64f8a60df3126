"""T5 in Triton's Python backend: TEXT to RESULT, one string each, settings from ``config.pbtxt``.

Triton starts this file in a process of its own; the README two folders up has the commands.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from transformers import AutoTokenizer

from t5_trt import TRTT5ForConditionalGeneration, generate_many


class TritonPythonModel:
    """One instance: one model on one GPU, or on the CPU."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model and open its engines, so that the server is ready only when they are."""
        config = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.batch_size = max(int(config["max_batch_size"]), 1)
        self.max_source_tokens = int(settings["max_source_tokens"])
        self.arguments = {name: int(settings[name]) for name in ("num_beams", "max_new_tokens")}
        beside = Path(args["model_repository"]) / settings["model"]
        model = str(beside) if beside.is_dir() else settings["model"]
        if args["model_instance_kind"] == "GPU":
            where: dict[str, Any] = {"device": f"cuda:{args['model_instance_device_id']}"}
        else:
            where = {"backend": "onnxruntime", "num_threads": int(settings["num_threads"])}
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = TRTT5ForConditionalGeneration.from_pretrained(
            model, engine_cache_dir=settings["engine_cache_dir"] or None, **where
        )
        self._generate(["a"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests of a dynamic batch with one run of `generate_many`; a bad one fails alone."""
        texts: list[str] = []
        answers: list[slice | str] = []  # a request's results, or what is wrong with it
        for request in requests:
            found, problem = self._read(request)
            answers.append(problem or slice(len(texts), len(texts) + len(found)))
            texts += found
        try:
            results = self._generate(texts) if texts else []
        except Exception as error:
            # clients get no paths and no stack; the server's log does
            pb_utils.Logger.log_error(f"t5_text failed: {error!r}")
            return [_failure("internal error") for _ in requests]
        return [_failure(place) if isinstance(place, str) else _success(results[place]) for place in answers]

    def _read(self, request: Any) -> tuple[list[str], str]:
        raw = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy().reshape(-1)
        try:
            texts = [bytes(text).decode("utf-8") for text in raw]
        except UnicodeDecodeError:
            return [], "TEXT is not UTF-8"
        for text in texts:
            tokens = len(self.tokenizer(text)["input_ids"])
            if tokens > self.max_source_tokens:
                return [], f"TEXT got {tokens} tokens; expected at most {self.max_source_tokens}"
        return texts, ""

    def _generate(self, texts: list[str]) -> list[str]:
        options = {"batch_size": self.batch_size, "show_progress": False, **self.arguments}
        return list(generate_many(self.model, self.tokenizer, texts, **options))


def _success(results: list[str]) -> Any:
    encoded = np.array([[result.encode("utf-8")] for result in results], dtype=np.object_)
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("RESULT", encoded)])


def _failure(message: str) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))

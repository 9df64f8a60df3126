"""``t5-trt serve``: a model behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from t5_trt.cli.arguments import Backend, Decode, Model, Precision, number
from t5_trt.errors import InputError


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 is every one of this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="of the model for clients; default: the hub id, or the folder's name"),
    ] = None,
    backend: Backend = "auto",
    precision: Precision = "auto",
    decode: Decode = "auto",
    max_rows: Annotated[int, typer.Option(min=1, help="requests that decode at a time")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="requests that may wait; more are refused")] = 256,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="of a request")] = 256_000,
    max_source_tokens: Annotated[int, typer.Option(min=1, help="of a text")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of a result")] = 512,
    max_results: Annotated[int, typer.Option(min=1, help="of a request: texts times n, texts, beams")] = 16,
    timeout: Annotated[float, number("seconds of a request", least=0.001)] = 60.0,
    grace: Annotated[float, number("seconds that running requests have after SIGTERM or Ctrl-C", least=0)] = 30.0,
) -> None:
    """Serve a model: /v1/completions for OpenAI's clients, /generate, /health/live, /health/ready, /metrics.

    Requests share decoder steps. Logs are one line of JSON a request, without texts. There is no login and no TLS.
    """
    from t5_trt.checkpoint.model_names import check_model_name

    check_model_name(model)
    try:
        from t5_trt.serving.http import logs, server
        from t5_trt.serving.http.limits import Limits
        from t5_trt.serving.http.service import Service
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs {error.name}, which is not installed: `pip install t5-trt[serve]`.") from error
    from t5_trt.checkpoint.load import load_tokenizer
    from t5_trt.modeling import TRTT5ForConditionalGeneration

    with server.bound_socket(host, port) as listener:
        tokenizer = load_tokenizer(model)
        loaded = TRTT5ForConditionalGeneration.from_pretrained(
            model, backend=backend, precision=precision, decode=decode
        )
        service = Service(
            loaded,
            tokenizer,
            name or (Path(model).resolve().name if Path(model).is_dir() else model),
            Limits(max_body_bytes, max_source_tokens, max_new_tokens, max_results, timeout),
            max_rows=max_rows,
            max_waiting=max_waiting,
        )
        logs.install()
        server.serve(service, listener, grace)

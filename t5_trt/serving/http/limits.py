"""What a request may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one request.

    Attributes:
        body_bytes: of its body.
        source_tokens: of each text, as the tokenizer counts.
        new_tokens: of each result.
        results: of a completion: texts times ``n``; of ``/generate``: texts, and beams or results of a text.
        seconds: for its body to arrive, and as many again for its answer, waiting included.
    """

    body_bytes: int = 256_000
    source_tokens: int = 512
    new_tokens: int = 512
    results: int = 16
    seconds: float = 60.0

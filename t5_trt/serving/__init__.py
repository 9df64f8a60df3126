"""Serving: requests of any length and settings share one model's decoder steps, and join and leave between them."""

from __future__ import annotations

from t5_trt.serving.engine import Engine
from t5_trt.serving.handle import Handle
from t5_trt.serving.stats import Stats

__all__ = ["Engine", "Handle", "Stats"]

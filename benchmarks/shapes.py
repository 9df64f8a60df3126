"""Models with published shapes and random weights, as scripts of this folder and tests name them: no download."""

from __future__ import annotations

from t5_trt.benchmarking import SHAPES, SOURCE_SEED, environment, random_source, random_t5

__all__ = ["SHAPES", "SOURCE_SEED", "environment", "random_source", "random_t5"]

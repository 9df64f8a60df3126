"""Plans of TensorRT for RTX, which builds engines on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t5_trt import BuildConfig
from t5_trt.engine.provider import EngineProvider
from t5_trt.engine.store import EngineStore

CAPABILITIES = ("8.6", "8.9", "12.0")


def provider(
    model: Any, folder: Path, precision: str, settings: BuildConfig | None = None, **options: Any
) -> EngineProvider:
    return EngineProvider(
        model.architecture,
        EngineStore(folder),
        settings or BuildConfig(),
        precision=precision,
        flavor="rtx",
        gpu={"compute_capabilities": CAPABILITIES},
        compute_capabilities=CAPABILITIES,
        **options,
    )

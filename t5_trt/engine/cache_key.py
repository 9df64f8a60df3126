"""The cache key of an engine: graph revision, architecture, shapes, build settings, TensorRT and GPU."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from t5_trt.graph.signature import GRAPH_REVISION


def engine_key(facts: Mapping[str, Any]) -> str:
    """The key of an engine: a digest of everything that its bytes depend on.

    Args:
        facts: JSON values: graph, architecture, shapes, precision, build settings, flavour, version, GPU.
    """
    text = json.dumps({"graph_revision": GRAPH_REVISION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]

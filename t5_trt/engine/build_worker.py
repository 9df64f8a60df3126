"""The build process: compiles one ONNX file to a plan and reports its progress as JSON lines on stdout.

A separate process can be stopped at any moment (TensorRT 8 cannot be interrupted), releases all GPU memory when it ends, and
allows parallel builds. Run as ``python -m t5_trt.engine.build_worker '<job as JSON>'``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

from t5_trt.engine.tensorrt_api import BuildJob, load_tensorrt
from t5_trt.errors import T5TRTError


def tell(kind: str, **content: Any) -> None:
    """Write one line for the parent; it is the only output of this process."""
    sys.__stdout__.write(json.dumps({"kind": kind, **content}) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell("log", level=record.levelno, message=record.getMessage())


def _end_with_parent(parent: int) -> None:
    """End this process when its parent is gone: a killed parent cannot stop its children."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> int:
    """Build, and return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    package_logger = logging.getLogger("t5_trt")
    package_logger.addHandler(_Forward())
    package_logger.setLevel(logging.INFO)
    package_logger.propagate = False

    def report(phase: str, step: int, steps: int) -> bool:
        tell("progress", phase=phase, step=step, steps=steps)
        return True

    try:
        job = BuildJob.from_json(sys.argv[1])
        load_tensorrt(job.flavor).compile(job, report)
    except T5TRTError as error:
        tell("error", type=type(error).__name__, message=str(error))
        return 1
    except Exception as error:
        tell("error", type="BackendError", message=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

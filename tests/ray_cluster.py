"""A Ray cluster of this machine for tests, and the examples as modules that its workers get."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import psutil
import pytest

from tests.conftest import ROOT

# read when ray is imported; the token keeps Ray from writing one into the home folder
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_TOKEN=secrets.token_hex(32))
# on a machine with other work, workers of low priority do not start in the time that the proxy is given
os.environ.update(RAY_worker_niceness="0", RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60")
ray = pytest.importorskip("ray", reason="ray is not installed: pip install 't5-trt[ray]'")


def example(name: str) -> ModuleType:
    """A script of examples/ as a module that Ray sends to its workers, as it does with a script that is run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)
    return module


@contextmanager
def local_cluster() -> Iterator[str]:
    """A cluster of two CPUs; gives its address."""
    folder = tempfile.mkdtemp(prefix="ray")  # short, for the names of sockets
    memory = {"object_store_memory": 100_000_000, "_temp_dir": folder}
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("PYTHONWARNINGS")  # Ray's own processes use what is deprecated
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, **memory)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def processes(name: str) -> list[psutil.Process]:
    """Those that this one has started, by the begin of their names."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(name):
                found.append(process)
        except psutil.Error:
            continue
    return found

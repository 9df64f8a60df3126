"""What pyproject.toml declares agrees with what README.md offers, what messages advise, and what CI runs."""

from __future__ import annotations

import re
import sys
from importlib.metadata import metadata, requires

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from audit.dependencies import EXTRAS
from t5_trt.installation import cuda_version, install_command
from tests.conftest import ROOT

DECLARED = [Requirement(line) for line in requires("t5-trt") or ()]


def brought_by(extra: str) -> dict[str, SpecifierSet]:
    """The packages that an extra adds and their versions; extras of extras are resolved when the wheel is built."""
    optional = [need for need in DECLARED if need.marker is not None and not need.marker.evaluate({"extra": ""})]
    return {need.name: need.specifier for need in optional if need.marker and need.marker.evaluate({"extra": extra})}


@pytest.mark.parametrize("cuda", [12, 13])
@pytest.mark.parametrize(
    ("part", "main"), [("tensorrt", "tensorrt-cu{}"), ("rtx", "tensorrt-rtx-cu{}"), ("kernels", None)]
)
def test_advised_extras_bring_packages_of_one_cuda(
    monkeypatch: pytest.MonkeyPatch, cuda: int, part: str, main: str | None
) -> None:
    """TensorRT, and what the library's own kernels need."""
    monkeypatch.setattr(torch.version, "cuda", f"{cuda}.2")
    advised = re.search(r"t5-trt\[(.+)\]", install_command(part))
    assert advised
    brought = brought_by(advised[1])
    bindings = brought.pop("cuda-bindings")
    assert bindings.contains(f"{cuda}.9.9") and not bindings.contains(f"{25 - cuda}.9.9")
    nvrtc = {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}[cuda]
    assert set(brought) == {nvrtc} | ({main.format(cuda)} if main else set())
    assert brought[nvrtc].contains(f"{cuda}.9.9")


@pytest.mark.parametrize(
    ("built_for", "expected"), [(None, 13), ("11.8", 12), ("12.6", 12), ("13.2", 13), ("14.0", 13)]
)
def test_cuda_of_the_installed_pytorch(monkeypatch: pytest.MonkeyPatch, built_for: str | None, expected: int) -> None:
    monkeypatch.setattr(torch.version, "cuda", built_for)
    assert cuda_version() == expected


def test_cuda_where_pytorch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cuda_version() == 13


def test_short_names_are_for_pytorch_of_the_index() -> None:
    assert brought_by("tensorrt") == brought_by("cu13") and brought_by("rtx") == brought_by("rtx-cu13")
    assert brought_by("cu13")


@pytest.mark.parametrize("name", ["README.md", "README.ja.md", "docs/index.md", "docs/dependencies.md"])
def test_documents_name_extras_that_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = {extra for group in re.findall(r"(?:t5-trt|\.|\.whl)\[([\w,-]+)\]", text) for extra in group.split(",")}
    assert named <= {*EXTRAS, "dev"}
    if name.startswith("README"):
        assert {"cu12", "cu13", "rtx-cu12", "rtx-cu13"} <= named


def test_all_extras_are_audited() -> None:
    assert set(metadata("t5-trt").get_all("Provides-Extra") or ()) == {*EXTRAS, "dev"}


def test_ci_runs_the_oldest_versions_that_are_allowed() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = {line.split("==")[0]: Version(line.split("==")[1]) for line in lines if not line.startswith("#")}
    allowed = {need.name: need.specifier for need in DECLARED if need.name in pinned}
    assert set(allowed) == set(pinned) >= {"torch", "transformers", "onnxruntime", "sentencepiece", "protobuf"}
    for name, version in pinned.items():
        (lowest,) = (Version(bound.version) for bound in allowed[name] if bound.operator == ">=")
        assert version.release[: len(lowest.release)] == lowest.release, name


def test_every_dependency_has_its_reason() -> None:
    """A row in docs/dependencies.md, for each that is declared but the tools of developers."""
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    names = {need.name for need in DECLARED if 'extra == "dev"' not in str(need.marker)}
    assert {name for name in names if f"`{name}`" not in rows} == set()
    for considered in ("pycuda", "cuda-python", "onnx", "polygraphy", "tensorrt"):
        assert f"`{considered}`" in rows

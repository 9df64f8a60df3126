"""Every kernel compiles for every GPU that it is written for, without a GPU: NVRTC needs none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt.engine.store import EngineStore
from t5_trt.errors import BackendError
from t5_trt.graph.architecture import Architecture
from t5_trt.kernels import compile as compiler
from t5_trt.kernels.compile import compile_cubin, stored_cubin
from t5_trt.kernels.decode_step import KERNELS, attention_warps, constants, has_shared_attention, refusal
from t5_trt.runtime.cuda_kernels import LARGE_SPAN, LARGE_WARPS, MOST_BEAMS, MOST_CANDIDATES, SPAN, WARPS
from tests.kernels.compiled import BASE, GATED, HUGE, LARGE, ODD, WIDE, usage


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("rows", [1, 32, 64, 128])
def test_kernels_compile_without_spills(architecture: str, rows: int) -> None:
    major = int(architecture.removeprefix("sm_")) // 10
    cubin, log = compile_cubin("decode_step.cu", constants(BASE, torch.float16, rows, major), architecture)
    assert cubin[:4] == b"\x7fELF"
    used = usage(log)
    assert set(used) == {*KERNELS, "attend_shared"}
    assert {name: spilled for name, (_, spilled) in used.items() if spilled} == {}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("arch", [WIDE, LARGE, HUGE], ids=["t5-3b", "flan-t5-xl", "t5-v1.1-xxl"])
def test_large_models_compile_without_spills(arch: Architecture, rows: int, architecture: str) -> None:
    major = int(architecture.removeprefix("sm_")) // 10
    used = usage(compile_cubin("decode_step.cu", constants(arch, torch.float16, rows, major), architecture)[1])
    assert {name: spilled for name, (_, spilled) in used.items() if spilled} == {}


@pytest.mark.parametrize("rows", [1, 8, 32, 64, 128])
@pytest.mark.parametrize("arch", [BASE, WIDE, LARGE], ids=["t5-base", "t5-3b", "flan-t5-xl"])
def test_kernels_with_8_bit_weights_compile_without_spills(arch: Architecture, rows: int) -> None:
    used = usage(compile_cubin("decode_step.cu", constants(arch, torch.float16, rows, 9, int8=True), "sm_90")[1])
    assert set(used) == set(KERNELS)
    assert {name: spilled for name, (_, spilled) in used.items() if spilled} == {}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120"])
def test_kernels_with_8_bit_weights_compile_for_other_gpus(architecture: str) -> None:
    major = int(architecture.removeprefix("sm_")) // 10
    for rows in (1, 32):
        wanted = constants(BASE, torch.float16, rows, major, int8=True)
        used = usage(compile_cubin("decode_step.cu", wanted, architecture)[1])
        assert {name: spilled for name, (_, spilled) in used.items() if spilled} == {}


@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_attention_by_few_warps_compiles_without_spills(architecture: str, warps: int) -> None:
    """The other numbers of warps are those of 1 and 128 rows."""
    assert [attention_warps(rows) for rows in (1, 32, 64, 128)] == [8, 8, 4, 4] and attention_warps(128, 4) == 8
    wanted = constants(BASE, torch.float16, 1) | {"ATTENTION_WARPS": warps}
    used = usage(compile_cubin("decode_step.cu", wanted, architecture)[1])
    assert used["attend_self"][1] == used["attend_cross"][1] == 0


@pytest.mark.parametrize(
    ("arch", "dtype", "rows"),
    [
        (GATED, torch.bfloat16, 32),
        (WIDE, torch.float16, 8),
        (LARGE, torch.bfloat16, 128),
        (replace(LARGE, d_model=1280, gated=False), torch.float16, 32),
        (GATED, torch.bfloat16, 64),
        (WIDE, torch.float16, 128),
        (ODD, torch.float16, 9),
        (ODD, torch.float16, 40),
        (ODD, torch.float32, 16),
        (BASE, torch.float32, 1),
        (replace(BASE, d_kv=8), torch.float16, 128),
        (replace(BASE, d_kv=128), torch.float32, 128),
    ],
)
def test_other_models_compile(arch: Architecture, dtype: torch.dtype, rows: int) -> None:
    assert refusal(arch, dtype) is None
    wanted = constants(arch, dtype, rows, 9)
    _, log = compile_cubin("decode_step.cu", wanted, "sm_90")
    assert set(usage(log)) == {*KERNELS, *(["attend_shared"] if has_shared_attention(wanted) else [])}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("token_step", {}),
        ("reorder_rows", {"BEAMS": 4}),
        ("beam_candidates", {"SPAN": SPAN, "WARPS": WARPS, "CANDIDATES": 8}),
        ("beam_candidates", {"SPAN": LARGE_SPAN, "WARPS": LARGE_WARPS, "CANDIDATES": MOST_CANDIDATES}),
        ("beam_step", {"BEAMS": 4, "CANDIDATES": 8, "SPANS": 8}),
        ("beam_step", {"BEAMS": 4, "CANDIDATES": 8, "SPANS": 0}),
        ("beam_step", {"BEAMS": MOST_BEAMS, "CANDIDATES": MOST_CANDIDATES, "SPANS": 16}),
    ],
)
def test_kernels_of_choices_compile(name: str, options: dict[str, int], architecture: str) -> None:
    """Without spills, but for the most beams, whose rows are too many for registers."""
    _, log = compile_cubin(f"{name}.cu", options, architecture)
    used = usage(log)
    assert set(used) == {name} and (used[name][1] == 0 or options["BEAMS"] == MOST_BEAMS)


def test_rows_of_a_wide_model_fit_into_shared_memory() -> None:
    for size, tiles in ((768, 4), (1024, 4), (1280, 2), (2048, 2), (4096, 1)):
        assert constants(replace(BASE, d_model=size), torch.float16, 32)["HEAD_ROW_TILES"] == tiles
    for size, tiles in ((768, 4), (2048, 4), (4096, 2)):
        assert constants(replace(BASE, d_model=size), torch.float16, 32, 9)["HEAD_ROW_TILES"] == tiles
    for size, tiles in ((768, 16), (1024, 8), (2048, 4), (4096, 2)):
        assert constants(replace(BASE, d_model=size), torch.float16, 128, 9)["HEAD_ROW_TILES"] == tiles


def test_size_without_kernels_is_named() -> None:
    assert "d_kv is 20" in str(refusal(replace(BASE, d_kv=20), torch.float16))
    assert "d_kv is 256" in str(refusal(replace(BASE, d_kv=256), torch.float16))


def test_second_process_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, wanted = EngineStore(tmp_path / "store"), constants(ODD, torch.float16, 1)
    first = stored_cubin("decode_step.cu", wanted, "sm_80", store)

    def never(*_: Any) -> Any:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiler, "compile_cubin", never)
    assert stored_cubin("decode_step.cu", wanted, "sm_80", store) == first
    with pytest.raises(AssertionError, match="compiled again"):  # another GPU is another key
        stored_cubin("decode_step.cu", wanted, "sm_86", store)


def test_store_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "store").write_text("a file where the folder would be")
    cubin = stored_cubin("token_step.cu", {}, "sm_90", EngineStore(tmp_path / "store"))
    assert cubin[:4] == b"\x7fELF" and "not kept for the next process" in caplog.text


def test_refused_source_gives_the_compiler_s_words() -> None:
    with pytest.raises(BackendError, match=r"sm_90 .*NOT_A_NUMBER"):
        compile_cubin("decode_step.cu", constants(BASE, torch.float16, 1) | {"E": "NOT_A_NUMBER"}, "sm_90")  # type: ignore[dict-item]

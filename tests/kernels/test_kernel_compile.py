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
from t5_trt.kernels.decode_step import KERNELS, constants, has_tile_attention, refusal
from t5_trt.kernels.division import NOT_SPLIT, PROCESSORS, divide_attention, shared_memory
from t5_trt.runtime.cuda_kernels import LARGE_SPAN, LARGE_WARPS, MOST_BEAMS, MOST_CANDIDATES, SPAN, WARPS
from tests.kernels.compiled import BASE, GATED, HUGE, LARGE, LETS_START, LOAD, ODD, WAITS, WIDE, operations, usage

#: (GPU, rows, warps and CTAs of attention, on which no other kernel depends). GPUs of one major number share their instructions
#: and registers, so their numbers of rows add up
BUILDS = [
    ("sm_80", 1, 8, 2), ("sm_80", 64, 1, 12), ("sm_86", 32, 2, 10), ("sm_89", 128, 4, 6),
    ("sm_90a", 1, 8, 2), ("sm_90a", 32, 4, 5), ("sm_90a", 64, 2, 12), ("sm_90a", 128, 4, 6),
    ("sm_100", 32, 4, 5), ("sm_100", 128, 4, 6),
    ("sm_120", 1, 2, 12), ("sm_120", 32, 8, 2), ("sm_120", 64, 1, 12), ("sm_120", 128, 4, 6),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "rows", "warps", "ctas"), BUILDS)
def test_kernels_compile_without_spills(architecture: str, rows: int, warps: int, ctas: int) -> None:
    major = int(architecture.strip("sm_a")) // 10
    wanted = constants(BASE, torch.float16, rows, major) | {"ATTENTION_WARPS": warps, "ATTENTION_CTAS": ctas}
    cubin, log = compile_cubin("decode_step.cu", wanted, architecture)
    assert cubin[:4] == b"\x7fELF"
    used = usage(log)
    assert set(used) == {*KERNELS, "attend_shared"}
    assert {name: spilled for name, (_, spilled) in used.items() if spilled} == {}


@pytest.mark.parametrize(
    ("d_kv", "architecture", "warps", "ctas"),
    [(32, "sm_80", 2, 12), (32, "sm_90a", 8, 4), (128, "sm_90a", 4, 4), (128, "sm_120", 8, 2)],
)
def test_attention_of_other_widths_compiles_without_spills(d_kv: int, architecture: str, warps: int, ctas: int) -> None:
    """d_kv of 32 is for attention.cuh, as in float32; 128 for tile_attention.cuh."""
    arch = replace(BASE, d_kv=d_kv)
    wanted = constants(arch, torch.float16, 32, int(architecture.strip("sm_a")) // 10)
    _, log = compile_cubin("decode_step.cu", wanted | {"ATTENTION_WARPS": warps, "ATTENTION_CTAS": ctas}, architecture)
    used = usage(log)
    assert ("attend_shared" in used) == (d_kv == 128)
    assert {name: spilled for name, (_, spilled) in used.items() if spilled and name.startswith("attend")} == {}


@pytest.mark.parametrize("rows", [1, 32])
def test_weights_are_loaded_before_the_wait(rows: int) -> None:
    """The compiler may move loads behind it, which costs half a microsecond a kernel. With few rows the next kernel starts first."""
    wanted = constants(BASE, torch.float16, rows, 9)
    cubin, _ = compile_cubin("decode_step.cu", wanted, "sm_90a")
    loads_of_a_lane = {  # k tiles of a warp, and tiles of outputs
        "project_qkv": 3 * wanted["QKV_TILES"],
        "add_attention": 3 * wanted["ADD_TILES"],
        "project_query": 3 * wanted["QUERY_TILES"],
        "feed_forward_in": 3 * wanted["IN_TILES"],
        "feed_forward_out": 12 * wanted["ADD_TILES"],
    }
    for kernel, count in loads_of_a_lane.items():
        made = operations(cubin, kernel)
        wait, start = made.index(WAITS), made.index(LETS_START)
        loads = [place for place, operation in enumerate(made[:wait]) if operation == LOAD]
        assert len(loads) == count, kernel
        assert start < loads[0] if rows == 1 else start > loads[-1], kernel


def test_most_addresses_are_distances_in_instructions() -> None:
    """Made anew, each in 64 bits, they took half as many instructions again: 849, 719 and 256 with 32 rows."""
    cubin, _ = compile_cubin("decode_step.cu", constants(BASE, torch.float16, 32, 9), "sm_90a")
    for kernel, most in {"project_qkv": 650, "feed_forward_in": 520, "add_attention": 230}.items():
        assert len(operations(cubin, kernel)) < most, kernel


def test_ctas_share_k_where_clusters_have_room_and_k_whole_parts() -> None:

    def chosen(arch: Architecture, rows: int, capability: int = 9, dtype: torch.dtype = torch.float16, *, int8: bool = False) -> tuple[int, ...]:  # fmt: skip
        made = constants(arch, dtype, rows, capability, int8=int8)
        return tuple(made[name] for name in NOT_SPLIT)

    whole = tuple(NOT_SPLIT.values())
    assert chosen(BASE, 128) == (0, 4, 8, 4)
    assert [chosen(WIDE, rows)[:2] for rows in (16, 24, 32, 64)] == [(4, 3), (3, 3), (4, 3), (3, 3)]
    assert chosen(WIDE, 32, int8=True)[:2] == (3, 3)
    assert [chosen(replace(WIDE, d_ff=4096, num_heads=8), rows)[:2] for rows in (16, 32)] == [(0, 4), (0, 3)]
    assert chosen(WIDE, 1, int8=True) == chosen(WIDE, 8) == (0, 5, 1, 8)
    assert chosen(WIDE, 1) == chosen(BASE, 32) == chosen(LARGE, 32) == whole
    assert chosen(replace(BASE, d_ff=3080), 128) == whole  # parts of k would end within a k tile
    assert chosen(WIDE, 32, 8) == chosen(WIDE, 32, 10) == chosen(WIDE, 32, dtype=torch.float32) == whole
    for arch in (BASE, WIDE, replace(WIDE, d_ff=4096)):
        for rows in range(1, 513):
            *tiles, row_tiles, ctas = chosen(arch, rows)
            for wide in filter(None, tiles):
                clusters = -(-arch.d_model // (16 * wide)) * -(-rows // (8 * row_tiles))
                assert clusters * ctas <= 120 or rows > 128, (rows, wide)  # those that an H200 runs at once


@pytest.mark.parametrize("tiled", [False, True])
def test_attention_has_all_heads_at_work_at_once_if_they_fit(tiled: bool) -> None:
    """What is chosen is among what compiles without spills above, or has fewer CTAs."""
    compiled = {(warps, ctas) for _, _, warps, ctas in BUILDS} | ({(8, 4)} if not tiled else set())

    def chosen(heads: int, *, wide: bool) -> tuple[int, int]:
        made = divide_attention(heads, 9, wide=wide, tiled=tiled)
        return made["ATTENTION_WARPS"], made["ATTENTION_CTAS"]

    for heads in range(1, 3000):
        warps, ctas = chosen(heads, wide=False)
        assert heads <= PROCESSORS * ctas or heads > PROCESSORS * 12
        assert any(warps == other and ctas <= most for other, most in compiled)
    few = (4, 5) if tiled else (8, 4)
    expected = [(8, 2), few, (4, 5), (4, 6), (2, 10), (2, 12), (2, 12)]
    assert [chosen(12 * rows, wide=False) for rows in (1, 32, 48, 64, 96, 128, 256)] == expected
    expected = [(8, 2), (8, 2), (4, 4), (4, 4), (4, 4)] if tiled else [(8, 2), (8, 2), (4, 5), (4, 6), (4, 6)]
    assert [chosen(32 * rows, wide=True) for rows in (1, 8, 16, 32, 128)] == expected


def test_products_have_multiprocessors_to_themselves() -> None:
    """No two of their CTAs fit on one, if there are enough multiprocessors, and on GPUs whose CTAs may take so much."""
    of_a_processor, of_a_cta = 228 * 1024, 227 * 1024  # compute capability 9.0 and 10.0, CUDA C++ Programming Guide
    for needed in (0, 40 * 1024, 98 * 1024, 200 * 1024):
        for capability in (9, 10):
            assert of_a_cta >= shared_memory(needed, 132, capability, 132) > of_a_processor // 2
            assert shared_memory(needed, 133, capability, 132) == needed
        assert shared_memory(needed, 1, 8, 108) == shared_memory(needed, 1, 12, 170) == needed


@pytest.mark.parametrize(
    ("arch", "rows", "architecture"),
    [
        (WIDE, 1, "sm_80"), (WIDE, 8, "sm_90a"), (WIDE, 16, "sm_90a"), (WIDE, 32, "sm_90a"), (WIDE, 64, "sm_90a"), (LARGE, 1, "sm_90a"), (LARGE, 32, "sm_80"), (HUGE, 1, "sm_80"), (HUGE, 32, "sm_90a"),
    ],
    ids=lambda value: f"d_model-{value.d_model}" if isinstance(value, Architecture) else str(value),
)  # fmt: skip
def test_large_models_compile_without_spills(arch: Architecture, rows: int, architecture: str) -> None:
    major = int(architecture.strip("sm_a")) // 10
    used = usage(compile_cubin("decode_step.cu", constants(arch, torch.float16, rows, major), architecture)[1])
    assert {name: spilled for name, (_, spilled) in used.items() if spilled} == {}


@pytest.mark.parametrize(
    ("arch", "rows", "architecture"),
    [
        (BASE, 1, "sm_90a"), (BASE, 32, "sm_80"), (BASE, 128, "sm_90a"), (BASE, 32, "sm_120"), (WIDE, 1, "sm_90a"), (WIDE, 32, "sm_90a"),
        (LARGE, 8, "sm_90a"), (LARGE, 64, "sm_90a"),
    ],
    ids=lambda value: f"d_model-{value.d_model}" if isinstance(value, Architecture) else str(value),
)  # fmt: skip
def test_kernels_with_8_bit_weights_compile_without_spills(arch: Architecture, rows: int, architecture: str) -> None:
    major = int(architecture.strip("sm_a")) // 10
    used = usage(
        compile_cubin("decode_step.cu", constants(arch, torch.float16, rows, major, int8=True), architecture)[1]
    )
    assert {name: spilled for name, (_, spilled) in used.items() if spilled} == {}


@pytest.mark.parametrize(
    ("arch", "dtype", "rows"),
    [
        (LARGE, torch.bfloat16, 128),
        (replace(LARGE, d_model=1280, gated=False), torch.float16, 32),
        (GATED, torch.bfloat16, 64),
        (WIDE, torch.float16, 128),
        (ODD, torch.float16, 9),
        (ODD, torch.float32, 16),
        (BASE, torch.float32, 1),
        (replace(BASE, d_kv=8), torch.float16, 128),
        (replace(BASE, d_kv=128), torch.float32, 128),
    ],
)
def test_other_models_compile(arch: Architecture, dtype: torch.dtype, rows: int) -> None:
    assert refusal(arch, dtype) is None
    wanted = constants(arch, dtype, rows, 9)
    _, log = compile_cubin("decode_step.cu", wanted, "sm_90a")
    assert set(usage(log)) == {*KERNELS, *(["attend_shared"] if has_tile_attention(wanted) else [])}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("token_step", {}),
        ("edit_scores", {}),
        ("choose_tokens", {}),
        ("reorder_rows", {"BEAMS": 4}),
        ("beam_candidates", {"SPAN": SPAN, "WARPS": WARPS, "CANDIDATES": 8}),
        ("beam_candidates", {"SPAN": LARGE_SPAN, "WARPS": LARGE_WARPS, "CANDIDATES": MOST_CANDIDATES}),
        ("beam_step", {"BEAMS": 4, "CANDIDATES": 8, "SPANS": 8}),
        ("beam_step", {"BEAMS": 4, "CANDIDATES": 8, "SPANS": 0}),
        ("beam_step", {"BEAMS": MOST_BEAMS, "CANDIDATES": MOST_CANDIDATES, "SPANS": 16}),
    ],
)
def test_token_selection_kernels_compile(name: str, options: dict[str, int], architecture: str) -> None:
    """Without spills, but for the most beams, whose rows are too many for registers."""
    _, log = compile_cubin(f"{name}.cu", options, architecture)
    used = usage(log)
    assert set(used) == {name} and (used[name][1] == 0 or options["BEAMS"] == MOST_BEAMS)


def test_each_processor_has_a_cta_and_few_have_two() -> None:
    names = ("ROW_TILES", "QKV_TILES", "QUERY_TILES", "QUERY_ROW_TILES", "ADD_TILES", "ADD_ROW_TILES", "WARPGROUPS")

    def chosen(arch: Architecture, rows: int, capability: int = 9) -> tuple[int, ...]:
        wanted = constants(arch, torch.float16, rows, capability)
        return tuple(wanted[name] for name in names)

    assert [chosen(BASE, rows) for rows in (1, 16, 32, 64, 128)] == [
        (1, 2, 2, 1, 1, 1, 0),
        (2, 4, 1, 2, 1, 2, 0),
        (4, 2, 1, 2, 1, 2, 0),
        (2, 4, 2, 2, 2, 2, 4),
        (4, 4, 2, 4, 2, 2, 8),
    ]
    large = replace(BASE, d_model=1024, num_heads=16, d_ff=4096)
    assert [chosen(large, rows) for rows in (4, 8, 32, 64, 128)] == [
        (1, 1, 2, 1, 1, 1, 0),
        (1, 3, 2, 1, 1, 1, 0),
        (4, 2, 1, 4, 1, 4, 0),
        (4, 4, 1, 4, 1, 4, 4),
        (4, 4, 2, 4, 2, 4, 8),
    ]
    assert chosen(WIDE, 64)[-1] == 8  # enough CTAs with 64 rows each
    assert chosen(BASE, 64, 10) == (2, 2, 2, 2, 2, 2, 0)
    assert chosen(BASE, 128, 8) == (4, 2, 1, 4, 1, 4, 0)  # other GPUs were not measured


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
def test_half_of_the_processors_are_left_to_feed_forward_out(rows: int, int8: bool) -> None:
    """Or more, so that it loads its weights while feed_forward_in runs; no more tiles than registers hold."""
    large = replace(BASE, d_model=1024, num_heads=16, d_ff=4096)

    def tiles_of_a_cta(arch: Architecture) -> int:
        return constants(arch, torch.float16, rows, 9, int8=int8)["IN_TILES"]

    ctas = [
        -(-arch.d_ff // (16 * tiles_of_a_cta(arch))) for arch in (BASE, large, replace(BASE, d_ff=2048, gated=True))
    ]
    assert ctas == ([64, 64, 64] if int8 else [48, 64, 43])  # float16 has at least four tiles, or three of gate and up
    assert tiles_of_a_cta(replace(BASE, d_model=512, d_ff=1024, gated=True)) == (1 if int8 else 2)  # 32 CTAs
    assert tiles_of_a_cta(GATED) == 3  # 4 k tiles a part, and gate and up
    assert tiles_of_a_cta(HUGE) == 1
    assert [constants(large, torch.float16, rows, 9, int8=int8)["IN_TILES"] for rows in (16, 17, 32)] == (
        [4, 2, 2] if int8 else [4, 3, 3]
    )


def test_ctas_make_many_tiles_one_after_the_other() -> None:
    def chosen(arch: Architecture, rows: int, capability: int = 9) -> tuple[int, int, int]:
        wanted = constants(arch, torch.float16, rows, capability)
        return wanted["STREAMED"], wanted["QKV_TILES"], wanted["IN_TILES"]

    def together(arch: Architecture, rows: int, *, int8: bool = False) -> tuple[int, int]:
        wanted = constants(arch, torch.float16, rows, 9, int8=int8)
        return wanted["QKV_TOGETHER"], wanted["IN_TOGETHER"]

    assert [chosen(WIDE, rows) for rows in (1, 32)] == [(1, 6, 8)] * 2
    assert [together(WIDE, rows) for rows in (1, 16, 32)] == [(3, 4), (3, 4), (2, 2)]
    assert [together(WIDE, rows, int8=True) for rows in (1, 16)] == [(6, 8), (2, 2)]
    assert together(LARGE, 8) == (1, 1)
    assert chosen(LARGE, 8) == (1, 3, 3)
    assert chosen(replace(WIDE, num_heads=128, d_ff=65536), 1) == (1, 8, 8)  # T5-11B, in several rounds
    assert [chosen(arch, 8)[0] for arch in (BASE, GATED, HUGE)] == [0, 0, 0]
    assert [chosen(WIDE, rows, capability)[0] for rows, capability in ((64, 9), (1, 8))] == [0, 0]


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


def test_store_that_cannot_be_written_causes_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "store").write_text("a file where the folder would be")
    cubin = stored_cubin("token_step.cu", {}, "sm_90a", EngineStore(tmp_path / "store"))
    assert cubin[:4] == b"\x7fELF" and "not kept for the next process" in caplog.text


def test_compile_error_contains_the_compilers_message() -> None:
    with pytest.raises(BackendError, match=r"sm_90a .*NOT_A_NUMBER"):
        compile_cubin("decode_step.cu", constants(BASE, torch.float16, 1) | {"E": "NOT_A_NUMBER"}, "sm_90a")  # type: ignore[dict-item]

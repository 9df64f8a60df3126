"""The attention kernels on a CPU, thread by thread: equal bits for every number of warps or rows, and what float64 gives."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import kernels
from t5_trt.kernels import reference
from t5_trt.kernels.decode_step import CHUNK, STORAGE
from tests.kernels.queries import pack_query

HEADS = 2
WARPS = (1, 2, 4, 8)
#: what stands for the instructions that the kernels write as assembly
INSTRUCTIONS = {
    "cvt.f32.f16": "wide = half_to_float(value);",
    "cvt.rn.f16x2.f32": "both = float_to_half(low) | float_to_half(high) << 16;",
    "cvt.rn.bf16x2.f32": "both = float_to_bfloat16(low) | float_to_bfloat16(high) << 16;",
    "mad.wide.u32": "there = base + (unsigned long long)count * size;",
    "ex2.approx.ftz.f32": "result = exp2f(x);",
    "ld.global.L1::no_allocate": "value = *(const uint4*)from;",
    "ld.global.nc": "",
    "ld.global.cg": "",
    "griddepcontrol": "",
}
PROGRAM = """
#include "emulated_gpu.hpp"
constexpr int E = 16, H = %d, FF = 16, V = 16;
#define ROW_TILES 1
#define HEAD_ROW_TILES 1
#define GATED 0
#define ACTIVATION 0
namespace {  // shared memory of its own for each of the libraries
%s
}
static void** given;
template <class T> static T* memory(int i) { return (T*)given[i]; }
static int number(int i) { return *(int*)given[i]; }
constexpr int TOGETHER = 0;  // in place of a number of warps: attend_shared
extern "C" void run(int warps, int own, void** values, int rows, int chunks, int backwards)
{
    given = values;
    void (*kernel)() = nullptr;
    %s
    run_grid(H, rows, chunks, warps * 32, backwards, kernel);
}
"""
#: the tensor cores' product for a CPU
PRODUCT = """
static void multiply_tiles(float* c, const uint4& a, const uint2& b) { multiply_fragments(c, a, b, widen); }
"""
CALLS = """
    if (warps == WARPS) kernel = own && given[5]
        ? (void (*)())[] { FORM::attend_moved(memory<float>(0), memory<stored>(1), memory<stored>(2), memory<float>(3), memory<int>(4),
              memory<stored>(6), memory<float>(7), memory<int>(8), number(9), number(10), memory<unsigned char>(5), number(11), number(12)); }
        : own
        ? (void (*)())[] { FORM::attend_self(memory<float>(0), memory<stored>(1), memory<stored>(2), memory<float>(3), memory<int>(4),
              memory<stored>(6), memory<float>(7), memory<int>(8), number(9), number(10)); }
        : (void (*)())[] { FORM::attend_cross(memory<float>(0), memory<stored>(1), memory<stored>(2), memory<float>(3), memory<int>(4),
              memory<stored>(6), memory<float>(7), memory<int>(8), number(9), number(10), number(11)); };
"""
SHARED_CALL = """
    if (warps == TOGETHER) {
        warps = warps4::SHARED_WARPS;
        rows = rows / number(11) * ((number(11) + warps4::SHARERS - 1) / warps4::SHARERS);
        kernel = [] { warps4::attend_shared(memory<float>(0), memory<stored>(1), memory<stored>(2), memory<float>(3), memory<int>(4),
            memory<stored>(6), memory<float>(7), memory<int>(8), number(9), number(10), number(11)); };
    }
"""


def source(name: str) -> str:
    """A source of the kernels without assembly and without what is for its own file only."""

    def plain(found: re.Match[str]) -> str:
        words = found[1].split('"')[1]
        (meant,) = [code for word, code in INSTRUCTIONS.items() if words.startswith(word)]
        return meant

    text = (Path(kernels.__file__).parent / name).read_text()
    text = re.sub(r"asm(?: volatile)?\((.*?)\);", plain, text, flags=re.DOTALL)
    text = re.sub(r'#pragma once|#include "\w+.cuh"|extern __shared__.*|extern "C" __global__', "", text)
    return re.sub(r"#pragma unroll.*", "", text)


def variants(*names: str) -> str:
    """These sources for each number of warps."""
    text = "\n".join(map(source, names))
    forms = (
        f"#undef ATTENTION_WARPS\n#define ATTENTION_WARPS {warps}\nnamespace warps{warps} {{\n{text}\n}}\n#undef CROSS_CTAS\n"
        for warps in WARPS
    )
    return "".join(forms)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[torch.dtype, int], Any]:
    """All kernels for each type and d_kv, with every number of warps."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "these tests need a C++ compiler"
    folder = tmp_path_factory.mktemp("attention")
    shared = "\n".join(map(source, ("launch.cuh", "types.cuh", "common.cuh", "attention_chunks.cuh")))
    calls = "".join(CALLS.replace("FORM", f"warps{warps}").replace("WARPS", str(warps)) for warps in WARPS)
    lanes, tiles = (variants("attention_sums.cuh", "attention.cuh"), PRODUCT + variants("tile_attention.cuh"))
    (folder / "lanes.cpp").write_text(PROGRAM % (HEADS, shared + lanes, calls))
    (folder / "tiles.cpp").write_text(PROGRAM % (HEADS, shared + tiles, calls + SHARED_CALL))

    def build(shape: tuple[torch.dtype, int]) -> Any:
        dtype, size = shape
        program = "tiles.cpp" if shape in TILED else "lanes.cpp"
        library = folder / f"attention_{STORAGE[dtype]}_{size}.so"
        flags = ["-shared", "-fPIC", "-O1", "-std=c++17", "-w", "-ffp-contract=off", f"-I{Path(__file__).parent}"]
        defined = [f"-DSTORAGE={STORAGE[dtype]}", f"-DD={size}", "-DATTENTION_CTAS=4"]
        subprocess.run([compiler, *flags, *defined, "-o", library, folder / program], check=True)
        return ctypes.CDLL(str(library)).run

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SHAPES + TILED, pool.map(build, SHAPES + TILED), strict=True))


SHAPES = [(torch.float16, 40), (torch.float16, 8), (torch.float32, 128)]
TILED = [(torch.float16, 64), (torch.bfloat16, 128)]
TOGETHER = 0  # in place of a number of warps: attend_shared


@dataclass
class Request:
    """What both kernels read: rows at these positions, or sources of these lengths, in memory that is NaN behind them."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    last: torch.Tensor
    ancestors: torch.Tensor | None = None
    beams: int = 1

    def attended(self, run: Any, warps: int, *, own: bool, backwards: bool = False) -> torch.Tensor:
        """What a kernel gives, [rows, H * D]."""
        rows, heads, size = self.query.shape
        capacity, width = self.keys.shape[2], -(-heads * size // 16) * 16
        chunks = -(-capacity // CHUNK)
        query = torch.full((rows, width), float("nan"))
        tiled = (self.keys.dtype, size) in TILED
        query[:, : heads * size] = (pack_query(self.query, self.keys.dtype) if tiled else self.query).flatten(1)
        made = torch.full((-(-rows // 8) * 8, width), float("nan")).to(self.keys.dtype)
        parts, arrived = (
            torch.full((rows, heads, chunks, size + 2), float("nan")),
            torch.zeros(rows, heads, dtype=torch.int32),
        )
        memory = (query, self.keys, self.values, self.bias, self.last, self.ancestors, made, parts, arrived)
        stride = 0 if self.ancestors is None else self.ancestors.shape[1]
        numbers = [ctypes.c_int(number) for number in (capacity, self.bias.shape[1], self.beams, stride)]
        pointers = (ctypes.c_void_p * 13)(
            *(None if part is None else part.data_ptr() for part in memory), *map(ctypes.addressof, numbers)
        )
        run(warps, int(own), pointers, rows, chunks, int(backwards))
        assert not arrived.any(), "zeros before and after"
        if self.keys.dtype != torch.float32:
            made = made.view(-1, width // 16, 8, 16).transpose(1, 2).reshape(-1, width)
        return made[:rows, : heads * size]


def request(dtype: torch.dtype, size: int, counts: list[int], *, own: bool, beams: int = 1) -> Request:
    """Random keys and values, of which these many count in each row (or source)."""
    generator = torch.Generator().manual_seed(sum(counts) + size)
    capacity = max(*counts, 1) + 5
    keys, values = (torch.randn(len(counts), HEADS, capacity, size, generator=generator).to(dtype) for _ in range(2))
    for row, count in enumerate(counts):  # nothing behind may be read
        keys[row, :, count:] = values[row, :, count:] = float("nan")
    rows = len(counts) * (1 if own else beams)
    query = torch.randn(rows, HEADS, size, generator=generator)
    if own:
        bias, last = torch.randn(HEADS, 40, generator=generator), torch.tensor(counts) - 1
    else:
        bias, last = torch.randn(len(counts), capacity, generator=generator), torch.tensor(counts)
        bias[:, 1::3] = -1e30
    made = Request(query, keys, values, bias, last.int(), beams=beams)
    if own and beams > 1:
        made.ancestors = ancestors(counts, capacity, beams, generator)
    return made


def ancestors(counts: list[int], capacity: int, beams: int, generator: torch.Generator) -> torch.Tensor:
    """Any beam of an entry that has the token, its own where a row stands."""
    drawn = torch.randint(0, beams, (len(counts), capacity), generator=generator)
    for row, count in enumerate(counts):
        for place in range(capacity):
            if place >= min(count - 1, counts[row // beams * beams + int(drawn[row, place])]):
                drawn[row, place] = row % beams
    return drawn.byte()


def expected(made: Request, *, own: bool) -> torch.Tensor:
    query, keys, values, bias = (part.double() for part in (made.query, made.keys, made.values, made.bias))
    if not own:
        return reference.attend_cross(query, keys, values, bias, made.last, made.beams)
    if made.ancestors is not None:
        rows, places = torch.arange(len(query))[:, None], torch.arange(keys.shape[2])
        holders = rows // made.beams * made.beams + made.ancestors
        keys, values = (part.transpose(1, 2)[holders, places].transpose(1, 2) for part in (keys, values))
    return reference.attend_self(query, keys, values, bias, made.last)


#: largest relative error of results, in the type that they are stored in
ROUNDED = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
COUNTS = [1, 2, 5, 32, 33, 50, 64, 127, 128, 129, 300, 8]


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("own", [True, False], ids=["self", "cross"])
@pytest.mark.parametrize("shape", SHAPES + TILED, ids=lambda shape: f"{str(shape[0])[6:]}-{shape[1]}")
def test_bits_do_not_depend_on_the_number_of_warps(compiled: Any, shape: Any, own: bool, beams: int) -> None:
    made = request(*shape, COUNTS if own or beams == 1 else COUNTS[1::3], own=own, beams=beams)
    forms = WARPS if own or shape not in TILED else (*WARPS, TOGETHER)
    results = [made.attended(compiled[shape], form, own=own) for form in forms]
    wanted = expected(made, own=own)
    assert float((results[0].double() - wanted).norm() / wanted.norm()) < ROUNDED[shape[0]]
    results.append(made.attended(compiled[shape], 4, own=own, backwards=True))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("beams", [1, 3, 4, 6])
@pytest.mark.parametrize("shape", TILED, ids=lambda shape: f"{str(shape[0])[6:]}-{shape[1]}")
def test_shared_keys_give_what_float64_gives(compiled: Any, shape: Any, beams: int) -> None:
    made = request(*shape, COUNTS, own=False, beams=beams)
    result, wanted = made.attended(compiled[shape], TOGETHER, own=False), expected(made, own=False)
    rounded = 5e-4 if shape[0] == torch.float16 else 4e-3  # of the result, in the type that it is stored in
    assert float((result.double() - wanted).norm() / wanted.norm()) < rounded
    assert torch.equal(made.attended(compiled[shape], TOGETHER, own=False, backwards=True), result)


def test_bits_do_not_depend_on_rows_that_share_keys(compiled: Any) -> None:
    shape = TILED[0]
    made = request(*shape, [5, 50, 200], own=False, beams=6)
    together = made.attended(compiled[shape], TOGETHER, own=False)
    for row in range(len(made.query)):
        source = row // made.beams
        part = [each[source : source + 1].contiguous() for each in (made.keys, made.values, made.bias, made.last)]
        alone = Request(made.query[row : row + 1], *part)
        assert torch.equal(alone.attended(compiled[shape], TOGETHER, own=False)[0], together[row])


def test_large_queries_stay_finite(compiled: Any) -> None:
    """In float16, a query may be larger than float16's largest number; the best key then gets all of the weight."""
    shape = TILED[0]
    made = request(*shape, [20, 40], own=False)
    made.query *= 3e4
    assert float(made.query.abs().max()) > 65504
    result, wanted = made.attended(compiled[shape], TOGETHER, own=False), expected(made, own=False)
    assert float((result.double() - wanted).norm() / wanted.norm()) < 5e-4


FORMS = [((torch.float32, 128), warps) for warps in WARPS] + [(TILED[0], form) for form in (*WARPS, TOGETHER)]


@pytest.mark.parametrize(("shape", "form"), FORMS)
def test_source_without_keys_gives_zeros(compiled: Any, shape: Any, form: int) -> None:
    made = request(*shape, [0, 3], own=False)
    result = made.attended(compiled[shape], form, own=False)
    assert not result[0].any() and result[1].all()


@pytest.mark.parametrize(("shape", "form"), FORMS)
def test_source_that_is_hidden_gives_the_mean(compiled: Any, shape: Any, form: int) -> None:
    made = request(*shape, [5, 50, 200], own=False)
    made.bias.fill_(-1e30)
    result = made.attended(compiled[shape], form, own=False)
    means = torch.stack(
        [made.values[row, :, :count].double().mean(1).flatten() for row, count in enumerate((5, 50, 200))]
    )
    assert torch.allclose(result.double(), means, atol=1e-6 if shape[0] == torch.float32 else 1e-3)


@pytest.mark.parametrize("shape", SHAPES + TILED, ids=lambda shape: f"{str(shape[0])[6:]}-{shape[1]}")
def test_positions_of_a_sequence_get_the_bits_of_single_steps(compiled: Any, shape: Any) -> None:
    """Rows that are positions of three sequences read these sequences' caches, each up to its own position."""
    ends, count = [6, 40, 131], 5
    made = request(*shape, ends, own=True)
    generator = torch.Generator().manual_seed(1)
    sequence = torch.arange(len(ends)).repeat_interleave(count)
    last = torch.cat([torch.arange(end - count, end) for end in ends]).int()
    query = torch.randn(len(sequence), HEADS, shape[1], generator=generator)
    table = sequence.byte()[:, None].repeat(1, made.keys.shape[2] + 1)
    together = Request(query, made.keys, made.values, made.bias, last, table, beams=len(sequence))
    results = [together.attended(compiled[shape], warps, own=True) for warps in (4, 8)]
    for row, of in enumerate(sequence.tolist()):
        cache = slice(of, of + 1)
        alone = Request(
            query[row : row + 1], made.keys[cache].clone(), made.values[cache].clone(), made.bias, last[row : row + 1]
        )
        expected = alone.attended(compiled[shape], 4, own=True)[0]
        assert expected.isfinite().all() and all(torch.equal(result[row], expected) for result in results)

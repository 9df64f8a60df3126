"""The decoder's products against their references, in float16 and with 8-bit weights, on the CPU by emulated warps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.kernels import reference
from t5_trt.kernels.decode_step import PRODUCTS, has_tile_attention
from t5_trt.kernels.division import NOT_SPLIT
from t5_trt.kernels.step_memory import StepBuffers, padded, tiles
from t5_trt.kernels.weights import pack_gated, pack_head, pack_matrix, pack_stack, unpack_activations, unpack_matrix
from tests.kernels.compiled import ODD
from tests.kernels.queries import unpack_query
from tests.kernels.step_emulation import EmulatedStep

GATED = replace(ODD, d_model=72, d_ff=104, num_heads=3, d_kv=24, vocab_size=67, activation="gelu_new")
#: every warp has several k tiles, more than it holds
LONG = replace(ODD, d_model=16, d_ff=6200, num_heads=1, d_kv=16, vocab_size=20, activation="relu", gated=False)
#: what warp groups can multiply
GROUPED = replace(ODD, d_model=256, d_ff=72, num_heads=3, d_kv=24, vocab_size=67)
#: every part of k has whole k tiles
SPLIT = replace(ODD, d_model=256, d_ff=512, num_heads=4, d_kv=64, vocab_size=20, gated=False)
TOLERANCE = 2e-3
MOST_ROWS = 70


@dataclass
class Results:
    """What the kernels make for rows, in order: each without its padding."""

    made: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]


def matrices(arch: Architecture) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size, inner, wide = arch.d_model, arch.num_heads * arch.d_kv, (1 + arch.gated) * arch.d_ff
    shapes = {
        "qkv": (3 * inner, size), "self_out": (size, inner), "query": (inner, size), "wi": (wide, size), "wo": (size, arch.d_ff),
        "head": (arch.vocab_size, size),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in shapes.items()}


def packed(arch: Architecture, own: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    made = {name: pack_matrix(own[name], dtype) for name in ("self_out", "query", "wo")}
    wi = pack_gated(*own["wi"].chunk(2), dtype) if arch.gated else pack_matrix(own["wi"], dtype)
    return made | {"qkv": pack_stack(list(own["qkv"].chunk(3)), dtype), "wi": wi, "head": pack_head(own["head"], dtype)}


def run(arch: Architecture, kernels: EmulatedStep, rows: int, *, int8: bool) -> Results:
    """A layer without its attention, whose result is drawn, and the output matrix."""
    generator, heads, width = torch.Generator().manual_seed(2), arch.num_heads, arch.d_kv
    inner, weights = heads * width, packed(arch, matrices(arch), torch.int8 if int8 else torch.float16)
    m = {name: unpack_matrix(pack_matrix(matrix, torch.int8), *matrix.shape) if int8 else matrix.half() for name, matrix in matrices(arch).items()}  # fmt: skip
    m = {name: matrix.double() for name, matrix in m.items()}
    b = StepBuffers.allocate(arch, torch.float16, rows, 1, torch.device("cpu"), int8=int8)
    table = torch.randn((arch.vocab_size, arch.d_model), generator=generator).half()
    tokens = torch.randint(0, arch.vocab_size, (MOST_ROWS,), generator=generator, dtype=torch.int32)[:rows].clone()
    attended = torch.randn((MOST_ROWS, inner), generator=generator).half()[:rows]
    capacity, position = 4, (torch.arange(rows) % 4).int()
    cache = torch.full((2, rows, heads, capacity, width), torch.nan, dtype=torch.float16)
    logits = torch.full((rows, arch.vocab_size), torch.nan)
    b.best.zero_()
    halves = kernels.constants["WARPGROUPS"] > 0
    put(b.attended, attended, int8=int8, halves=halves)
    sizes = {"model": arch.d_model, "inner": inner, "hidden": arch.d_ff}
    count = {name: padded(size, int8=int8) // 16 for name, size in sizes.items()}
    outputs = dict(zip(PRODUCTS, (3 * count["inner"], count["model"], count["inner"], count["hidden"], count["model"], tiles(arch.vocab_size)), strict=True))  # fmt: skip
    scales, other = b.scales

    def start(name: str, *arguments: Any) -> None:
        kernels.launch(name, kernels.geometry[name].grid(outputs[name], rows), 0, *arguments)

    made, expected = {}, {}

    def keep(name: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
        made[name], expected[name] = got.clone(), wanted

    kernels.launch("embed", (rows,), 0, table, tokens, b.stream, b.copy, b.squares, scales, 0.5)
    stream = reference.embed(table.double(), tokens, 0.5)
    keep("embed", b.stream[:rows, : arch.d_model], stream)
    start(
        "project_qkv",
        weights["qkv"],
        b.copy,
        b.squares,
        scales,
        other,
        b.query,
        cache[0],
        cache[1],
        position,
        rows,
        capacity,
        1e-6,
    )
    query, key, value = reference.project_qkv(m["qkv"], stream, 1e-6)
    places = torch.arange(rows)
    tiled = has_tile_attention(kernels.constants)

    def read_query() -> torch.Tensor:
        own = b.query[:rows, :inner]
        return unpack_query(own, torch.float16) if tiled else own

    keep("query", read_query(), query)
    keep("key", cache[0][places, :, position.long()].flatten(1), key)
    keep("value", cache[1][places, :, position.long()].flatten(1), value)
    start("add_attention", weights["self_out"], b.attended, b.stream, b.copy, b.squares, other, rows, 0.5)
    stream = reference.add_attention(m["self_out"], attended.double(), stream, 0.5)
    keep("attention", b.stream[:rows, : arch.d_model], stream)
    start("project_query", weights["query"], b.copy, b.squares, other, scales, b.query, rows, 1e-6)
    keep("cross query", read_query(), reference.project_query(m["query"], stream, 1e-6))
    start("add_attention", weights["self_out"], b.attended, b.stream, b.copy, b.squares, scales, rows, 2.0)
    stream = reference.add_attention(m["self_out"], attended.double(), stream, 2.0)
    start("feed_forward_in", weights["wi"], b.copy, b.squares, scales, other, b.inner, rows, 1e-6)
    inside = reference.feed_forward_in(m["wi"], stream, 1e-6, arch.activation, gated=arch.gated)
    keep("inner", unpack_activations(b.inner, rows, arch.d_ff, 32 if int8 else 16, halves=halves), inside)
    start("feed_forward_out", weights["wo"], b.inner, b.stream, b.copy, b.squares, other, rows, 1.5)
    stream = reference.feed_forward_out(m["wo"], inside, stream, 1.5)
    keep("stream", b.stream[:rows, : arch.d_model], stream)
    nothing = (None, None, position)
    start("output_head", weights["head"], b.copy, b.squares, other, logits, b.best, *nothing, rows, 1e-6, 0.25)
    keep("logits", logits, reference.output_head(m["head"], stream, 1e-6, 0.25))
    assert torch.equal(~b.best & 0xFFFFFFFF, logits.argmax(-1)), "the best token"
    return Results(made, expected)


def put(stored: torch.Tensor, rows: torch.Tensor, *, int8: bool, halves: bool) -> None:
    """Write [R, columns] where products read them."""
    tile = 32 if int8 else 16
    plain = stored.new_zeros(stored.shape)
    plain[: len(rows), : rows.shape[1]] = rows
    parts = plain.view(-1, 8, stored.shape[1] // tile, tile).transpose(1, 2)
    if halves:
        parts = parts.reshape(*parts.shape[:3], 4, 2, 2).permute(0, 1, 4, 2, 3, 5)
    stored.copy_(parts.reshape(stored.shape))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., EmulatedStep]:
    @cache
    def make(arch: Architecture, rows: int, *, int8: bool, **division: int) -> EmulatedStep:
        return EmulatedStep(arch, rows, int8=int8, folder=tmp_path_factory.mktemp("emulated"), **division)

    return make


@pytest.mark.parametrize(
    ("arch", "counts", "int8"),
    [
        (GATED, (40, 9, 3), True),
        (LONG, (9, 3), True),
        (GATED, (3,), False),
        (replace(GATED, d_model=2100, d_ff=24), (9, 3), False),
    ],
    ids=["int8", "int8, more than registers hold", "float16", "more sums of squares than registers hold"],
)
def test_products_equal_references_and_rows_do_not_depend_on_their_number(
    emulated: Any, arch: Architecture, counts: tuple[int, ...], int8: bool
) -> None:
    """By one row tile (3 rows), by several (9), and by tiles of 64 rows (40)."""
    most: dict[str, torch.Tensor] = {}
    for rows in counts:
        results = run(arch, emulated(arch, rows, int8=int8), rows, int8=int8)
        for name, got in results.made.items():
            wanted = results.expected[name]
            assert got.isfinite().all(), name
            assert float((got.double() - wanted).norm() / wanted.norm()) < TOLERANCE, name
            assert torch.equal(got, most.setdefault(name, got)[:rows]), name


@pytest.mark.parametrize(
    ("arch", "rows", "room"),
    [(GROUPED, 40, 32), (GROUPED, 70, 208), (replace(GROUPED, d_model=2048, d_ff=40), 33, 208)],
    ids=["steps in turns", "all steps at once", "two steps a part"],
)
def test_warp_groups_make_the_same_bits(emulated: Any, arch: Architecture, rows: int, room: int) -> None:
    """Five tiles of outputs by groups of four, in CTAs of 32 and of 64 rows."""
    kernels = emulated(arch, rows, int8=False, TILED_SHARED=room * 1024)
    assert kernels.constants["WARPGROUPS"] == (4 if rows <= 64 else 8)
    got = run(arch, kernels, rows, int8=False)
    for name, made in got.made.items():
        wanted = got.expected[name]
        assert float((made.double() - wanted).norm() / wanted.norm()) < TOLERANCE, name
    few = run(arch, emulated(arch, 3, int8=False), 3, int8=False).made
    assert {name for name, made in few.items() if not torch.equal(made, got.made[name][:3])} == set()


def test_results_do_not_depend_on_what_a_cta_takes(emulated: Any) -> None:
    """Two of five tiles of outputs, fewer rows where the stream is added to, and a copy of the rows that shared memory does not hold."""
    rows = 40
    own = {
        "QUERY_TILES": 2,
        "ADD_TILES": 2,
        "ROW_TILES": 4,
        "ADD_ROW_TILES": 2,
        "QUERY_ROW_TILES": 4,
        "HEAD_ROOM": 6 * 1024,
    }
    wanted = run(GATED, emulated(GATED, rows, int8=False), rows, int8=False).made
    got = run(GATED, emulated(GATED, rows, int8=False, **own), rows, int8=False).made
    assert {name for name in wanted if not torch.equal(wanted[name], got[name])} == set()


@pytest.mark.parametrize(
    ("rows", "int8", "together"),
    [(3, True, (2, 1)), (3, True, (4, 3)), (9, False, (2, 1))],
    ids=["one row tile, int8", "all tiles at once, shared by teams of threads", "rows in shared memory"],
)
def test_results_do_not_depend_on_whether_a_cta_makes_tiles_one_after_the_other(
    emulated: Any, rows: int, int8: bool, together: tuple[int, int]
) -> None:
    """Two at a time (query, key, value), and gate and up of three: more than registers hold, and the last CTA has fewer."""
    own = {"STREAMED": 1, "QKV_TILES": 4, "IN_TILES": 3, "QKV_TOGETHER": together[0], "IN_TOGETHER": together[1]}
    for arch in (GATED, replace(GATED, d_model=1100, d_ff=70, gated=False)):
        wanted = run(arch, emulated(arch, rows, int8=int8), rows, int8=int8).made
        got = run(arch, emulated(arch, rows, int8=int8, **own), rows, int8=int8).made
        assert {name for name in wanted if not torch.equal(wanted[name], got[name])} == set()


@pytest.mark.parametrize("rows", [3, 20], ids=["one row tile", "four"])
@pytest.mark.parametrize("gated", [True, False])
def test_results_do_not_depend_on_how_threads_share_tiles(emulated: Any, gated: bool, rows: int) -> None:
    """Four teams of threads for four tiles of outputs or two pairs of them, for three, or for one; or, for four row tiles, one."""
    arch = replace(GATED, gated=gated)
    results = [
        run(arch, emulated(arch, rows, int8=False, QKV_TILES=qkv, IN_TILES=inner), rows, int8=False).made
        for qkv, inner in ((1, 1), (4, 2 if gated else 4), (3, 1 if gated else 3))
    ]
    for got in results[1:]:
        assert {name for name in got if not torch.equal(results[0][name], got[name])} == set()


@pytest.mark.parametrize(
    ("arch", "rows", "int8", "split"),
    [
        (SPLIT, 40, False, {"ADD_SPLIT": 3, "OUT_SPLIT": 4, "SPLIT_ROW_TILES": 8, "SPLIT_CTAS": 4}),
        (
            replace(SPLIT, d_model=72),
            17,
            False,
            {"ADD_SPLIT": 2, "OUT_SPLIT": 2, "SPLIT_ROW_TILES": 2, "SPLIT_CTAS": 2},
        ),
        (replace(SPLIT, d_ff=5120), 3, True, {"OUT_SPLIT": 5, "SPLIT_ROW_TILES": 1, "SPLIT_CTAS": 8}),
    ],
    ids=["warp groups, and a tile that is not there", "a second group of rows", "int8, more than registers hold"],
)
def test_results_do_not_depend_on_whether_ctas_of_a_cluster_share_k(
    emulated: Any, arch: Architecture, rows: int, int8: bool, split: dict[str, int]
) -> None:
    wanted = run(arch, emulated(arch, rows, int8=int8, **NOT_SPLIT), rows, int8=int8)
    kernels = emulated(arch, rows, int8=int8, **NOT_SPLIT | split)
    assert kernels.geometry["feed_forward_out"].cluster == split["SPLIT_CTAS"]
    got = run(arch, kernels, rows, int8=int8).made
    assert {name for name, made in wanted.made.items() if not torch.equal(made, got[name])} == set()
    assert (
        float((got["stream"].double() - wanted.expected["stream"]).norm() / wanted.expected["stream"].norm())
        < TOLERANCE
    )

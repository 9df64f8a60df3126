"""The decoder kernels on shapes drawn at random: odd sizes, one head, long caches, single keys, hidden sources, 1 to 150 rows.

As in `tests/gpu/test_kernels.py`, against the references in float64 with poisoned buffers. T5_TRT_TEST_SEED draws other shapes.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch

from t5_trt.graph.architecture import ACTIVATIONS, Architecture
from t5_trt.graph.precision import REAL_TYPES, mask_value
from tests.gpu.step_cases import SMALL, TOLERANCES, check, kernels, make, real

CASES = 48
SEED = int(os.environ.get("T5_TRT_TEST_SEED", "0"))
LARGEST_POSITION = 1300  # more than five chunks of keys
#: rounding what is stored in half precision, and nothing else, gives up to 0.85 of the tolerance in one of the first 48 cases
SLACK = 2.5


@dataclass(frozen=True)
class Drawn:
    """A model's sizes, a request and what its masks hide."""

    arch: Architecture
    dtype: torch.dtype
    positions: tuple[int, ...]
    lengths: tuple[int, ...]
    beams: int
    hidden: str


def draw(number: int) -> Drawn:
    """Case `number`: one after the other in another type, so that all of them get every kind of size."""
    chance = random.Random(f"{SEED} {number}")
    arch = replace(
        SMALL,
        vocab_size=chance.choice((31, 211, 1003, 4096)),
        d_model=chance.choice((24, 72, 130, 250, 256, 513, 768)),
        num_heads=chance.choice((1, 1, 2, 3, 6, 12)),
        d_kv=8 * chance.randint(4, 16),
        d_ff=chance.choice((1, 40, 200, 333, 1024, 2049)),
        decoder_layers=chance.randint(1, 2),
        activation=chance.choice(sorted(ACTIVATIONS)),
        gated=chance.random() < 0.5,
        max_distance=chance.choice((20, 128)),
    )
    beams, sources = chance.choice((1, 1, 1, 2, 3, 4, 8)), chance.choice((1, 1, 2, 3, 5, 8, 13, 33, 40, 70, 150))
    sources = max(1, min(sources, 150 // beams))
    ends = (0, 1, 63, 64, 255, 256, 257, LARGEST_POSITION)
    return Drawn(
        arch=arch,
        dtype=sorted(TOLERANCES, key=str)[number % len(TOLERANCES)],
        positions=tuple(chance.choice((*ends, chance.randint(0, LARGEST_POSITION))) for _ in range(sources * beams)),
        lengths=tuple(chance.choice((1, 2, 255, 256, 257, chance.randint(1, 900))) for _ in range(sources)),
        beams=beams,
        hidden=chance.choice(("nothing", "some", "all but one", "all")),
    )


def mask(case: Drawn, number: int, width: int) -> torch.Tensor:
    """The additive mask [sources, width]."""
    value, chance = (
        mask_value(REAL_TYPES["fp16" if real(case.dtype) == torch.float16 else "fp32"]),
        random.Random(number),
    )
    made = torch.zeros(len(case.lengths), width)
    for source, length in enumerate(case.lengths):
        if case.hidden == "some":
            made[source, [key for key in range(length) if chance.random() < 0.5]] = value
        elif case.hidden != "nothing":
            made[source, :length] = value
        if case.hidden == "all but one":
            made[source, chance.randrange(length)] = 0.0
    return made


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All kernels of this file, compiled side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, range(CASES)))


def compile_one(number: int) -> None:
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # makes torch's context this thread's
    case = draw(number)
    kernels(case.arch, case.dtype, len(case.positions))


@pytest.mark.parametrize("number", range(CASES))
def test_drawn_shapes_equal_references(number: int) -> None:
    drawn = draw(number)
    case = make(drawn.arch, drawn.dtype, list(drawn.positions), list(drawn.lengths), drawn.beams, seed=SEED + number)
    shown = case.step.inputs.mask
    shown.copy_(mask(drawn, number, shown.shape[1]))
    check(case, drawn.dtype, SLACK)


def test_every_kind_of_shape_is_drawn() -> None:
    cases = [draw(number) for number in range(CASES)]
    assert {case.hidden for case in cases} == {"nothing", "some", "all but one", "all"}
    assert any(case.arch.num_heads == 1 for case in cases) and any(case.arch.d_model % 16 for case in cases)
    assert any(1 in case.lengths for case in cases) and any(max(case.positions) > 1024 for case in cases)
    assert {len(case.positions) == 1 for case in cases} == {True, False} and any(len(c.positions) > 32 for c in cases)

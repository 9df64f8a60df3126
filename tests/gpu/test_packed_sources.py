"""Sources packed one behind another, on a GPU: attention has each source's own bits, and rows get what batches give. No TensorRT is needed."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from t5_trt.runtime.row_sources import RowSources, Source
from tests.gpu.cases import cuda_model
from tests.gpu.encoder_cases import ROUNDED, check_packed, error
from tests.gpu.step_cases import SMALL
from tests.tiny_models import KINDS, VOCAB, make_hugging_face

SEED = int(os.environ.get("T5_TRT_TEST_SEED", "0"))
pytestmark = pytest.mark.usefixtures("poisoned")
#: lengths of packed sources: one, those that fill tiles of 64 or 128 exactly, none of some, many, every length from 1 to 512
LENGTHS = {
    "one": (37,),
    "one, a tile": (128,),
    "tiles": (64, 128, 64, 256, 64, 512, 128),
    "beside tiles": (63, 65, 127, 129, 1, 191, 193),
    "some empty": (0, 70, 0, 0, 5, 128, 0),
    "all of them": tuple(range(1, 513)),
    "long": (3000, 9, 2500),
}
#: largest error of encoders' results, beside the largest value
NEAR = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 6e-2, "int8": 1e-2}


@pytest.mark.parametrize("dtype", list(ROUNDED))
@pytest.mark.parametrize("lengths", list(LENGTHS.values()), ids=list(LENGTHS))
def test_attention_has_the_bits_of_each_source_alone(lengths: Sequence[int], dtype: torch.dtype) -> None:
    behind = check_packed(replace(SMALL, num_heads=2), dtype, lengths, random.Random(f"{SEED} {lengths}"))
    assert behind.isnan().all(), "nothing is written behind the last source"


def drawn(chance: random.Random, length: int) -> Source:
    """A source; of some, tokens are hidden."""
    hides = chance.choice((0.0, 0.0, 0.3, 1.0))
    ids = np.array([chance.randrange(2, VOCAB) for _ in range(length)])
    return ids, np.array([int(chance.random() >= hides) for _ in range(length)])


@pytest.mark.parametrize("precision", list(NEAR))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_get_what_each_source_gets_alone(kind: str, precision: str, store: Path) -> None:
    session = cuda_model(make_hugging_face(kind), store, precision).session
    assert (session.batch_size is None) == (precision != "fp32")
    chance = random.Random(f"{SEED} {kind} {precision}")
    drawn_lengths = [chance.randint(1, 512) for _ in range(20)]
    for lengths in ((1,), (64, 128, 64, 256), (5,) * 32, drawn_lengths, (3000, 2000)):
        sources = [drawn(chance, length) for length in lengths]
        if session.batch_size is not None:  # a source without any shown token looks at what pads it
            for _, mask in sources:
                mask[0] = 1
        for _ in range(3):  # kernel by kernel, captured, replayed
            made = session.encode_rows(sources)
        made.follow()
        for (ids, mask), (cross, bias) in zip(sources, made.split(), strict=True):
            given, length = torch.from_numpy(mask)[None].cuda(), len(ids)
            _, alone = session.encode(torch.from_numpy(ids)[None].cuda(), None, given)
            assert error(cross, alone.kv[:, :, 0, :, :length]) < NEAR[precision]
            assert torch.equal(bias, session.cross_bias(given, alone)[0, 0, 0, :length])


def same(one: RowSources, other: RowSources) -> bool:
    """Whether both batches' sources have the same bits; what is behind the last source is nobody's."""
    pairs = zip(one.split(), other.split(), strict=True)
    return all(torch.equal(mine, its) for sources in pairs for mine, its in zip(*sources, strict=True))


@torch.no_grad()
def test_bits_do_not_depend_on_the_run_nor_on_the_capture(store: Path) -> None:
    session, chance = cuda_model(make_hugging_face("t5-v1.1"), store, "fp16").session, random.Random(SEED)
    sources = [drawn(chance, chance.randint(1, 200)) for _ in range(9)]
    made = [session.encode_rows(sources) for _ in range(6)]
    torch.cuda.synchronize()
    assert all(same(each, made[0]) for each in made)


@torch.no_grad()
def test_batches_one_after_the_other_do_not_disturb_each_other(store: Path) -> None:
    """Many sizes in one stream, without the host waiting: each batch's rows keep what it made."""
    session, chance = cuda_model(make_hugging_face("t5-v1.1"), store, "fp16").session, random.Random(SEED + 1)
    batches = [[drawn(chance, chance.randint(1, 300)) for _ in range(chance.randint(1, 12))] for _ in range(12)]
    for _ in range(2):
        wanted = []
        for sources in batches:
            wanted.append(session.encode_rows(sources))
            torch.cuda.synchronize()
    made = [session.encode_rows(sources) for sources in batches]
    torch.cuda.synchronize()
    assert all(same(each, first) for each, first in zip(made, wanted, strict=True))

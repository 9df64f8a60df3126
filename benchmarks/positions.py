"""Time the decoder over several positions on an NVIDIA GPU: by our kernels, by torch, and by Hugging Face's class.

    python -m benchmarks.positions --out FOLDER [--cases 1x4,8x64] [--layers 2] [--no-peer]

T5-base shapes with random weights, fp16, 32 source tokens, a case is batch x positions. Times are medians of the host's clock, the GPU's work
included: of the decoder alone over an empty cache, which torch operations decode too as they do where tokens are hidden, and position by
position; and of forward() as a whole over encoder states. Every case is written to FOLDER/positions.json as it comes; the status is 1 if
something could not be measured, or if logits are not those of single steps bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import kernel_models
from benchmarks.gpu import SOURCE_TOKENS, timed_ms
from benchmarks.kernel_models import attempt, base_name, keep, open_model, sizes, t5_base
from benchmarks.large_models import compile_kernels
from t5_trt.compat import CACHE
from t5_trt.runtime.kernel_positions import positions_at_once
from t5_trt.tools.random_models import random_source
from t5_trt.tools.records import Record

#: (batch, positions); the last one is decoded piece by piece
CASES = ((1, 1), (1, 4), (1, 16), (1, 64), (8, 1), (8, 4), (8, 16), (8, 64), (32, 128))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--cases", help="comma-separated batch x positions; default: nine of them")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument(
        "--store", type=Path, default=Path("/var/tmp/t5_trt-kernel-engines"), help="of compiled kernels"
    )
    parser.add_argument("--runs", type=int, default=9, help="calls that a median is of")
    parser.add_argument("--no-peer", action="store_true", help="leave Hugging Face out")
    given = parser.parse_args(arguments)
    cases = CASES if given.cases is None else sizes(given.cases)
    hugging_face = t5_base(given.layers)
    ours = open_model("cuda", hugging_face, "fp16", given.store)
    peer = None if given.no_peer else t5_base(given.layers).half().to(kernel_models.DEVICE)
    compile_kernels(ours, given.store, [rows for case in cases for rows in rows_of(*case, ours.session.arch)])
    good = True
    for batch, positions in cases:
        found: Record = {"model": base_name(given.layers), "precision": "fp16", "backend": "cuda"}
        with torch.no_grad():
            measure(found, ours, peer, batch, positions, given.runs)
        keep(given.out, "positions", [found])
        print(" ".join(f"{name}={value}" for name, value in found.items()), flush=True)
        good &= "failed" not in found and bool(found.get("equal_to_single_steps"))
    sys.exit(0 if good else 1)


def rows_of(batch: int, positions: int, arch: Any) -> list[int]:
    """Rows of the steps of a case: of single positions, of a piece, and of the last piece."""
    most = positions_at_once(batch, arch.num_heads, 128)
    return [batch * count for count in {1, min(most, positions), positions % most} if count]


def measure(found: Record, ours: Any, peer: Any, batch: int, positions: int, runs: int) -> None:
    """All times of one case."""
    session, device = ours.session, kernel_models.DEVICE
    found |= {"batch": batch, "positions": positions, "source_tokens": SOURCE_TOKENS}
    source, fed = (random_source(batch, count).to(device) for count in (SOURCE_TOKENS, positions))
    mask = torch.ones_like(source)
    _, cross = session.encode(source, None, mask)
    state = session.start(cross, positions, mask)

    def whole(**hiding: Any) -> torch.Tensor:
        state.crop(0)
        return session.decode(state, fed, **hiding)  # type: ignore[no-any-return]

    def single() -> torch.Tensor:
        state.crop(0)
        return torch.cat([session.decode(state, ids) for ids in fed.split(1, 1)], 1)

    def ms(work: Callable[[], Any], times: int = runs) -> float:
        return round(timed_ms(work, times)[0], 3)

    def forward(model: Any) -> Callable[[], Any]:
        states = (model.get_encoder()(source, attention_mask=mask)[0],)
        given = {"encoder_outputs": states, "attention_mask": mask, "decoder_input_ids": fed, CACHE: None}
        return lambda: model(**given).logits

    attempt(found, "equal_to_single_steps", lambda: torch.equal(whole(), single()))
    attempt(found, "decoder_ms", lambda: ms(whole))
    attempt(found, "decoder_by_torch_ms", lambda: ms(lambda: whole(key_mask=torch.ones_like(fed))))
    attempt(found, "single_steps_ms", lambda: ms(single, 3))
    attempt(found, "forward_ms", lambda: ms(forward(ours)))
    with by_torch(session):
        attempt(found, "forward_by_torch_ms", lambda: ms(forward(ours)))
    if peer is not None:
        attempt(found, "hf_eager_fp16_forward_ms", lambda: ms(forward(peer)))


@contextmanager
def by_torch(session: Any) -> Iterator[None]:
    """Decode as where tokens are hidden."""
    real = session.decode
    session.decode = lambda state, ids, key_mask=None: real(state, ids, torch.ones_like(ids))
    try:
        yield
    finally:
        del session.decode  # the class's own shows again


if __name__ == "__main__":
    main()

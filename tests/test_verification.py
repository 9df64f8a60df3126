"""`compare`: equal models, differing ones, texts and batches, activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import InputError, TRTT5ForConditionalGeneration, compare
from tests.conftest import SHIPPED
from tests.tiny_models import batch, make_stock


def test_equal_models(v11: tuple[Any, Any]) -> None:
    stock, ours = v11
    found = compare(ours, stock, [batch(), batch(2, 20)], max_new_tokens=9, num_beams=2)
    assert found.sequences == found.equal == 5 and found.share == 1.0 and found.first_difference is None
    assert 0 < found.mean_logit_error < found.max_logit_error < 1e-3 and found.relative_logit_error < 1e-4
    assert abs(found.kl_divergence) < 1e-5 and found.activations == ()


def test_other_weights_differ(v11: tuple[Any, Any]) -> None:
    found = compare(v11[1], make_stock("t5-v1.1", seed=3), [batch()], max_new_tokens=9)
    assert found.equal == 0 and found.share == 0.0 and found.first_difference == (0, 1)
    assert found.kl_divergence > 0.1 and found.relative_logit_error > 0.1


def test_two_precisions_on_texts(tmp_path: Path) -> None:
    exact = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED)
    rounded = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, precision="int8", engine_cache_dir=tmp_path)
    texts = ["さくら", "とうきょう おおさか", "ねこ"]
    found = compare(rounded, exact, texts, batch_size=2, activations=True, max_new_tokens=20)
    assert found.equal == found.sequences == 3
    assert 1e-4 < found.relative_logit_error < 0.1 and 0 < found.kl_divergence < 0.1
    names = {row.name for row in found.activations}
    feed_forward = "decoder.block.1.layer.2.DenseReluDense.wo"
    assert {
        f"{feed_forward}, input",
        f"{feed_forward}, output",
        "encoder.block.0.layer.0.SelfAttention.o, output",
    } < names
    shares = [row.half_share for row in found.activations]
    assert shares == sorted(shares, reverse=True) and 0 < shares[0] < 0.1


def test_activations_that_half_precision_cannot_hold() -> None:
    """The table shows what engines would keep: above the limit in float32, below it folded."""
    stock = make_stock("t5-v1.1")
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if name.endswith(".wo.weight"):
                parameter.mul_(1e5)
    ours = TRTT5ForConditionalGeneration.from_model(stock, num_threads=1)
    rows = compare(ours, stock, [batch()], max_new_tokens=3, activations=True).activations
    assert max(row.largest for row in rows) > 65504 and all(row.half_share < 1.0 for row in rows)


def test_nothing_to_compare(v11: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="texts got"):
        compare(v11[1], v11[0], [])

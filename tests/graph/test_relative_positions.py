"""Relative positions: any number of buckets and any max_distance that Hugging Face's classes take give their results."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from t5_trt import InputError, TRTT5ForConditionalGeneration
from t5_trt.engine.profiles import Shapes, fixed_axes
from t5_trt.graph.build_graph import build_device_graph
from t5_trt.graph.parameters import materialize, parameters
from t5_trt.graph.relative_positions import distance_buckets, longest_sequence
from tests.tiny_models import batch, make_hugging_face
from tests.torch_graph import TorchGraph

#: (buckets, max_distance): usual ones, odd ones, the fewest, a maximum among the exact buckets of one stack or both, a huge one
SETTINGS = [
    (32, 128), (8, 20), (32, 100), (64, 256), (16, 17), (33, 128), (7, 5), (4, 3), (4, 100), (5, 128), (6, 4), (64, 20), (64, 16),
    (64, 32), (32, 8), (32, 5), (32, 1), (64, 33), (32, 10**12),
]  # fmt: skip


def hugging_face_buckets(relative: torch.Tensor, bidirectional: bool, buckets: int, limit: int) -> torch.Tensor:
    """-1 where it has none."""
    found = T5Attention._relative_position_bucket(relative, bidirectional, buckets, limit)
    return found.clamp(min=-1)


@pytest.mark.parametrize(("buckets", "limit"), SETTINGS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_hugging_face(buckets: int, limit: int, bidirectional: bool) -> None:
    """Every distance of the longest sequence that is taken, up to far beyond the table, where clipping must not change it."""
    longest = longest_sequence(buckets, limit, bidirectional=bidirectional)
    far = min(3 * limit, 1000) if longest is None else min(longest - 1, 1000)
    relative = torch.arange(-far, far + 1) if bidirectional else torch.arange(-far, 1)
    table = distance_buckets(buckets, limit, bidirectional=bidirectional)
    reach = len(table) // 2 if bidirectional else len(table) - 1
    index = relative.clamp(-reach, reach) + reach if bidirectional else (-relative).clamp(0, reach)
    assert torch.equal(table[index], hugging_face_buckets(relative, bidirectional, buckets, limit))


@pytest.mark.parametrize(("buckets", "limit"), SETTINGS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_longest_sequence_is_the_last_that_hugging_face_takes(buckets: int, limit: int, bidirectional: bool) -> None:
    longest = longest_sequence(buckets, limit, bidirectional=bidirectional)
    if longest is None or longest > 2**20:
        return
    beyond = torch.tensor([1 - longest, -longest])
    assert hugging_face_buckets(beyond, bidirectional, buckets, limit).ge(0).tolist() == [True, False]


@pytest.mark.parametrize("kind", ["t5-v1.0", "mt5", "umt5"])
@pytest.mark.parametrize(("buckets", "limit"), [(64, 20), (7, 5), (32, 12), (4, 3)])
def test_logits_and_beams_equal_hugging_face(kind: str, buckets: int, limit: int) -> None:
    """Distances up to 35 in the decoder and 30 in the encoder; the second forward and the beams decode step by step."""
    changes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": limit}
    hugging_face = make_hugging_face(kind, **changes)
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    tokens = min(ours.architecture.longest_target or 36, 36)
    request = batch(rows=2, tokens=31)
    decoder = batch(rows=2, tokens=tokens, seed=6, padding="none")["input_ids"]
    with torch.no_grad():
        expected = hugging_face(**request, decoder_input_ids=decoder).logits
        torch.testing.assert_close(ours(**request, decoder_input_ids=decoder).logits, expected, atol=1e-3, rtol=1e-3)
    options = {"num_beams": 2, "max_new_tokens": tokens - 1, "min_new_tokens": tokens - 1}
    assert torch.equal(ours.generate(**request, **options), hugging_face.generate(**request, **options))


@pytest.mark.parametrize(("buckets", "limit"), [(64, 20), (7, 5)])
def test_device_graph_equals_hugging_face(buckets: int, limit: int) -> None:
    """The encoder and a decoder step at position 34, as TensorRT gets them, run node by node."""
    changes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": limit}
    hugging_face = make_hugging_face("t5-v1.0", **changes)
    arch = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1).architecture
    weights = {
        name: materialize(parameter, hugging_face.state_dict(), torch.float32, torch.device("cpu"))
        for name, parameter in parameters(arch).items()
    }

    def run(graph: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        fixed = fixed_axes(Shapes(B=1, N=1, S=40, T=48, Q=1).for_graph(graph))
        model = TorchGraph(build_device_graph(graph, arch, ir.DataType.FLOAT, ir.DataType.INT64, fixed))
        given = {name: inputs.get(name, weights.get(name)) for name in model.inputs}
        return model.run({name: value.reshape(model.inputs[name][1]) for name, value in given.items()})  # type: ignore[union-attr]

    source, target = (batch(rows=1, tokens=40, seed=seed, padding="none")["input_ids"] for seed in (1, 2))
    mask, target = torch.ones_like(source), target[:, :35]
    with torch.no_grad():
        before = hugging_face(input_ids=source, decoder_input_ids=target[:, :-1], use_cache=True)
        expected = hugging_face(input_ids=source, decoder_input_ids=target)
    encoded = run("encoder", input_ids=source, attention_mask=mask)
    states = encoded["encoder_hidden_states"].view_as(expected.encoder_last_hidden_state)
    torch.testing.assert_close(states, expected.encoder_last_hidden_state, atol=1e-4, rtol=1e-4)
    cache: Any = before.get("cache", before.get("past_key_values"))
    past = {}
    for layer, (own, cross) in enumerate(
        zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    ):
        for kind, tensors in (("k", (own.keys, cross.keys)), ("v", (own.values, cross.values))):
            past[f"past_{kind}_{layer}"] = torch.nn.functional.pad(tensors[0], (0, 0, 0, 48 - 34))
            past[f"cross_{kind}_{layer}"] = tensors[1]
    position, bias = torch.tensor([34]), torch.zeros(40)
    step = run("decoder_step", decoder_input_ids=target[:, -1:], position=position, cross_bias=bias, **past)
    torch.testing.assert_close(step["logits"].view(-1), expected.logits[0, -1], atol=1e-3, rtol=1e-3)


def test_longer_sequences_than_buckets_are_refused() -> None:
    """Hugging Face's class fails with an IndexError there."""
    changes = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 8}
    hugging_face = make_hugging_face("t5-v1.0", **changes)
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    fitting, longer = batch(tokens=8, padding="none"), batch(tokens=9, padding="none")
    assert torch.equal(ours.generate(**fitting, max_new_tokens=6), hugging_face.generate(**fitting, max_new_tokens=6))
    with pytest.raises(IndexError):
        hugging_face.generate(**longer, max_new_tokens=6)
    with pytest.raises(InputError, match=r"got 9 source tokens; expected at most 8: .*relative_attention_max_distance"):
        ours.generate(**longer, max_new_tokens=6)
    assert ours.architecture.longest_target is not None
    with pytest.raises(InputError, match="target tokens; expected at most"):
        ours.generate(**fitting, max_new_tokens=60, min_new_tokens=60)

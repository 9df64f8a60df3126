"""What the backend "cuda" computes by torch, and the references of its kernels, against Hugging Face's model on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling, find_scaling
from t5_trt.kernels import reference
from t5_trt.kernels.step_memory import StepWeights
from t5_trt.kernels.step_weights import StepWeightsMaker, unpacked_layer
from t5_trt.kernels.weights import unpack_matrix
from t5_trt.runtime.captured_encoder import CapturedEncoder, CapturedSizes
from t5_trt.runtime.device_weights import DeviceWeights
from t5_trt.runtime.torch_layers import TorchDecoder, TorchEncoder
from tests.tiny_models import KINDS, VOCAB, batch, make_hugging_face, swollen

CPU = torch.device("cpu")


class Layers:
    """A Hugging Face model and the parts of the backend over its weights."""

    def __init__(self, hugging_face: Any, dtype: torch.dtype = torch.float32) -> None:
        self.hugging_face = hugging_face
        self.arch: Architecture = TRTT5ForConditionalGeneration.from_model(hugging_face).architecture
        weights, self.precision = hugging_face.state_dict(), "fp16" if dtype == torch.float16 else "fp32"
        self.scaling = find_scaling(self.arch, weights) if dtype == torch.float16 else Fp16Scaling()
        self.step: StepWeights = StepWeightsMaker(self.arch, weights, dtype, CPU, self.scaling).make()
        self.encoder = TorchEncoder(
            self.arch, DeviceWeights(self.arch, weights, dtype, CPU, self.scaling), self.scaling, self.precision
        )
        self.decoder = TorchDecoder(self.arch, self.step, self.scaling, self.precision)

    def empty_cache(self, rows: int) -> torch.Tensor:
        shape = (self.arch.decoder_layers, 2, rows, self.arch.num_heads, 0, self.arch.d_kv)
        return torch.zeros(shape, dtype=self.step.embedding.dtype)


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(mask == 0, -30000.0)[:, None, None]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_encoder_and_decoder_equal_hugging_face(kind: str) -> None:
    layers, inputs = Layers(make_hugging_face(kind)), batch(3)
    tokens = torch.randint(2, VOCAB, (3, 7))
    expected = layers.hugging_face(**inputs, decoder_input_ids=tokens)
    hidden = layers.encoder.run(inputs["input_ids"], None, inputs["attention_mask"])
    shown = inputs["attention_mask"].bool()
    assert error(hidden[shown], expected.encoder_last_hidden_state[shown]) < 1e-5
    cross, bias = layers.encoder.cross(hidden), additive(inputs["attention_mask"])
    logits, made = layers.decoder.run(tokens, layers.empty_cache(3), cross, bias, 1, None)
    assert error(logits, expected.logits) < 1e-5
    again, _ = layers.decoder.run(tokens[:, 4:], made[..., :4, :], cross, bias, 1, None)
    assert error(again, expected.logits[:, 4:]) < 1e-5, "over a cache"


@torch.no_grad()
def test_beams_share_their_source() -> None:
    layers, inputs = Layers(make_hugging_face("t5-v1.1")), batch(2)
    tokens = torch.randint(2, VOCAB, (6, 3))
    repeated = {name: tensor.repeat_interleave(3, 0) for name, tensor in inputs.items()}
    expected = layers.hugging_face(**repeated, decoder_input_ids=tokens).logits
    cross = layers.encoder.cross(layers.encoder.run(inputs["input_ids"], None, inputs["attention_mask"]))
    logits, _ = layers.decoder.run(tokens, layers.empty_cache(6), cross, additive(inputs["attention_mask"]), 3, None)
    assert error(logits, expected) < 1e-5


@torch.no_grad()
def test_hidden_tokens_of_the_decoder() -> None:
    layers, inputs = Layers(make_hugging_face("t5-v1.0")), batch(3)
    tokens, mask = torch.randint(2, VOCAB, (3, 5)), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 0, 0, 1, 1]])
    expected = layers.hugging_face(**inputs, decoder_input_ids=tokens, decoder_attention_mask=mask).logits
    cross = layers.encoder.cross(layers.encoder.run(inputs["input_ids"], None, inputs["attention_mask"]))
    logits, _ = layers.decoder.run(tokens, layers.empty_cache(3), cross, additive(inputs["attention_mask"]), 1, mask)
    assert error(logits[mask.bool()], expected[mask.bool()]) < 1e-5


@torch.no_grad()
def test_overflowing_checkpoint_stays_finite_in_half_precision() -> None:
    hugging_face, inputs = swollen(make_hugging_face("t5-v1.1"), 30.0, 1e3), batch(3)
    layers, tokens = Layers(hugging_face, torch.float16), torch.randint(2, VOCAB, (3, 5))
    assert layers.scaling != Fp16Scaling()
    hidden = layers.encoder.run(inputs["input_ids"], None, inputs["attention_mask"])
    logits, _ = layers.decoder.run(
        tokens, layers.empty_cache(3), layers.encoder.cross(hidden), additive(inputs["attention_mask"]), 1, None
    )
    assert error(logits, hugging_face(**inputs, decoder_input_ids=tokens).logits) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kernel_references_make_a_step(kind: str) -> None:
    """A step put together from the references of the kernels, so that what the kernels are compared with is right itself."""
    layers, inputs = Layers(make_hugging_face(kind)), batch(2)
    arch, heads, width = layers.arch, layers.arch.num_heads, layers.arch.d_kv
    tokens = torch.randint(2, VOCAB, (4, 6))  # two beams of each source
    repeated = {name: tensor.repeat_interleave(2, 0) for name, tensor in inputs.items()}
    expected = layers.hugging_face(**repeated, decoder_input_ids=tokens).logits[:, -1]
    hidden = layers.encoder.run(inputs["input_ids"], None, inputs["attention_mask"])
    cross, mask = layers.encoder.cross(hidden), additive(inputs["attention_mask"])[:, 0, 0]
    _, cache = layers.decoder.run(tokens[:, :-1], layers.empty_cache(4), cross, mask[:, None, None], 2, None)
    position, lengths = torch.full((4,), 5), torch.full((2,), mask.shape[1])
    stream = reference.embed(layers.step.embedding, tokens[:, -1])
    for layer, own in enumerate(layers.step.layers):
        m = unpacked_layer(arch, own)
        query, *new = (part.view(4, heads, width) for part in reference.project_qkv(m["qkv"], stream, arch.epsilon))
        keys, values = (torch.cat((old, part[:, :, None]), 2) for old, part in zip(cache[layer], new, strict=True))
        attended = reference.attend_self(query, keys, values, own.bias, position)
        stream = reference.add_attention(m["self_out"], attended, stream, own.self_scale)
        query = reference.project_query(m["query"], stream, arch.epsilon).view(4, heads, width)
        attended = reference.attend_cross(query, *cross[layer], mask, lengths, 2)
        stream = reference.add_attention(m["cross_out"], attended, stream, own.cross_scale)
        inner = reference.feed_forward_in(m["wi"], stream, arch.epsilon, arch.activation, gated=arch.gated)
        stream = reference.feed_forward_out(m["wo"], inner, stream, own.wo_scale)
    head = unpack_matrix(layers.step.head, arch.vocab_size, arch.d_model)
    assert error(reference.output_head(head, stream, arch.epsilon, layers.step.head_scale), expected) < 1e-5


def test_encoder_of_a_size_seen_once_runs_padded_as_its_graph_does(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def encode(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(tuple(ids.shape))
        shown = ids * (mask == 1)
        return shown[..., None].float(), shown[None, None, :, None, :, None].float()

    class Replayed:
        def __init__(self, work: Any) -> None:
            self.replay = work

    def capture(work: Any, *_: Any, **__: Any) -> Replayed:
        work()
        return Replayed(work)

    monkeypatch.setattr("t5_trt.runtime.captured_encoder.capture", capture)
    encoder = CapturedEncoder(encode, CapturedSizes(CPU))
    for length in (5, 7, 16, 3):
        ids, mask = torch.randint(2, 9, (2, length)), torch.ones(2, length, dtype=torch.int64)
        hidden, cross = encoder.run(ids, mask)
        assert torch.equal(hidden[..., 0], ids.float()) and torch.equal(cross[0, 0, :, 0, :, 0], ids.float())
    assert set(seen) == {(2, 16)}
    kept, _ = encoder.run(*(torch.full((2, 16), value) for value in (3, 1)))
    before = kept.clone()
    encoder.run(*(torch.full((2, 16), value) for value in (4, 1)))
    assert torch.equal(kept, before), "results are the caller's"
    assert encoder.run(torch.ones(200, 16, dtype=torch.int64), torch.ones(200, 16, dtype=torch.int64))[0].shape == (
        200,
        16,
        1,
    )
    assert seen[-1] == (200, 16)

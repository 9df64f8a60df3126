"""Weights on their way from a file to a GPU: mapped, moved one by one as they are stored, converted there, and not kept twice."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.config import BuildConfig, RuntimeConfig
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.graph.parameters import CROSS_KV, EMBEDDING
from t5_trt.kernels.step_weights import StepWeightsMaker
from t5_trt.runtime import open_session as opening
from t5_trt.runtime import select
from t5_trt.runtime.device_weights import DeviceWeights
from t5_trt.runtime.select import Placement
from tests.tiny_models import make_hugging_face

META = torch.device("meta")


class OnTheHost(TorchDispatchMode):
    """Operations that compute with the host's tensors; moving one elsewhere as it is does not."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[int] = []
        self.computed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        results = [each for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        for tensor in given:
            if tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and not func.is_view:
                moves = [each.device == META and each.dtype == tensor.dtype for each in results]
                self.moved.append(tensor.nbytes)
                if func is not torch.ops.aten._to_copy.default or moves != [True]:
                    self.computed.append(str(func))
        return made


class Live(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: dict[int, int] = {}  # by address of the memory
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._address(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            address = self._address(tensor) if isinstance(tensor, torch.Tensor) else 0
            if not address or (address in given and address not in self.holders):
                continue
            size = tensor.untyped_storage().nbytes()
            if not self.holders.get(address):
                self.now += size
                self.most = max(self.most, self.now)
            self.holders[address] = self.holders.get(address, 0) + 1
            weakref.finalize(tensor, self._drop, address, size)
        return made

    def _drop(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        self.now -= 0 if self.holders[address] else size

    @staticmethod
    def _address(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr()


def in_half(layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """The architecture of a model with so many layers and its state dict as in a checkpoint in bfloat16."""
    hugging_face = make_hugging_face("t5-v1.1", num_layers=layers)
    arch = TRTT5ForConditionalGeneration.from_model(hugging_face).architecture
    return arch, {key: tensor.bfloat16() for key, tensor in hugging_face.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_moved_as_they_are_stored(dtype: torch.dtype) -> None:
    """In half of float32's bytes, each of the decoder's once, and without a copy on the host."""
    arch, weights = in_half(2)
    with OnTheHost() as seen:
        made = StepWeightsMaker(arch, weights, dtype, META, Fp16Scaling()).make()
        shared = DeviceWeights(arch, weights, dtype, META)
        shared.share(EMBEDDING, made.embedding)
        for name in (EMBEDDING, CROSS_KV, "encoder.block.0.layer.0.SelfAttention.qkv"):
            assert shared[name].device == META
    assert not seen.computed
    read = ("decoder.block", "decoder.final", "encoder.block.0.layer.0.SelfAttention.q.", "encoder.block.0.layer.0.SelfAttention.k.",
            "encoder.block.0.layer.0.SelfAttention.v.", "encoder.block.0.layer.0.layer_norm", "shared", "lm_head")  # fmt: skip
    tables = (arch.decoder_layers - 1) * arch.num_buckets * arch.num_heads * 2  # read for each layer
    assert sum(seen.moved) == sum(tensor.nbytes for key, tensor in weights.items() if key.startswith(read)) + tables


def test_room_beside_the_weights_does_not_grow_with_layers() -> None:
    """A matrix of the checkpoint is gone before the next one is there."""
    beside = []
    for layers in (2, 8):
        arch, weights = in_half(layers)
        with Live() as seen:
            made = StepWeightsMaker(arch, weights, torch.float16, torch.device("cpu"), Fp16Scaling()).make()
        kept = made.nbytes + made.embedding.nbytes
        assert seen.now >= kept
        beside.append(seen.most - kept)
    largest = max(tensor.numel() for tensor in weights.values())
    assert beside[1] < beside[0] * 1.1 and beside[1] < 4 * 4 * largest


@pytest.mark.skipif(sys.platform != "linux", reason="it reads the kernel's list of mappings")
def test_parameters_are_pages_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So the host's memory for them can be taken back at any time, and nothing is read before it is needed."""
    make_hugging_face("t5-v1.1").bfloat16().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(select, "missing_bindings", lambda: None)
    ours = TRTT5ForConditionalGeneration.from_pretrained(tmp_path, backend="cuda")
    assert "engines=(none opened yet)" in repr(ours) and {each.dtype for each in ours.parameters()} == {torch.bfloat16}
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("model.safetensors")]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    for name, parameter in ours.named_parameters():
        assert any(first <= parameter.data_ptr() < end for first, end in spans), name


@pytest.mark.parametrize(("backend", "kind"), [("cuda", "meta"), ("tensorrt", "cpu")])
def test_range_of_half_precision_is_found_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str, kind: str
) -> None:
    """On the GPU; on the host where engines are known by the factors, which a GPU's other sums could change."""
    asked: list[torch.device] = []

    def find(arch: Any, weights: Any, seen: Any = None) -> Fp16Scaling:
        asked.extend(weights[key].device for key in weights)
        return Fp16Scaling()

    monkeypatch.setattr(opening, "find_scaling", find)
    monkeypatch.setattr(opening, "CudaSession", lambda *args: SimpleNamespace())
    monkeypatch.setattr(opening, "_open_tensorrt", lambda *args: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))
    arch, weights = in_half(1)
    placement = Placement(backend, "fp16", META, torch.float16, "tensorrt", "", decode="kernels")
    unused: Any = None
    opening.open_session(arch, weights, RuntimeConfig(engine_cache_dir=tmp_path), placement, BuildConfig(), unused)
    assert {device.type for device in asked} == {kind} and len(asked) == len(weights)

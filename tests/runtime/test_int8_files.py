"""8-bit matrices on a CPU are found by the files of their checkpoint, and are right whatever happens to files, memory and store."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from t5_trt import BackendError, TRTT5EncoderModel, TRTT5ForConditionalGeneration
from t5_trt.engine.store import MANIFEST, PLAN, EngineStore
from t5_trt.graph.build_graph import build_host_graph
from t5_trt.graph.int8 import quantize
from t5_trt.graph.signature import STEP
from t5_trt.runtime import int8_weights, mapped_weights
from t5_trt.runtime.int8_weights import FILES, weights_digest
from t5_trt.runtime.mapped_weights import MappedWeights, unwritten_mappings
from t5_trt.runtime.onnxruntime_session import OrtSession
from t5_trt.runtime.open_graph import open_graph
from t5_trt.runtime.tensor_file import StoredTensors, write_tensors
from tests.tiny_models import batch, make_hugging_face

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which memory is a file's")
MATRIX = "decoder.block.0.layer.2.DenseReluDense.wo.weight"
NEW = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may be trusted as soon as they are written."""
    monkeypatch.setattr(mapped_weights, "_SETTLED_NS", 0)


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever the contents of weights are read to find their matrices."""
    made: list[int] = []
    monkeypatch.setattr(int8_weights, "weights_digest", lambda *args: made.append(1) or weights_digest(*args))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "model")


def saved(folder: Path, kind: str = "t5-v1.1", **options: Any) -> Path:
    make_hugging_face(kind).save_pretrained(folder, **options)
    return folder


def load(folder: Path, **options: Any) -> Any:
    settings = {
        "precision": "int8",
        "engine_cache_dir": folder.parent / "store",
        "num_threads": 1,
        "backend": "onnxruntime",
    }
    return TRTT5ForConditionalGeneration.from_pretrained(folder, **(settings | options))


def check(model: Any) -> torch.Tensor:
    """Tokens of a model whose session has the matrices of its parameters, or of `weights`."""
    tokens = model.generate(**batch(), **NEW)
    for name, tensor in quantize(model.architecture, model.state_dict()):
        stored = model.session._quantized[name]
        same = stored if stored.dtype != torch.uint8 else (stored.short() - 128).to(torch.int8)
        assert torch.equal(same, tensor), name
    return tokens


def write_into(path: Path, *, keep_time: bool = False) -> None:
    """Change the matrices of a checkpoint in place: same size, same inode."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    start = header + json.loads(content[8:header])[MATRIX]["data_offsets"][0]
    torch.frombuffer(content, dtype=torch.float32, offset=start, count=8).add_(1.0)  # outside of the sample
    with path.open("r+b") as file:
        file.write(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1", "mt5", "umt5"])
def test_matrices_of_known_files_are_found_without_reading_weights(
    kind: str, tmp_path: Path, digests: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model", kind)
    first = check(load(folder))
    assert len(digests) == 1
    monkeypatch.setattr(MappedWeights, "__getitem__", lambda *args: pytest.fail("a weight was read"))
    assert torch.equal(check(load(folder)), first) and len(digests) == 1
    entry = EngineStore(tmp_path / "store").entries()[0]
    assert len(entry.manifest[FILES]) == 1


def test_several_files_and_encoders(tmp_path: Path, digests: list[int]) -> None:
    folder = saved(tmp_path / "model", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert torch.equal(check(load(folder)), check(load(folder))) and len(digests) == 1
    options = {"precision": "int8", "engine_cache_dir": tmp_path / "store", "num_threads": 1, "backend": "onnxruntime"}
    states = [TRTT5EncoderModel.from_pretrained(folder, **options)(**batch()).last_hidden_state for _ in range(2)]
    assert torch.equal(*states) and len(digests) == 2


@pytest.mark.parametrize("keep_time", [False, True])
def test_file_that_was_written_to_is_read_again(folder: Path, keep_time: bool, digests: list[int]) -> None:
    check(load(folder))
    write_into(folder / "model.safetensors", keep_time=keep_time)
    check(load(folder))
    assert len(digests) == 2


def test_file_that_was_replaced_is_read_again(folder: Path, tmp_path: Path, digests: list[int]) -> None:
    check(load(folder))
    path, other = folder / "model.safetensors", tmp_path / "other"
    times = path.stat()
    shutil.copy(path, other)
    write_into(other)
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, path)
    check(load(folder))
    assert len(digests) == 2


def test_file_that_is_replaced_between_loading_and_use(folder: Path, tmp_path: Path, digests: list[int]) -> None:
    """Memory has the old file's weights, the store both files' matrices."""
    old = load(folder)
    check(load(folder))
    path, other = folder / "model.safetensors", tmp_path / "other"
    shutil.copy(path, other)
    write_into(other)
    os.replace(other, path)
    check(load(folder))
    check(old)
    assert len(digests) == 3


def by_data(model: Any) -> None:
    model.get_parameter(MATRIX).data.mul_(1.5)


def by_load_state_dict(model: Any) -> None:
    model.load_state_dict({key: tensor * 1.5 for key, tensor in model.state_dict().items()})


def by_assignment(model: Any) -> None:
    model.decoder.block[0].layer[2].DenseReluDense.wo.weight = torch.nn.Parameter(model.get_parameter(MATRIX) * 1.5)


@pytest.mark.parametrize("change", [by_data, by_load_state_dict, by_assignment])
@pytest.mark.parametrize("used", [False, True])
def test_weights_changed_in_memory_are_followed(change: Any, used: bool, folder: Path, digests: list[int]) -> None:
    check(load(folder))
    model = load(folder)
    if used and change is not by_data:  # writes through .data are noticed before the first use only
        check(model)
    change(model)
    check(model)
    assert len(digests) == 2


def test_wrapped_models(folder: Path, digests: list[int]) -> None:
    check(load(folder))
    hugging_face = make_hugging_face("t5-v1.1", seed=3)
    options = {
        "precision": "int8",
        "engine_cache_dir": folder.parent / "store",
        "num_threads": 1,
        "backend": "onnxruntime",
    }
    for wrapped, count in (
        (hugging_face, 2),
        (type(hugging_face).from_pretrained(folder), 2),
    ):  # the second's memory is the file's
        check(TRTT5ForConditionalGeneration.from_model(wrapped, **options))
        assert len(digests) == count


def test_young_files_are_not_trusted(folder: Path, digests: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They could be written to again within the time that the file system tells apart."""
    monkeypatch.setattr(mapped_weights, "_SETTLED_NS", 3600 * 10**9)
    check(load(folder))
    check(load(folder))
    assert len(digests) == 2 and FILES not in EngineStore(folder.parent / "store").entries()[0].manifest


def test_damaged_and_removed_matrices_are_made_again(folder: Path, digests: list[int]) -> None:
    check(load(folder))
    store = EngineStore(folder.parent / "store")
    plan = store.entries()[0].folder / PLAN
    plan.write_bytes(bytes(plan.stat().st_size))
    check(load(folder))
    store.clear()
    check(load(folder))
    assert len(digests) == 3


def test_copied_store_is_compared_by_digest(folder: Path, digests: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    check(load(folder))
    entry = EngineStore(folder.parent / "store").entries()[0]
    os.utime(entry.folder / PLAN, ns=(1, 1))
    check(load(folder))
    assert len(digests) == 1
    (entry.folder / MANIFEST).unlink()
    check(load(folder))
    assert len(digests) == 2


def test_store_that_loses_files_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_weights, "_opened", lambda path: None)
    with pytest.raises(BackendError, match="vanish"):
        load(folder).generate(**batch(), **NEW)


def test_graphs_of_matrices_in_a_file_and_in_memory_are_equal(tmp_path: Path) -> None:
    """A file that is gone, and tensors that were written to, are taken from memory."""
    large = make_hugging_face("t5-v1.0", d_ff=1200)  # as small matrices are embedded in graphs
    ours = TRTT5ForConditionalGeneration.from_model(large, num_threads=1, backend="onnxruntime")
    arch, weights = ours.architecture, ours.state_dict()
    made = dict(quantize(arch, weights))
    write_tensors(tmp_path / "file", made.items(), most=len(made))
    found = StoredTensors(tmp_path / "file")
    read = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) and torch.equal(read[name], tensor) for name, tensor in made.items())
    assert found.places().keys() == made.keys() == read.keys()

    def logits(quantized: Any) -> torch.Tensor:
        ours.session = OrtSession(arch, weights, num_threads=1, quantized=quantized)
        return ours(
            **batch(), decoder_input_ids=torch.randint(2, 200, (3, 5), generator=torch.Generator().manual_seed(0))
        ).logits

    expected, name = logits(made), MATRIX.removesuffix("weight") + "int8"
    assert name in ours.session._shared
    assert torch.equal(logits(found), expected)
    assert not ours.session._shared.keys() & made.keys()
    made[name], found[name] = made[name] // 2, found[name] // 2
    assert name not in found.places() and not torch.equal(logits(found), expected)
    changed = logits(made)
    assert torch.equal(logits(found), changed) and ours.session._shared.keys() & made.keys() == {name}
    (tmp_path / "file").unlink()
    assert not found.places() and torch.equal(logits(found), changed)


def test_largest_matrix_is_packed_first_and_garbage_collection_goes_on(tmp_path: Path) -> None:
    """While it is packed, its memory is there twice."""
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0", vocab_size=2000), num_threads=1)
    arch, weights = ours.architecture, ours.state_dict()
    write_tensors(tmp_path / "file", quantize(arch, weights), most=100)
    stored = StoredTensors(tmp_path / "file")
    opened: list[bytes] = []
    stand_in = SimpleNamespace(
        InferenceSession=lambda model, *args, **kwargs: opened.append(model),
        OrtValue=SimpleNamespace(ortvalue_from_numpy=lambda array: array),
    )
    options = SimpleNamespace(add_initializer=lambda *args: None, add_session_config_entry=lambda *args: None)
    build = partial(build_host_graph, STEP, arch, weights, ir.DataType.FLOAT, quantized=stored, fused=True)
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            _, inputs = open_graph(stand_in, build, options, {}, stored)
            assert gc.isenabled() == enabled
        finally:
            gc.enable()
    graph = ir.from_proto(onnx.load_from_string(opened[0])).graph
    assert "lm_head.int8" in [value.name for value in graph[0].inputs if value] and "position" in inputs


def test_mappings_with_own_pages_are_left_out(tmp_path: Path) -> None:
    parts = ["Rss: 4 kB", "Anonymous: {} kB", "Swap: {} kB"]

    def entry(number: int, modes: str = "rw-p", path: str = "/a b", own: int = 0, swapped: int = 0) -> str:
        head = f"{number}000-{number}fff {modes} 00002000 fe:00 77   {path}"
        return "\n".join([head, parts[0], parts[1].format(own), parts[2].format(swapped)])

    smaps = tmp_path / "smaps"
    entries = [entry(1), entry(2, own=4), entry(3, swapped=4), entry(4, modes="rw-s"), entry(5, path="[heap]")]
    smaps.write_text("\n".join([*entries, entry(6).split("Swap")[0]]))
    (found,) = unwritten_mappings(smaps)
    assert (found.start, found.end, found.offset, found.inode, found.path) == (0x1000, 0x1FFF, 0x2000, 77, "/a b")
    assert unwritten_mappings(tmp_path / "none") == []

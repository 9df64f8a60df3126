"""CTranslate2 beside ours in `t5-trt bench`, and the records of `benchmarks.cpu_peers`.

CTranslate2 itself runs where it is installed. Elsewhere a stand-in with the calls that are made of it takes its place: a converter that
writes into the model that it is given, as CTranslate2's does, and a translator that runs Hugging Face's model.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.cpu_contestant import Contestant
from benchmarks.cpu_peers import compared, started, store
from t5_trt import BackendError, InputError
from t5_trt.cli import app
from t5_trt.tools import random_models
from t5_trt.tools.benchmark import Case, load_benchmark, measure
from t5_trt.tools.ctranslate2_library import import_ctranslate2
from t5_trt.tools.ctranslate2_peer import CTranslate2Model, compute_type_of
from t5_trt.tools.records import read_records
from tests.conftest import SHIPPED

CPU = torch.device("cpu")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module in place of ctranslate2; what its translators were made with is in `calls`."""
    module, converters = ModuleType("ctranslate2"), ModuleType("ctranslate2.converters")
    converted: dict[str, Any] = {}
    module.calls = []  # type: ignore[attr-defined]

    class TransformersConverter:
        def __init__(self, path: str) -> None:
            assert (Path(path) / "config.json").exists()

        def convert(self, output: str, quantization: str) -> str:
            model, tokenizer = self.load_model(None, ""), self.load_tokenizer(None, "")  # type: ignore[attr-defined]
            assert len(tokenizer.get_vocab()) == model.config.vocab_size
            converted[output] = copy.deepcopy(model)
            if quantization == "int8":
                for parameter in model.parameters():
                    parameter.detach().zero_()
            return output

    class Translator:
        def __init__(self, path: str, device: str, **options: Any) -> None:
            self.model = converted[path]
            module.calls.append({"device": device, **options})  # type: ignore[attr-defined]
            module.thread = threading.current_thread()  # type: ignore[attr-defined]

        def translate_batch(self, source: list[list[str]], **options: Any) -> list[Any]:
            rows = []
            for tokens in source:
                found = self.model.generate(
                    torch.tensor([[int(token) for token in tokens]]),
                    num_beams=options["beam_size"],
                    min_new_tokens=options["min_decoding_length"],
                    max_new_tokens=options["max_decoding_length"],
                )
                rows.append(SimpleNamespace(hypotheses=[[str(token) for token in found[0, 1:].tolist()]]))
            return rows

    converters.TransformersConverter = TransformersConverter  # type: ignore[attr-defined]
    module.Translator = Translator  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ctranslate2", module)
    monkeypatch.setitem(sys.modules, "ctranslate2.converters", converters)
    return module


@pytest.fixture
def ctranslate2(request: pytest.FixtureRequest) -> Any:
    """CTranslate2 where it is installed, else the stand-in."""
    if importlib.util.find_spec("ctranslate2") is None:
        return request.getfixturevalue("stand_in")
    return importlib.import_module("ctranslate2")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(random_models.SHAPES, "tiny", {"d_model": 64, "d_ff": 128, "num_heads": 2, "num_layers": 2})
    return "random:tiny"


@pytest.mark.parametrize("beams", [1, 2])
def test_peer_gives_the_tokens_of_the_model_that_was_converted(ctranslate2: Any, tiny: str, beams: int) -> None:
    benchmark = load_benchmark(tiny, threads=1, against="ctranslate2", backend="onnxruntime")
    record = measure(benchmark, Case(batch=2, source_tokens=6, new_tokens=5, num_beams=beams), runs=1)
    assert record["ctranslate2_fp32_tokens_equal_share"] == 1.0 and record["ctranslate2_fp32_ms"] > 0


def test_conversion_to_8_bits_leaves_the_model_as_it_is(ctranslate2: Any, tiny: str) -> None:
    """CTranslate2's converter rounds in the memory that it is given, which Hugging Face's model and ours would share."""
    model = random_models.random_t5("tiny")
    before = copy.deepcopy(model.state_dict())
    CTranslate2Model(model, "int8", CPU, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_padding_is_no_part_of_a_source(ctranslate2: Any, tiny: str) -> None:
    model = random_models.random_t5("tiny")
    request = {"num_beams": 1, "do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    peer = CTranslate2Model(model, "fp32", CPU, 1)
    ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    mask = (ids != 0).long()
    expected = model.generate(ids, attention_mask=mask, **request)
    assert torch.equal(peer.generate(input_ids=ids, attention_mask=mask, **request), expected)


def test_precision_and_threads_are_those_of_ours(stand_in: Any, tiny: str) -> None:
    load_benchmark(tiny, threads=1, against="ctranslate2", backend="onnxruntime")
    (call,) = stand_in.calls
    assert call["compute_type"] == "float32" and call["intra_threads"] == 1 and call["device"] == "cpu"
    assert [compute_type_of(name, "cuda") for name in ("fp16", "bf16", "int8")] == [
        "float16",
        "bfloat16",
        "int8_float16",
    ]
    with pytest.raises(InputError, match="does not compute in 'bf16' on cpu; it does in fp32, int8"):
        compute_type_of("bf16", "cpu")


def test_thread_that_loads_a_translator_ends(stand_in: Any, tiny: str) -> None:
    """It would keep a pool of threads, beside which those of the translator go to sleep between two products."""
    CTranslate2Model(random_models.random_t5("tiny"), "fp32", CPU, 1)
    assert stand_in.thread is not threading.main_thread() and not stand_in.thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "RTLD_DEEPBIND"), reason="only glibc binds a library to its own copies first")
def test_package_is_bound_to_its_own_thread_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch's would be taken otherwise, and both would count the other's threads as theirs."""
    (tmp_path / "ctranslate2.py").write_text("import sys\nflags = sys.getdlopenflags()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ctranslate2", raising=False)
    before = sys.getdlopenflags()
    loaded = import_ctranslate2()
    monkeypatch.delitem(sys.modules, "ctranslate2")
    assert loaded.flags == before | os.RTLD_DEEPBIND and sys.getdlopenflags() == before


def test_sampling_is_left_out_with_the_reason(stand_in: Any, tiny: str) -> None:
    benchmark = load_benchmark(tiny, threads=1, against="ctranslate2", backend="onnxruntime")
    record = measure(benchmark, Case(new_tokens=2, do_sample=True), runs=1)
    assert "draws other tokens" in record["left_out"]["ctranslate2_fp32"] and record["tokens_equal"]


def test_missing_package_and_unknown_peers_are_refused(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    ended = CliRunner().invoke(app, ["bench", str(SHIPPED), "--against", "ctranslate2"])
    assert isinstance(ended.exception, BackendError) and "t5-trt[ctranslate2]" in str(ended.exception)
    refused = CliRunner().invoke(app, ["bench", str(SHIPPED), "--against", "onnx"])
    assert refused.exit_code == 2 and "--against" in refused.stderr
    with pytest.raises(InputError, match="against got 'onnx'"):
        load_benchmark(tiny, against="onnx")


def test_command_shows_the_peer(stand_in: Any, tmp_path: Path) -> None:
    file, picture = tmp_path / "records.json", tmp_path / "x.png"
    options = ("--new-tokens", "2", "--runs", "1", "--threads", "1", "--json", str(file), "--plot", str(picture))
    done = CliRunner().invoke(app, ["bench", str(SHIPPED), "--against", "ctranslate2", "--precision", "int8", *options])
    assert done.exit_code == 0, done.output
    assert "CT2 int8" in done.stdout and "ctranslate2_int8_ms" in read_records(file)[0] and picture.exists()


def test_records_hold_ratios_within_a_run_and_replace_older_ones_of_their_case(tmp_path: Path) -> None:
    times = {
        "hf_eager_fp32": 100.0,
        "ours_fp32": 50.0,
        "ours_int8": 20.0,
        "ctranslate2_fp32": 60.0,
        "ctranslate2_int8": 30.0,
    }
    tokens = {name: [[1, 2], [3, 4 if name.endswith("fp32") else 9]] for name in times}
    found = compared({name: [ms, ms / 2, ms * 3] for name, ms in times.items()}, tokens)
    assert found["times_hf_eager"] == {
        "ours_fp32": 2.0,
        "ours_int8": 5.0,
        "ctranslate2_fp32": 1.67,
        "ctranslate2_int8": 3.33,
    }
    assert found["ours_over_ctranslate2"] == {"fp32": 1.2, "int8": 1.5}
    assert found["equal_to_hf_eager"]["ours_fp32"] == 1.0 and found["equal_to_hf_eager"]["ours_int8"] == 0.75
    file = tmp_path / "x.json"
    for number, case in enumerate(("4 beams", "batch 1", "4 beams")):
        store(file, {"case": case, "number": number})
    assert json.loads(file.read_text()) == [{"case": "batch 1", "number": 1}, {"case": "4 beams", "number": 2}]


def test_contestants_answer_in_turns_with_their_start_and_memory(tmp_path: Path) -> None:
    """Hugging Face and ours in processes of their own, on the shipped model."""
    shutil.copytree(SHIPPED, tmp_path / "model")
    contestants = {name: Contestant(name, tmp_path, 1) for name in ("hf_eager_fp32", "ours_fp32")}
    try:
        found = {name: each.generate([[5, 6, 7], [8, 9, 10]], 4, 2) for name, each in contestants.items()}
    finally:
        for each in contestants.values():
            each.close()
    assert found["hf_eager_fp32"][1] == found["ours_fp32"][1] and all(ms > 0 for ms, _ in found.values())
    assert all(0 < each.cores < 2 for each in contestants.values())
    with pytest.raises(RuntimeError, match="a contestant ended"):
        Contestant("ours_fp32", tmp_path / "none", 1)


def test_starts_are_measured_in_fresh_processes(tmp_path: Path) -> None:
    """Ours in 8 bits without stored matrices, and with them."""
    shutil.copytree(SHIPPED, tmp_path / "model")
    found = started(["ours_int8"], tmp_path, threads=1, runs=1)
    for start in (found["ours_int8_first"], found["ours_int8"]):
        assert all(start[field] > 0 for field in ("import_s", "first_token_s", "weights_mb", "anonymous_over_weights"))
        assert start["peak_above_imports_mb"] > 0

"""Random input of every kind: the Hugging Face class's result, or a documented error; never another result and never a crash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration
from typer.testing import CliRunner

from t5_trt import CheckpointError, InputError, T5TRTError, TRTT5ForConditionalGeneration, UnsupportedModelError
from t5_trt.cli import app
from t5_trt.engine.store import EngineStore, read_engine
from tests.tiny_models import SIZES, VOCAB, batch, make_hugging_face

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
HEADS = SIZES["num_heads"]
OTHERS = (torch.float32, torch.float16, torch.bool, torch.complex64)


def cases(count: int) -> Any:
    """Settings of a test of so many cases, the same ones in every run; T5_TRT_TEST_CASES=5 makes five times as many."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    count *= int(os.environ.get("T5_TRT_TEST_CASES", "1"))
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    hugging_face = make_hugging_face("t5-v1.0")
    return hugging_face, TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)


@st.composite
def tensors(draw: st.DrawFn, rows: int, tokens: int, low: int, high: int) -> torch.Tensor:
    """Mostly [rows, tokens] of integers in range, now and then of another shape, type or range."""
    odd = draw(st.sampled_from(("", "", "", "", "shape", "type", "range")))
    shape = draw(st.lists(st.integers(0, 4), max_size=4)) if odd == "shape" else [rows, tokens]
    dtype = draw(st.sampled_from(OTHERS if odd == "type" else INTEGERS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if odd == "range":
        low, high, dtype = low - 3, high + 3, torch.int64
    return torch.randint(low, high, shape, generator=generator).to(dtype)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `forward`."""
    rows, source, target = (draw(st.integers(1, 4)) for _ in range(3))
    call = {
        "input_ids": draw(tensors(rows, source, 0, VOCAB)),
        "decoder_input_ids": draw(tensors(rows, target, 0, VOCAB)),
    }
    for name, tokens in (("attention_mask", source), ("decoder_attention_mask", target)):
        if draw(st.booleans()):
            call[name] = draw(st.one_of(tensors(rows, tokens, 0, 2), wide_masks(rows, source, target)))
    return call


@st.composite
def wide_masks(draw: st.DrawFn, rows: int, source: int, target: int) -> torch.Tensor:
    """Four axes, sizes that often go with the others; 0 keeps a score, as in an additive mask."""
    sizes = ((1, rows, 3), (1, HEADS, 2), (1, source, target), (source, target, 1))
    return torch.zeros([draw(st.sampled_from(each)) for each in sizes])


def is_right(call: dict[str, Any]) -> bool:
    """Whether `forward` must take a call."""
    ids, decoder = call["input_ids"], call["decoder_input_ids"]
    for tensor in (ids, decoder):
        if tensor.dtype not in INTEGERS or tensor.dim() != 2 or tensor.numel() == 0:
            return False
        if int(tensor.min()) < 0 or int(tensor.max()) >= VOCAB:
            return False
    narrow = [(call.get("attention_mask"), ids), (call.get("decoder_attention_mask"), decoder)]
    return len(ids) == len(decoder) and all(
        mask is None or (mask.shape == of.shape and int(mask.real.amin()) >= 0) for mask, of in narrow
    )


@cases(600)
@given(call=calls())
def test_forward(models: tuple[Any, Any], call: dict[str, Any]) -> None:
    hugging_face, ours = models
    right = is_right(call)
    try:
        got = ours(**call).logits
    except InputError:
        assert not right
        return
    wide = {name: tensor.real.long() for name, tensor in call.items() if "mask" not in name}
    for name in call.keys() - wide.keys():  # of two axes, anything but 0 is a token
        wide[name] = call[name] if call[name].dim() == 4 else (call[name] != 0).long()
    with torch.no_grad():
        expected = hugging_face(**wide).logits
    hidden = wide.get("decoder_attention_mask")
    if hidden is not None and hidden.dim() == 2:  # what padding before the first token gives means nothing
        seen = hidden.cumsum(1) > 0
        got, expected = got[seen], expected[seen]
    assert torch.allclose(got, expected, atol=1e-3, rtol=1e-3)


OPTIONS: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (-1, 0, 1, 3, 6, 2.5, "3"),
    "min_new_tokens": (-1, 2, 9),
    "num_beams": (-1, 0, 1, 2, 3),
    "num_return_sequences": (0, 1, 2, 4),
    "length_penalty": (-2.0, 0.0, 1.5),
    "early_stopping": (True, False, "never", "always"),
    "repetition_penalty": (-1.0, 0.0, 1.3),
    "no_repeat_ngram_size": (-1, 0, 2),
    "eos_token_id": (1, [1, 7], [], 500, -4),
    "pad_token_id": (0, 3, -1),
    "decoder_start_token_id": (0, 5, 500, [0, 0]),
    "forced_eos_token_id": (1, 9, 1000),
    "suppress_tokens": ([1], [5, 6], [5000]),
    "bad_words_ids": ([[5]], [[5, 6]], [], [[]], [[900]]),
    "output_scores": (True,),
    "nonsense": (1,),
}


@cases(240)
@given(
    ids=tensors(2, 4, 2, VOCAB),
    options=st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in OPTIONS.items()}),
)
def test_generate(models: tuple[Any, Any], ids: torch.Tensor, options: dict[str, Any]) -> None:
    """What the Hugging Face class refuses is refused, what it does is done."""
    hugging_face, ours = models
    if len(options) > 5:  # most large sets are refused for the same few reasons
        options = dict(list(options.items())[:5])
    arguments = {"max_new_tokens": 5, "do_sample": False, **options}
    expected: Any = None
    with contextlib.suppress(Exception):
        expected = hugging_face.generate(ids, **arguments)
    try:
        got = ours.generate(ids, **arguments)
    except (T5TRTError, ValueError, TypeError, IndexError, RuntimeError, AttributeError, ZeroDivisionError):
        assert expected is None, (arguments, ids)
        return
    if expected is not None:
        assert torch.equal(got, expected), arguments


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    make_hugging_face("t5-v1.0").save_pretrained(folder)
    return folder


def logits_of(load: Any, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(**batch(), decoder_input_ids=torch.tensor([[0, 3]] * 3)).logits  # type: ignore[no-any-return]


def load_ours(folder: Path) -> Any:
    return TRTT5ForConditionalGeneration.from_pretrained(folder, num_threads=1)


def check_folder(folder: Path) -> None:
    """Our class gives what the Hugging Face class gives, or a documented error."""
    try:
        got = logits_of(load_ours, folder)
    except (CheckpointError, UnsupportedModelError, InputError):
        return
    config = json.loads((folder / "config.json").read_text())
    # the Auto class takes no config without a type, T5's own class does
    theirs = AutoModelForSeq2SeqLM if config.get("model_type") else T5ForConditionalGeneration
    try:
        expected = logits_of(theirs.from_pretrained, folder)
    except (RuntimeError, AttributeError):  # we take both from the weights
        assert config["vocab_size"] != VOCAB or config["dtype"] != "float32"
        return
    assert torch.allclose(got, expected, atol=1e-3, rtol=1e-3, equal_nan=True)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 130), st.floats(-2, 2), st.text(max_size=4), st.just([]), st.just({})
)
KEYS = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "dropout_rate", "model_type",
    "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj",
    "is_encoder_decoder", "tie_word_embeddings", "pad_token_id", "decoder_start_token_id", "architectures", "dtype",
)  # fmt: skip


@cases(60)
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
def test_configs(checkpoint: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / hashlib.sha256(repr(changes).encode()).hexdigest()[:12]
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    check_folder(folder)
    shutil.rmtree(folder)


@cases(60)
@given(
    name=st.sampled_from(("config.json", "generation_config.json", "model.safetensors")),
    place=st.integers(0, 3000),
    piece=st.binary(max_size=4),
    cut=st.booleans(),
)
def test_damaged_files(checkpoint: Path, tmp_path: Path, name: str, place: int, piece: bytes, cut: bool) -> None:
    """Bytes overwritten near the beginning, or the rest missing."""
    folder = tmp_path / hashlib.sha256(f"{name}{place}{piece!r}{cut}".encode()).hexdigest()[:12]
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    data = (folder / name).read_bytes()
    place = min(place, len(data))
    (folder / name).write_bytes(data[:place] + piece + (b"" if cut else data[place + len(piece) :]))
    check_folder(folder)
    shutil.rmtree(folder)


@cases(1000)
@given(name=st.sampled_from(("engine.plan", "manifest.json")), place=st.integers(0, 400), piece=st.binary(max_size=5))
def test_damaged_engines(tmp_path: Path, name: str, place: int, piece: bytes) -> None:
    """A plan is handed out only with the bytes that were built."""
    plan, store = bytes(range(256)), EngineStore(tmp_path / "store")
    key = "0123456789abcdef" * 2
    if not (store.root / key).is_dir():
        store.get_or_build(key, {"graph": "step"}, lambda folder: (folder / "engine.plan").write_bytes(plan) and None)
    path = store.root / key / name
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + piece + whole[place + len(piece) :])
    problem, got = read_engine(store.root / key, key, (os.getuid(),))
    found = store.get(key)
    path.write_bytes(whole)
    assert found in (None, plan) and (problem is None) == (got == plan)


WORDS = st.sampled_from(
    ("info", "build", "generate", "verify", "cache", "list", "show", "prune", "clear", "path", "check", "bench", "--help",
     "--backend", "tensorrt", "nothing", "--precision", "fp16", "fp99", "--flavor", "rtx", "--max-batch", "-3", "0", "--json",
     "/nowhere", "", "--compute-capability", "8.6", "--yes", "\x00", "ä")
)  # fmt: skip


@cases(100)
@given(arguments=st.lists(WORDS, max_size=5))
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """An exit status of 0 to 2 and words, no traceback."""
    monkeypatch.setenv("T5_TRT_CACHE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, (SystemExit, T5TRTError)), arguments

"""The benchmark of the choice of tokens, on a CPU with a small model: a record for each search, and torch's operations beside the kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decode, gpu, kernel_models, token_choice
from t5_trt.runtime import cuda_kernels
from tests.stand_in_choice import use_stand_ins
from tests.stand_in_kernels import kernels_pair


def test_a_record_for_each_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Any] = []

    def open_model(*_: Any) -> Any:
        made.append(kernels_pair(monkeypatch, tmp_path / str(len(made)), packs=True)[1])
        made[-1].generation_config.eos_token_id = None
        return made[-1]

    together = use_stand_ins(monkeypatch)
    stand_in = cuda_kernels.choice_kernels
    monkeypatch.setattr(kernel_models, "DEVICE", "cpu")
    monkeypatch.setattr(decode, "random_source", lambda batch, size: gpu.torch.randint(2, 50, (batch, size)))
    monkeypatch.setattr(gpu.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(token_choice, "open_model", open_model)
    monkeypatch.setattr(token_choice, "FEW", 3)
    monkeypatch.setattr(token_choice, "MANY", 7)
    monkeypatch.setattr(token_choice, "MOST_WITH_BEAMS", 1)
    monkeypatch.setattr(token_choice, "t5_base", lambda layers: kernels_pair(monkeypatch, tmp_path / "hf")[0])
    token_choice.main(["--out", str(tmp_path), "--batches", "1,3", "--runs", "1"])
    records = json.loads((tmp_path / "token-choice.json").read_text())
    assert [record["search"] for record in records[:8]] == list(token_choice.SEARCHES)
    assert len(records) == 14 and together and set(together) == {1, 3}
    for record in records:
        assert record["equal_rows"] == record["batch"] and "torch_step_us" in record and "failed" not in record
    assert cuda_kernels.choice_kernels is stand_in

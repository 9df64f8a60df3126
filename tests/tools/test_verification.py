"""`compare` and the command `t5-trt verify`: equal models, differing ones, texts and batches, settings, activations."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import InputError, TRTT5ForConditionalGeneration, cli, compare
from t5_trt.tools import verify
from tests.conftest import SHIPPED
from tests.tiny_models import batch, make_hugging_face


def test_equal_models(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    found = compare(ours, hugging_face, [batch(), batch(2, 20)], max_new_tokens=9, num_beams=2)
    assert found.sequences == found.equal == 5 and found.share == 1.0 and found.first_difference is None
    assert 0 < found.mean_logit_error < found.max_logit_error < 1e-3 and found.relative_logit_error < 1e-4
    assert abs(found.kl_divergence) < 1e-5 and found.activations == ()


def test_other_weights_differ(v11: tuple[Any, Any]) -> None:
    found = compare(v11[1], make_hugging_face("t5-v1.1", seed=3), [batch()], max_new_tokens=9)
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
    hugging_face = make_hugging_face("t5-v1.1")
    with torch.no_grad():
        for name, parameter in hugging_face.named_parameters():
            if name.endswith(".wo.weight"):
                parameter.mul_(1e5)
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    rows = compare(ours, hugging_face, [batch()], max_new_tokens=3, activations=True).activations
    assert max(row.largest for row in rows) > 65504 and all(row.half_share < 1.0 for row in rows)


def test_nothing_to_compare(v11: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="texts got"):
        compare(v11[1], v11[0], [])


# --- the command ---


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """Status and JSON of ``t5-trt verify``."""
    capsys.readouterr()
    status = cli.run(["verify", *arguments, "--json"])
    shown = capsys.readouterr()
    return status, json.loads(shown.out) if shown.out else shown.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a tokenizer."""
    made = tmp_path_factory.mktemp("checkpoint")
    make_hugging_face("t5-v1.1").save_pretrained(made)
    return made


def test_greedy_and_beams_are_judged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, facts = run(capsys, str(folder), "--max-new-tokens", "4")
    assert status == 0 and facts["passed"] and list(facts["searches"]) == ["greedy", "4 beams"]
    assert (
        facts["limits"] == {"at_least": 1.0, "max_relative_error": 1e-3} and "want of a tokenizer" in facts["sources"]
    )
    assert all(each["share"] == 1.0 and each["relative_logit_error"] < 1e-4 for each in facts["searches"].values())
    status, facts = run(capsys, str(folder), "--max-new-tokens", "4", "--num-beams", "3", "--layers", "--activations")
    assert status == 0 and list(facts["searches"]) == ["3 beams"]
    assert facts["layers"][-1]["name"] == "logits" and facts["activations"][0]["half_share"] > 0
    assert run(capsys, str(folder), "--max-new-tokens", "2", "--max-relative-error", "1e-12")[0] == 1
    assert cli.run(["verify", str(folder), "--max-new-tokens", "2"]) == 0
    assert "within the limits: at least 1 of the sequences" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [8.0, 1.01, math.nan])
def test_wrong_logits_with_right_tokens_fail(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """As those of a UMT5 whose logits were multiplied by d_model**-0.5: greedy search and beams do not see a factor."""
    logits = verify._logits

    def scaled(model: Any, *arguments: Any) -> Any:
        ours = isinstance(model, TRTT5ForConditionalGeneration)
        return logits(model, *arguments) * (factor if ours else 1.0)

    monkeypatch.setattr(verify, "_logits", scaled)
    status, facts = run(capsys, str(folder), "--max-new-tokens", "3")
    assert status == 1 and not facts["passed"] and all(each["share"] == 1.0 for each in facts["searches"].values())
    assert [problem.split(":")[0] for problem in facts["problems"]] == ["greedy", "4 beams"]
    error = facts["searches"]["greedy"]["relative_logit_error"]
    assert error is None if math.isnan(factor) else error == pytest.approx(factor - 1, rel=1e-3)


def test_the_shipped_model_in_int8(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The line of the README, on the model's own language."""
    status, facts = run(capsys, str(SHIPPED), "--precision", "int8", "--at-least", "0.98", "--cache-dir", str(tmp_path))
    assert status == 0 and facts["precision"] == "int8" and facts["sources"] == "sentences in Japanese kana"
    assert [each["sequences"] for each in facts["searches"].values()] == [16, 16]
    assert 1e-3 < facts["searches"]["greedy"]["relative_logit_error"] < 0.1


def test_layers_without_polygraphy_fail_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    monkeypatch.setattr(
        TRTT5ForConditionalGeneration, "from_pretrained", lambda *args, **options: pytest.fail("loaded")
    )
    status, err = run(capsys, str(folder), "--layers")
    assert status == 1 and "t5-trt[verify]" in err


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"do_sample": True, "num_beams": 3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"min_length": 30, "max_length": 40, "early_stopping": "never", "forced_eos_token_id": 1},
        {"max_time": 1e-9, "stop_strings": ["a"], "prompt_lookup_num_tokens": 2, "penalty_alpha": 0.6, "top_k": 4},
        {"pad_token_id": None, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "forced_bos_token_id": 7},
    ],
)
def test_settings_of_a_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, settings: dict[str, Any]
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    own = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, **settings}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    status, facts = run(capsys, str(tmp_path), "--max-new-tokens", "5")
    assert status == 0, facts
    beams = settings.get("num_beams", 4)
    sampling = ["sampling"] if settings.get("do_sample") else []
    assert list(facts["searches"]) == ["greedy", f"{beams} beams", *sampling]
    results = settings.get("num_return_sequences", 1)
    rows = facts["searches"]["greedy"]["sequences"]
    assert facts["searches"][f"{beams} beams"]["sequences"] == rows * results
    assert run(capsys, str(tmp_path), "--max-new-tokens", "5", "--num-beams", "1")[0] == 0


def test_several_results_of_a_source_are_compared(v11: tuple[Any, Any]) -> None:
    found = compare(v11[1], v11[0], [batch()], max_new_tokens=6, num_beams=4, num_return_sequences=3)
    assert found.sequences == found.equal == 9 and found.relative_logit_error < 1e-4
    found = compare(v11[1], v11[0], [batch()], max_new_tokens=6, do_sample=True, num_return_sequences=2)
    assert found.sequences == found.equal == 6

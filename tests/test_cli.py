"""The command line, as a user runs it: in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5_trt.cli import spread_values
from tests.conftest import ROOT, SHIPPED


def run(*arguments: str, cache: Path | None = None, text: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if cache is not None:
        environment["T5_TRT_CACHE"] = str(cache)
    command = [sys.executable, "-m", "t5_trt.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, input=text, timeout=200)


def test_help_is_quick_and_complete() -> None:
    shown = run("--help").stdout
    assert all(word in shown for word in ("info", "build", "generate", "verify", "cache"))


def test_info_tells_what_is_chosen_and_why() -> None:
    shown = " ".join(run("info").stdout.split())
    assert "onnxruntime in fp32 on cpu" in shown and "none that PyTorch can use" in shown
    assert 'pip install "t5-trt[cu13]"' in shown


def test_generate_from_arguments_and_from_a_pipe() -> None:
    assert run("generate", str(SHIPPED), "がっこう", "コーヒー").stdout.split() == ["gakkō", "kōhī"]
    assert run("generate", str(SHIPPED), "--num-beams", "3", text="がっこう\nコーヒー\n").stdout.split() == [
        "gakkō",
        "kōhī",
    ]


def test_build_then_look_at_the_cache(tmp_path: Path) -> None:
    """The command of the documentation: engines for three kinds of GPU on a machine that has none."""
    store = tmp_path / "store"
    arguments = ("build", str(SHIPPED), "--flavor", "rtx", "--compute-capability", "8.6", "8.9", "12.0")
    sizes = ("--source-tokens", "32", "--batch", "2")
    built = run(*arguments, *sizes, cache=store)
    assert built.returncode == 0, built.stderr
    assert "3 engines in" in built.stdout and "decoder_queries B2 S32 T128 Q8 fp16" in built.stdout
    again = run(*arguments, *sizes, cache=store)
    assert "building the engine" in built.stderr and "building the engine" not in again.stderr

    listed = run("cache", "list", cache=store).stdout
    assert "3 engines" in listed and "decoder_step" in listed and "rtx" in listed
    key = next(path.name for path in store.iterdir() if not path.name.startswith(".") and path.is_dir())
    manifest = json.loads(run("cache", "show", key[:10], cache=store).stdout)
    assert manifest["key"] == key and manifest["gpu"] == {"compute_capabilities": ["8.6", "8.9", "12.0"]}
    assert run("cache", "path", cache=store).stdout.strip() == str(store)
    assert run("cache", "prune", "--max-gb", "0", cache=store).stdout.strip() == "3 engines deleted"
    assert run("cache", "clear", cache=store).stdout.strip() == "0 engines deleted"


def test_errors_have_no_traceback(tmp_path: Path) -> None:
    cases = (
        (("build", str(SHIPPED), "--flavor", "rtx"), "there is no GPU here to build for"),
        (("build", str(SHIPPED), "--flavor", "rtx", "--compute-capability", "9.0"), "builds for 7.5"),
        (("generate", str(tmp_path), "x"), "config"),
        (("cache", "show", "nothing"), "0 engines have a key that begins with 'nothing'"),
    )
    for arguments, message in cases:
        ended = run(*arguments, cache=tmp_path / "store")
        assert ended.returncode == 1 and message in " ".join(ended.stderr.split()), ended.stderr


def test_values_after_one_option() -> None:
    option = "--compute-capability"
    assert spread_values(["build", option, "8.6", "8.9", "--batch", "2"]) == [
        "build", option, "8.6", option, "8.9", "--batch", "2",
    ]  # fmt: skip


def test_build_with_calibration(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("がっこう\nコーヒー\n", encoding="utf-8")
    rtx = ("--flavor", "rtx", "--compute-capability", "8.6", "--calibrate", str(texts))
    done = run("build", str(SHIPPED), *rtx, "--target-tokens", "16", "--source-tokens", "16", cache=tmp_path / "store")
    assert done.returncode == 0 and "3 engines" in done.stdout, done.stderr


def test_verify_precision_and_thresholds(tmp_path: Path) -> None:
    """Status 1 beyond a threshold; the table of activations names the place that comes nearest to the limit first."""
    int8 = ("verify", str(SHIPPED), "--precision", "int8", "--max-new-tokens", "8")
    loose = run(*int8, "--at-least", "0.3", "--activations", cache=tmp_path)
    assert loose.returncode == 0 and "onnxruntime int8 against" in loose.stdout, loose.stderr
    assert "KL divergence" in loose.stdout and "decoder.block.0.layer.2.DenseReluDense.wo, output" in loose.stdout
    shares = [float(line.split("│")[3].strip().rstrip("%")) for line in loose.stdout.splitlines() if "%" in line]
    assert shares == sorted(shares, reverse=True) and 0 < shares[0] < 100
    assert run(*int8, "--at-least", "0", "--max-relative-error", "1e-6", cache=tmp_path).returncode == 1


def test_verify_tokens_logits_and_layers(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("がっこう\nコーヒー\nきのう\nさくら\n", encoding="utf-8")
    done = run("verify", str(SHIPPED), "--texts", str(texts), "--num-beams", "2", "--layers")
    assert done.returncode == 0, done.stderr
    assert "equal sequences: 4 of 4" in done.stdout and "first difference" not in done.stdout
    rows = [line for line in done.stdout.splitlines() if "e-0" in line and "│" in line]
    assert [row.split("│")[1].strip() for row in rows][:2] == ["encoder.block.0", "encoder.block.1"]
    assert "logits" in rows[-1]


@pytest.mark.parametrize("command", ["info", "build", "generate", "verify", "bench"])
def test_help_shows_examples(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0 and f"t5-trt {command}" in done.stdout.split("xample")[-1], done.stdout

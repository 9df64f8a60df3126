"""Every example runs, as a user runs it, on the shipped model."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from tests.conftest import ROOT, SHIPPED

FOLDER = ROOT / "examples"
DATA = FOLDER / "data"
NEW = (
    "quickstart", "japanese_titles", "streaming", "transliterate_file", "prebuild_engines", "fine_tuned",
    "seq2seq_evaluation", "array_interfaces", "adapters",
)  # fmt: skip


def run(name: str, *arguments: str | Path, text: str = "") -> SimpleNamespace:
    """Run an example in this process, which has imported torch already; it reads the text from standard input."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(FOLDER / f"{name}.py"), *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(text))
        patch.chdir(ROOT)
        patch.syspath_prepend(FOLDER)  # where Python finds the modules beside a script
        runpy.run_path(sys.argv[0], run_name="__main__")
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def test_readme_lists_every_example() -> None:
    table = re.findall(r"^\| `(\w+\.py)`", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", NEW)
def test_header_shows_the_command(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert f"python examples/{name}.py" in source.split('"""')[1]
    assert len(source.splitlines()) < 150


def test_quickstart() -> None:
    """As a process of its own, which has nothing but what the example imports."""
    command = [sys.executable, str(FOLDER / "quickstart.py"), "--text", "がっこう", "--num-beams", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    shown = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=120, check=True
    ).stdout
    assert re.search(r"transformers: gakkō .*ms\)", shown) and re.search(r"t5_trt: gakkō .*ms\)", shown)
    assert "same tokens: yes" in shown and "backend onnxruntime" in shown


def test_titles_from_a_pipe() -> None:
    """Normalization turns half-width kana and wide spaces into those that the model knows."""
    lines = "ｺｰﾋｰ\n\nがっこうへ　いきます。\n"
    shown = run("japanese_titles", "--normalize", "nfkc", "--candidates", "2", text=lines).stdout.splitlines()
    assert [len(line.split("\t")) for line in shown] == [2, 2]
    assert [line.split("\t")[0] for line in shown] == ["kōhī", "gakkōhe ikimasu."]


def test_summary_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "article.txt"
    file.write_text("がっこうへ\nいきます。\n", encoding="utf-8")
    shown = run("japanese_titles", SHIPPED, "--task", "summary", "--whole", "--file", file, "--num-beams", "1").stdout
    assert shown == "gakkōhe ikimasu.\n"


def test_streaming(shipped: tuple[Any, Any, Any]) -> None:
    """The streamers are Transformers' own, which cut text finer since 5.24: the pieces are those of the Hugging Face model."""
    text = "わたしは コーヒーを のみます。"
    shown = run("streaming", "--text", text).stdout.splitlines()
    assert shown[1] == "watashiha kōhīwo nomimasu."
    tokenizer, hugging_face, _ = shipped
    pieces = runpy.run_path(str(FOLDER / "streaming.py"))["pieces"](hugging_face, tokenizer, text, max_new_tokens=96)
    expected = [piece for piece in pieces if piece]
    assert "".join(expected) == shown[1] and len(expected) >= 3
    assert shown[3] == "".join(f"[{piece}]" for piece in expected)


def test_transliterate_file(tmp_path: Path) -> None:
    """Lines stay in their places, and the progress bar reaches the end."""
    source, output = tmp_path / "kana.txt", tmp_path / "romaji.txt"
    source.write_text("\n" + (DATA / "kana.txt").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    ended = run("transliterate_file", source, output, "--batch-size", "8", "--progress")
    expected = (DATA / "kana_romaji_expected.txt").read_text(encoding="utf-8").split("\n")[:-1]
    made = output.read_text(encoding="utf-8").split("\n")[:-1]
    assert "40/40" in ended.stderr and f"42 lines written to {output}" in ended.stdout
    assert len(made) == 42 and made[0] == made[-1] == ""
    assert sum(a == b for a, b in zip(made[1:-1], expected, strict=True)) >= 38


def test_failed_run_leaves_the_old_file(tmp_path: Path) -> None:
    written_whole = runpy.run_path(str(FOLDER / "transliterate_file.py"))["written_whole"]
    output = tmp_path / "romaji.txt"
    output.write_text("old\n", encoding="utf-8")
    with pytest.raises(RuntimeError), written_whole(output) as file:
        file.write("new")
        raise RuntimeError
    assert output.read_text(encoding="utf-8") == "old\n"
    assert [path.name for path in tmp_path.iterdir()] == ["romaji.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says where there is no GPU")
def test_prebuild_without_a_gpu(tmp_path: Path) -> None:
    shown = run("prebuild_engines", SHIPPED, tmp_path / "out", "--shapes", "1x1x32x64", "2x4x64x64").stdout
    assert "nothing built: backend='tensorrt' cannot run here" in shown
    assert shown.count("would build fp16 engines") == 2 and "batch=2, beams=4, source=64, target=64" in shown
    assert not (tmp_path / "out").exists()


def test_prebuild_for_rtx(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    arguments = ("--shapes", "1x1x32x64", "--compute-capability", "8.6", "8.9")
    shown = run("prebuild_engines", SHIPPED, tmp_path / "store", *arguments).stdout
    assert "1 engines in" in shown and "encoder B1 S32 fp16" in shown
    assert len(list((tmp_path / "store").glob("*/engine.plan"))) == 1


def test_adapters(tmp_path: Path) -> None:
    shown = run("adapters", "--steps", "10", "--out", tmp_path).stdout
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", shown)]
    assert losses[1] < losses[0] / 10 and losses[3] < losses[2] / 10
    assert shown.count("tokens equal to peft's: True") == 4 and "False" not in shown
    lines = dict(re.findall(r"^(kunrei|plain|base model): (.*)$", shown, re.MULTILINE))
    assert len(set(lines.values())) == 3  # each writes something else
    assert {path.name for path in tmp_path.iterdir()} == {"kunrei", "plain"}


def test_fine_tuned(tmp_path: Path) -> None:
    shown = run("fine_tuned", "--out", tmp_path / "tuned").stdout
    assert "from_model: tokens equal to the Hugging Face class: True" in shown
    assert "from_pretrained: tokens equal to the Hugging Face class: True" in shown
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", shown)]
    assert losses[1] < losses[0] / 10
    right = re.search(r"(\d) of 8 lines that were not trained on are right", shown)
    assert right is not None and int(right[1]) >= 4
    assert TRTT5ForConditionalGeneration.from_pretrained(tmp_path / "tuned", num_threads=1).num_parameters() > 0


def test_seq2seq_evaluation() -> None:
    shown = run("seq2seq_evaluation").stdout
    found = re.findall(r"(\w+): exact match ([\d.]+), loss ([\d.e+-]+)", shown)
    assert [name for name, _, _ in found] == ["t5_trt", "transformers"]
    assert found[0][1] == found[1][1] and float(found[0][1]) >= 0.95
    assert float(found[0][2]) == pytest.approx(float(found[1][2]), abs=1e-4)
    assert "predict: 40 of 40 texts are equal" in shown


def test_array_interfaces() -> None:
    """NumPy runs; what a machine cannot run is named."""
    shown = run("array_interfaces").stdout
    assert "numpy in: same memory True" in shown and "numpy: watashiha kōhīwo nomimasu." in shown
    assert re.search(r"numpy out: float\d\d \(1, \d+, 128\), same memory True", shown)
    if not torch.cuda.is_available():
        assert all(f"{name}: left out, it needs the package {name}" in shown for name in ("cupy", "pycuda"))

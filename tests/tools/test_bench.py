"""`t5-trt bench`: records, table, file, picture, errors; and the script that fills the README from records."""

from __future__ import annotations

import copy
import io
import json
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import CompileConfig, GenerationConfig
from typer.testing import CliRunner

from benchmarks import report
from benchmarks.report import gpu_peers_table
from t5_trt import BackendError, InputError, T5TRTError
from t5_trt.cli import app
from t5_trt.tools.benchmark import Baseline, Case, equal_share, load_benchmark, measure
from t5_trt.tools.plot import check_picture, draw_records
from t5_trt.tools.random_models import SHAPES, random_source
from t5_trt.tools.records import append_records, print_records, read_records
from tests.conftest import ROOT, SHIPPED

FIELDS = {
    "model", "backend", "precision", "decode", "prepack_weights", "batch", "source_tokens", "new_tokens", "num_beams", "do_sample",
    "threads", "runs", "ours_ms", "ours_p90_ms", "tokens_per_s", "first_call_s", "hf_eager_fp32_ms", "hf_eager_fp32_p90_ms",
    "hf_eager_fp32_tokens_per_s", "hf_eager_fp32_first_call_s", "speedup", "tokens_equal", "tokens_equal_share",
    "distinct_tokens", "loop", "left_out", "ours_busy_cores", "hf_eager_fp32_busy_cores", "python", "torch", "transformers", "onnxruntime", "tensorrt", "cuda",
    "gpu_and_driver", "machine", "processor",
}  # fmt: skip


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load_benchmark(str(SHIPPED), threads=1, texts=True)


@pytest.fixture(scope="module")
def records(benchmark: Any) -> list[dict[str, Any]]:
    sizes = [(1, 2, 1), (3, 2, 1), (1, 5, 1), (1, 2, 3)]
    return [measure(benchmark, Case(batch=b, source_tokens=6, new_tokens=n, num_beams=k), runs=1) for b, n, k in sizes]


def swollen(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a GPU with all of Hugging Face's models and very large numbers."""
    large = copy.deepcopy(record)
    large |= {"batch": 4096, "source_tokens": 16384, "new_tokens": 16384, "num_beams": 16, "precision": "bf16"}
    large |= {"tokens_equal": False, "tokens_equal_share": 0.99996, "left_out": {}}
    for name in ("ours", "hf_eager_fp32", "hf_eager_fp16", "hf_compiled_fp16"):
        prefix = "" if name == "ours" else f"{name}_"
        large |= {f"{name}_ms": 9999.99, f"{name}_p90_ms": 123456789.1}
        large |= {f"{prefix}tokens_per_s": 123456.7, f"{prefix}first_call_s": 1234.56}
    return large


def shown(records: list[dict[str, Any]], width: int) -> str:
    console = Console(width=width, markup=False, highlight=False, record=True, file=io.StringIO())
    print_records(records, console)
    return console.export_text()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_records(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert set(record) >= FIELDS
        assert record["tokens_equal"] is True and record["tokens_equal_share"] == 1.0 and record["loop"] == "device"
        assert record["model"] == "kana_romaji" and record["tensorrt"] is record["gpu_and_driver"] is None
        assert 0 < record["ours_ms"] <= record["ours_p90_ms"] and record["speedup"] > 0
        per_s = record["batch"] * record["new_tokens"] / record["ours_ms"] * 1e3
        assert record["tokens_per_s"] == pytest.approx(per_s, rel=0.01)
        assert set(record["left_out"]) == {"hf_eager_fp16", "hf_compiled_fp16"}
    assert json.loads(json.dumps(records)) == records


def test_ours_alone_and_sampling(benchmark: Any) -> None:
    alone = load_benchmark(str(SHIPPED), threads=1, hugging_face=False)
    record = measure(alone, Case(new_tokens=2), runs=1)
    assert record["tokens_equal"] is record["speedup"] is None and "hf_eager_fp32_ms" not in record
    assert "HF" not in shown([record], 80)
    drawn = measure(benchmark, Case(batch=2, new_tokens=6, do_sample=True), runs=2)
    assert drawn["tokens_equal"] is True and drawn["do_sample"] is True


def test_texts_fill_the_batch(benchmark: Any) -> None:
    record = measure(benchmark, Case(batch=3, new_tokens=2), runs=1, texts=["さくら", "おはよう"])
    assert record["source"] == "texts" and 2 < record["source_tokens"] < 32 and record["tokens_equal"]
    with pytest.raises(InputError, match="texts got none"):
        measure(benchmark, Case(), runs=1, texts=[])


def test_failing_baseline_is_left_out(benchmark: Any) -> None:
    """Its failure is a result; ours is timed all the same."""

    class Broken:
        def generate(self, **request: Any) -> Any:
            raise RuntimeError("no\nkernel")

    broken = copy.copy(benchmark)
    broken.baselines = {"hf_eager_fp32": Baseline(Broken())}
    record = measure(broken, Case(new_tokens=2), runs=1)
    assert record["left_out"]["hf_eager_fp32"] == "RuntimeError: no kernel" and record["tokens_equal"] is None
    assert "HF fp32: RuntimeError: no kernel" in shown([record], 80)


def test_compiling_is_checked(benchmark: Any) -> None:
    """Transformers falls back to eager without a word, as here on a CPU; told to compile anywhere, it is timed."""
    asked = {"cache_implementation": "static"}
    anywhere = CompileConfig(backend="eager", mode=None, fullgraph=False)
    anywhere._compile_all_devices = True
    for options, compiled in ((asked, False), ({**asked, "compile_config": anywhere}, True), (asked, False)):
        both = copy.copy(benchmark)
        both.baselines = {
            **benchmark.baselines,
            "hf_compiled_fp16": Baseline(benchmark.baselines["hf_eager_fp32"].model, options),
        }
        both.left_out = {}
        record = measure(both, Case(new_tokens=3), runs=1)
        assert ("hf_compiled_fp16_ms" in record) is compiled, record["left_out"]
        assert record["left_out"] == (
            {} if compiled else {"hf_compiled_fp16": "Transformers did not compile this request"}
        )


def test_random_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", {"d_model": 32, "d_ff": 64, "num_heads": 2, "num_layers": 1})
    record = measure(load_benchmark("random:tiny", threads=1, backend="onnxruntime"), Case(new_tokens=3), runs=1)
    assert record["model"] == "tiny shapes, random weights, seed 0" and record["tokens_equal"]
    assert torch.equal(random_source(1, 4), random_source(1, 4)) and int(random_source(9, 9, 50).max()) < 50


def test_equal_share() -> None:
    rows = torch.tensor([[0, 5, 6, 7], [0, 5, 6, 7]])
    assert equal_share(rows, rows) == 1.0
    assert equal_share(rows[:, :3], rows) == 0.75 and equal_share(rows, rows + torch.tensor([[0], [1]])) == 0.5


@pytest.mark.parametrize("width", [80, 120])
def test_table_is_whole(records: list[dict[str, Any]], width: int) -> None:
    text = shown([*records, swollen(records[0])], width)
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= width and "…" not in text
    for word in ("kana_romaji", "HF fp32", "HF compiled", "t5_trt fp32", "t5_trt bf16", "yes", "99.9%", "123M", "4096"):
        assert word in text, word
    rules = [line for line in lines if line.startswith("──")]
    assert len(rules) == len(records) + 1 and len(set(rules)) == 1
    assert len([line for line in lines if "t5_trt " in line]) == len(records) + 1


def test_picture(records: list[dict[str, Any]], tmp_path: Path) -> None:
    for name, kept in (
        ("panels.png", records),
        ("point.png", records[:1]),
        ("large.png", [*records, swollen(records[0])]),
    ):
        draw_records(kept, tmp_path / name)
        content = (tmp_path / name).read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG") and 10_000 < len(content) < 500_000 and width > 900 and height > 600
    assert struct.unpack(">I", (tmp_path / "panels.png").read_bytes()[16:20])[0] > 2000  # three panels side by side
    draw_records(records, tmp_path / "panels.svg")
    drawn = (tmp_path / "panels.svg").read_text()
    assert "<svg" in drawn and all(f"<!-- {word} -->" in drawn for word in ("batch (rows)", "new tokens", "beams"))
    assert "<!-- t5_trt, fp32 -->" in drawn and "<!-- Hugging Face, eager, float32 -->" in drawn


def test_picture_tells_who_decodes(records: list[dict[str, Any]], tmp_path: Path) -> None:
    """Records from before there was a choice are an engine's."""
    before = [{name: value for name, value in record.items() if name != "decode"} for record in records]
    engine, kernels = ([{**record, "decode": who} for record in records] for who in ("engine", "kernels"))
    labels = []
    for others in (before, kernels):
        draw_records([*engine, *others], tmp_path / "both.svg")
        drawn = (tmp_path / "both.svg").read_text()
        labels.append([f"steps by {who}" in drawn for who in ("engine", "kernels")])
    assert labels == [[False, False], [True, True]]


def test_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendError, match=r"t5-trt\[bench\]"):
        check_picture(tmp_path / "x.png")


def test_records_are_appended(tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    append_records(file, [{"a": 1}])
    append_records(file, [{"a": 2}])
    assert read_records(file) == [{"a": 1}, {"a": 2}] and [path.name for path in tmp_path.iterdir()] == ["records.json"]


def test_command(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("がっこう\n\nコーヒー\n", encoding="utf-8")
    file, picture = tmp_path / "records.json", tmp_path / "x.png"
    options = ("--new-tokens", "2", "--runs", "1", "--threads", "1", "--json", str(file))
    done = run("--batch", "1", "2", str(SHIPPED), *options, "--num-beams", "1", "2", "--plot", str(picture))
    assert done.exit_code == 0, done.output
    assert (
        "t5_trt fp32" in done.stdout and "case 4 of 4: batch 2, source tokens 32, new tokens 2, beams 2" in done.stderr
    )
    assert done.stdout == "\n".join(line.rstrip() for line in done.stdout.splitlines()) + "\n"
    done = run(str(SHIPPED), *options, "--no-stock", "--texts", str(texts))
    assert done.exit_code == 0, done.output
    cases = [(record["batch"], record["num_beams"], record["source"]) for record in read_records(file)]
    random = "random tokens"
    assert cases == [(1, 1, random), (2, 1, random), (1, 2, random), (2, 2, random), (1, 1, "texts")]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_options(tmp_path: Path) -> None:
    shipped, (empty, wrong) = str(SHIPPED), (tmp_path / "empty.txt", tmp_path / "wrong.json")
    empty.write_text("\n")
    wrong.write_text('{"a": 1}')
    cases = (
        ((shipped, "--texts", str(tmp_path / "none.txt")), "does not exist"),
        ((shipped, "--texts", str(empty)), "holds no text"),
        ((shipped, "--texts", str(empty), "--source-tokens", "8"), "Leave one of the two out"),
        ((shipped, "--json", str(wrong)), "something else than a JSON list"),
        ((shipped, "--json", str(tmp_path / "none" / "x.json")), "its folder does not exist"),
        ((shipped, "--plot", str(tmp_path / "x.gif")), "ending in .png, .svg or .pdf"),
        ((str(tmp_path / "none"),), "there is no folder"),
        (("random:t5-huge",), "models with random weights are random:flan-t5-xl, random:t5-3b, random:t5-base"),
        (("random:t5-base", "--texts", str(ROOT / "LICENSE")), "has no tokenizer"),
    )
    for arguments, message in cases:
        ended = run(*arguments)
        assert isinstance(ended.exception, T5TRTError) and message in str(ended.exception), (arguments, ended.exception)
    for option, value in (
        ("--batch", "many"),
        ("--batch", "0"),
        ("--num-beams", "-1"),
        ("--runs", "0"),
        ("--threads", "0"),
    ):
        refused = run(shipped, option, value)
        assert refused.exit_code == 2 and option in refused.stderr
    assert run(shipped, "--batch").exit_code == 2


SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_beams": 2, "num_return_sequences": 2},
    {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"min_length": 30, "max_length": 40, "early_stopping": True, "forced_eos_token_id": 1},
    {"min_new_tokens": 9, "max_time": 1e-9, "stop_strings": ["a"], "prompt_lookup_num_tokens": 2},
    {"penalty_alpha": 0.6, "top_k": 4, "dola_layers": "low", "force_words_ids": [[5]]},
)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("case", [Case(new_tokens=4), Case(batch=2, new_tokens=4, num_beams=3, do_sample=True)])
def test_settings_of_a_checkpoint_leave_the_case_as_it_is(benchmark: Any, settings: dict[str, Any], case: Case) -> None:
    configured = copy.copy(benchmark)
    models = [benchmark.ours, benchmark.baselines["hf_eager_fp32"].model]
    kept = [model.generation_config for model in models]
    try:
        for model in models:
            model.generation_config = GenerationConfig(**{**kept[0].to_dict(), **settings})
        record = measure(configured, case, runs=1)
    finally:
        for model, config in zip(models, kept, strict=True):
            model.generation_config = config
    assert record["tokens_equal"] is True and record["left_out"].keys() == benchmark.left_out.keys()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, t5_trt.cli as c; c.app(['bench', '--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert all(option in done.stdout for option in ("--batch", "--no-stock", "--plot", "--json")), done.stderr
    assert done.stdout.split()[-1] == "False"


def test_table_of_a_gpu_leads_with_the_fastest_peer() -> None:
    """Small cases first; what was measured otherwise, or without a peer, is no row."""
    case = {"part": "curves", "batch": 8, "source_tokens": 32, "new_tokens": 100}
    records: list[dict[str, Any]] = [
        {**case, "ours_ms": 40.0, "hf_eager_fp16_ms": 2000.0, "hf_compiled_fp16_ms": 200.0},
        {**case, "ours_ms": 10.0, "batch": 1, "ctranslate2_fp16_ms": 120.0, "hf_eager_fp16_ms": 2000.0},
        {**case, "part": "decode", "ours_ms": 30.0, "hf_eager_fp16_ms": 1000.0},
        {"compared": "something", "batch": 1},
        {**case, "batch": 2, "ours_ms": 3.0},
        {**case, "batch": 3, "failed": {"ours_ms": "no"}, "hf_eager_fp16_ms": 9.0},
    ]
    assert gpu_peers_table(records).split("\n")[2:] == [
        "| 1 | 32 | 100 | 10.0 | CTranslate2 | 120 | 12.0 | 10000 |",
        "| 8 | 32 | 100 | 40.0 | Hugging Face compiled | 200 | 5.0 | 20000 |",
    ]


def test_picture_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn from the records of its part; one that is missing makes a README out of date."""
    drawn = read_records(report.RESULTS / report.CPU_PLOT_RECORDS)
    others = [{"part": "decode", "batch": 1}]
    (tmp_path / report.KERNEL_RECORDS).write_text(json.dumps(others + [{"part": "curves", **each} for each in drawn]))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "missing" in report.gpu_curves(tmp_path / "README.md", write=False)
    line = report.gpu_curves(tmp_path / "README.md", write=True)
    assert line == report.gpu_curves(tmp_path / "README.md", write=False) and "gpu-curves.png" in line
    assert (tmp_path / "docs" / "images" / "gpu-curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_fills_a_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a copy: first out of date, then rewritten, then up to date; what has no markers is left out."""
    readme = tmp_path / "README.md"
    monkeypatch.chdir(tmp_path)

    def rewrite(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["report.py", "--readme", str(readme), *arguments])
        with pytest.raises(SystemExit) as ended:
            report.main()
        shown = capsys.readouterr()
        failed = isinstance(ended.value.code, str)  # Python prints it then, and the status is 1
        return SimpleNamespace(
            returncode=1 if failed else ended.value.code, stdout=shown.out, stderr=f"{shown.err}{ended.value.code}"
        )

    readme.write_text("before\n<!-- begin: cpu-speed -->\nold\n<!-- end: cpu-speed -->\nafter\n")
    stale = rewrite("--check")
    assert stale.returncode == 1 and "out of date" in stale.stderr and "old" in readme.read_text()
    written = rewrite()
    assert written.returncode == 0 and "no <!-- begin: cpu-speed-plot -->" in written.stdout, written.stderr
    text = readme.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n") and "| model |" in text
    facts = ("model", "precision", "prepack_weights", "batch", "source_tokens", "new_tokens", "num_beams", "processor")
    stored = read_records(ROOT / "benchmarks" / "results" / "cpu-onnxruntime.json")
    newest = {
        tuple(record.get(fact) for fact in (*facts, "do_sample")): record for record in stored if "speedup" in record
    }
    assert text.count("\n| ") == len(newest) + 2
    last = list(newest.values())[-1]
    assert f"| {last['hf_eager_fp32_ms']:.0f} | {last['ours_ms']:.0f} | {last['speedup']:.2f} |" in text
    assert rewrite("--check").returncode == 0
    readme.write_text(text + "<!-- begin: cpu-speed-plot -->\n<!-- end: cpu-speed-plot -->\n")
    assert rewrite("--check").returncode == 1 and rewrite().returncode == 0 and rewrite("--check").returncode == 0
    assert (tmp_path / "docs" / "images" / "cpu-speed.png").read_bytes().startswith(b"\x89PNG")
    readme.write_text("<!-- begin: cpu-speed -->\n")
    assert "do not pair" in rewrite().stderr

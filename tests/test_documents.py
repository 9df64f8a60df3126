"""What the documents say, as far as a machine can check it: links, paths, options, code, numbers, messages."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import report
from t5_trt import TRTT5EncoderModel, TRTT5ForConditionalGeneration, cli
from t5_trt.config import BuildConfig, RuntimeConfig
from tests import cases
from tests.conftest import ROOT

READMES = [ROOT / "README.md", ROOT / "README.ja.md"]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("audit/*.md")]
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
#: what a first part of a path in backquotes must be, so that it is one of this repository
FOLDERS = ("t5_trt", "tests", "docs", "examples", "benchmarks", "audit", ".ci", ".github")
#: code of others, in "before" blocks
FOREIGN = ("transformers", "peft", "optimum", "ctranslate2", "T5.", "tritonclient", "numpy", "openai")
MADE = "examples/triton_server/t5_text/checkpoint"  # by the command that names it
WIDTH = 78  # characters of a line of code that the site shows at 1280 pixels; GitHub shows some more


@functools.cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    return re.sub(r"^```.*?^```", "", text_of(name), flags=re.MULTILINE | re.DOTALL)


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), re.MULTILINE | re.DOTALL)


PYTHON = [
    pytest.param(code, id=f"{name}-{number}") for name in NAMES for number, code in enumerate(blocks(name, "python"))
]


def anchors(path: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("name", NAMES)
def test_paths_exist(name: str) -> None:
    """In backquotes or commands: from the root of the repository, or within the package."""
    for quoted in re.findall(r"`([^`\n]+)`", prose(name)) + blocks(name, "") + blocks(name, "bash"):
        for word in re.findall(r"(?<![\w/.])[\w.-]+(?:/[\w.*-]+)+/?", quoted):
            if word.split("/")[0] in FOLDERS and "NAME" not in word and word != MADE:
                assert list(ROOT.glob(word.rstrip("/."))), word
    scripts = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py")]
    for module in re.findall(r"`(\w+(?:/\w+)*\.py)`", prose(name)):
        assert any(path.endswith(f"/{module}") for path in scripts) or module == "T5ModelConfig.py", module  # NVIDIA's


def test_results_in_the_performance_notes_exist() -> None:
    for file in re.findall(r"`(?:results/)?([\w.-]+\.json)`", text_of("docs/performance.md")):
        assert (ROOT / "benchmarks" / "results" / file).exists(), file


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_name_what_exists(code: str) -> None:
    """They compile; names imported from here exist; arguments of our functions are known."""
    tree = ast.parse(code)
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert module.startswith(("t5_trt", *FOREIGN)), module
            if module.startswith("t5_trt"):
                for alias in node.names:
                    known[alias.asname or alias.name] = getattr(importlib.import_module(module), alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = called(node.func, known)
            if function is not None:
                parameters = inspect.signature(function).parameters
                others = set(RuntimeConfig.__dataclass_fields__) | {"build", "calibration", "num_beams"}
                for keyword in node.keywords:
                    assert keyword.arg is None or keyword.arg in {*parameters, *others}, keyword.arg


def called(function: ast.expr, known: dict[str, Any]) -> Any:
    """A function of ours that is called by its name, or as an attribute of a class of ours."""
    if isinstance(function, ast.Name):
        return known.get(function.id)
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id in known:
        return getattr(known[function.value.id], function.attr)
    return None


@pytest.mark.parametrize("name", NAMES)
def test_attributes_of_the_model_exist(name: str) -> None:
    for attribute in re.findall(r"\bmodel\.(\w+)", text_of(name)):
        if attribute not in {"safetensors", "py"}:
            assert hasattr(TRTT5ForConditionalGeneration, attribute) or attribute == "encoder", attribute


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_options_exist(name: str) -> None:
    root = typer.main.get_command(cli.app)
    for quoted in re.findall(r"`(t5-trt[^`\n]*)`", prose(name)) + re.findall(
        r"^(?:\$ )?(t5-trt .*)$", text_of(name), re.MULTILINE
    ):
        words = shlex.split(quoted.split("   ")[0].replace(" | ", " "), comments=True)[1:]
        command: Any = root
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
            if command.name == "cache" and words and not words[0].startswith("-"):
                for word in (word for word in words if re.fullmatch("[a-z]+", word)):  # `list | show | check`
                    assert word in command.commands, word
                options = {option for sub in command.commands.values() for each in sub.params for option in each.opts}
                assert {word for word in words if word.startswith("--")} <= options, quoted
                words = []
        options = {option for each in command.params for option in each.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= options, quoted
        assert command is not root or not words or words[0].startswith("-"), quoted


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_tables_are_those_of_the_records(readme: Path) -> None:
    text, missing = report.filled(readme, write=False)
    assert text == readme.read_text(encoding="utf-8") and not missing, "run python benchmarks/report.py"


def test_readmes_show_the_same_numbers_and_arguments() -> None:
    english, japanese = (path.read_text(encoding="utf-8") for path in READMES)

    def first_cells(text: str) -> list[list[str]]:
        rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
        return [re.findall(r"`([^`]+)`", row) for row in rows]

    assert first_cells(english) == first_cells(japanese)
    for pattern in (r"\d+ to (\d+) s\b", r"\bPython (\d\.\d+)\b", r"Transformers (5\.\d+)\b"):
        assert all(number in japanese for number in re.findall(pattern, english)), pattern
    assert text_of("README.md").count("\n## ") == japanese.count("\n## ")


def test_table_of_arguments_is_that_of_from_pretrained() -> None:
    own = set(inspect.signature(TRTT5ForConditionalGeneration.from_pretrained).parameters)
    own -= {"pretrained_model_name_or_path", "model_args", "config", "kwargs"}
    rows = text_of("README.md").split("## Arguments")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", rows, re.MULTILINE)
    assert {name for cell, _ in cells for name in re.findall(r"`(\w+)`", cell)} == own
    parameters = inspect.signature(TRTT5ForConditionalGeneration.from_pretrained).parameters
    for cell, default in cells:
        if re.fullmatch('`(None|True|False|"auto")`', default):
            for name in re.findall(r"`(\w+)`", cell):
                assert repr(parameters[name].default).replace("'", '"') == default.strip("`"), name


def test_number_of_compared_sets_of_arguments() -> None:
    count = len(cases.CORE) + len(cases.MORE)
    assert f"\n  {count} sets of arguments" in text_of("README.md") and f" {count} 通り" in text_of("README.ja.md")


@pytest.mark.parametrize("code", PYTHON)
def test_code_fits_a_page(code: str) -> None:
    wide = [line for line in code.splitlines() if len(line) > WIDTH]
    assert not wide


@pytest.mark.parametrize("name", ["README.md", "README.ja.md", "docs/index.md"])
def test_first_example_is_whole(name: str) -> None:
    """It imports, loads, generates and prints."""
    first = blocks(name, "python")[0]
    for part in (
        "import AutoTokenizer",
        "import TRTT5ForConditionalGeneration",
        ".from_pretrained(",
        ".generate(",
        "print(",
    ):
        assert part in first, part


def test_environment_variables_are_read_somewhere() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("t5_trt/**/*.py"))
    for name in NAMES:
        for variable in re.findall(r"\bT5_TRT_[A-Z_]+", text_of(name)):
            assert variable in source or variable.startswith("T5_TRT_TEST_"), (name, variable)


def test_settings_of_build_config_exist() -> None:
    for name in NAMES:
        for arguments in re.findall(r"BuildConfig\((\w+)=", text_of(name)):
            assert arguments in BuildConfig.__dataclass_fields__, (name, arguments)


def test_messages_of_troubleshooting_exist() -> None:
    """The fixed words of each: what lies between values, which the page shows as examples."""
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("t5_trt/**/*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    rows = [line.split(" | ")[0] for line in text_of("docs/troubleshooting.md").splitlines() if line.startswith("| `")]
    assert len(rows) > 15
    for message in (message for row in rows for message in re.findall(r"`([^`]+)`", row) if " " in message):
        for words in re.findall(r"[a-z][a-z ]{11,}[a-z]", re.sub(r"'[^']*'|\bcuda\b|\S*_\S*", "|", message)):
            assert words in source, (message, words)


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": (\w+\.md)$", text_of("mkdocs.yml"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("docs/*.md"))


def test_encoder_class_is_documented() -> None:
    assert TRTT5EncoderModel.__name__ in text_of("docs/api.md")

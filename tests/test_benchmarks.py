"""`python -m benchmarks` lists the benchmarks and runs them by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.__main__ import benchmarks, main
from tests.conftest import ROOT


def test_every_benchmark_is_listed_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert listed == benchmarks() and {"decode", "memory", "report", "soak"} <= set(listed)
    assert "__main__" not in listed
    for name, line in listed.items():
        assert line.endswith(".") and len(line) <= 120, (name, line)


def test_a_benchmark_runs_by_name_with_its_arguments() -> None:
    command = [sys.executable, "-m", "benchmarks", "report", "--no-such-option"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "--no-such-option" in refused.stderr
    assert "report.py" in refused.stderr and "--check" in refused.stderr


def test_an_unknown_benchmark_is_refused_with_the_known_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["nothing"])
    refused = capsys.readouterr().err
    assert "'nothing'" in refused and "memory" in refused

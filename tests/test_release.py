"""The version is the same everywhere, the changelog has its form, and the hosted workflows run the checks of `.ci/run`."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from t5_trt import __version__
from tests.conftest import ROOT

CONFIGURATIONS = [*sorted(ROOT.glob(".github/**/*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def releases() -> list[tuple[str, str, str]]:
    """(version, date, text) of the releases in the changelog, the newest first."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    head, *parts = re.split(r"^## ", text, flags=re.M)
    assert head.startswith("# Changelog\n") and parts[0].startswith("Unreleased\n")
    found = [re.fullmatch(r"(\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)\n(.*)", part, re.S) for part in parts[1:]]
    assert all(found), [part.splitlines()[0] for part in parts[1:]]
    return [match.group(1, 2, 3) for match in found if match]


def test_version_is_the_same_everywhere() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert str(citation["version"]) == __version__
    assert releases()[0][:2] == (__version__, str(citation["date-released"]))
    for name in ("README.md", "README.ja.md"):
        wheels = re.findall(r"t5_trt-([\d.]+)-py3-none-any\.whl", (ROOT / name).read_text(encoding="utf-8"))
        assert set(wheels) <= {__version__}, name


def test_changelog_has_dates_and_known_sections() -> None:
    dates = [date.fromisoformat(day) for _, day, _ in releases()]
    assert dates == sorted(dates, reverse=True)
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^### (.*)$", text, re.M))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configurations_can_be_read(path: Path) -> None:
    assert load(path)


def test_hosted_workflows_run_the_checks_before_they_publish() -> None:
    checks, publish = (load(ROOT / ".github" / "workflows" / name) for name in ("ci.yml", "publish.yml"))
    assert ".ci/run" in [step.get("run") for step in checks["jobs"]["checks"]["steps"]]
    jobs = publish["jobs"]
    assert jobs["checks"]["uses"] == "./.github/workflows/ci.yml" and set(jobs["publish"]["needs"]) == {
        "checks",
        "build",
    }
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]

"""The checks of licences and vulnerabilities fail where they should; in folders of made-up packages, without a network."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from audit import advisories, licences
from audit.dependencies import runtime_dependencies
from audit.pythons import find_python


def install(folder: Path, name: str, *lines: str, version: str = "1.0") -> None:
    """Metadata as pip would leave it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    head = ("Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}")
    (info / "METADATA").write_text("\n".join((*head, *lines)) + "\n")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """t5-trt with two dependencies, one of them by an extra, and one of theirs."""
    needs = ("plain", 'served[fast] ; extra == "ray"', 'checker ; extra == "dev"', 'relic ; python_version < "3"')
    install(tmp_path, "t5-trt", *(f"Requires-Dist: {need}" for need in needs))
    install(tmp_path, "plain", "License-Expression: MIT")
    install(tmp_path, "served", "License: Apache 2.0", 'Requires-Dist: inner ; extra == "fast"', "Requires-Dist: plain")
    install(tmp_path, "checker", "License: GPLv3")  # a tool of developers
    return tmp_path


@pytest.mark.parametrize(
    ("lines", "refused"),
    [
        (["License-Expression: MIT OR GPL-3.0-or-later"], None),
        (["License-Expression: MIT AND Apache-2.0 WITH LLVM-exception"], None),
        (["License: MIT", "Classifier: License :: OSI Approved :: BSD License"], None),
        (["License-Expression: GPL-3.0-or-later"], "GPL-3.0-or-later"),
        (["License-Expression: MIT AND LGPL-2.1-only"], "MIT AND LGPL-2.1-only"),
        (["License: GPLv3"], "GPLv3"),
        (["License: MIT", "Classifier: License :: OSI Approved :: GNU Affero General Public License v3"], "GNU Affero"),
        (["License: Proprietary"], "Proprietary"),  # accepted of others
        (["Classifier: License :: OSI Approved"], "none stated"),
        (["License: our own words", "  in two lines"], "none stated"),
        ([], "none stated"),
    ],
)
def test_licences(site: Path, capsys: pytest.CaptureFixture[str], lines: list[str], refused: str | None) -> None:
    """Of a dependency of a dependency of an extra."""
    install(site, "inner", *lines)
    assert licences.main([site]) == (0 if refused is None else 1)
    words = capsys.readouterr()
    assert ("refused: inner: " + refused if refused else "3 permissive, 0 accepted, 0 refused") in words.out + words.err


def test_an_exception_is_for_one_package_and_one_licence(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "inner", "License: MIT", "Requires-Dist: tensorrt-rtx")
    install(site, "tensorrt-rtx", "License: Proprietary")
    assert licences.main([site]) == 0
    assert "accepted: tensorrt-rtx (Proprietary): NVIDIA's licence." in capsys.readouterr().out
    metadata = site / "tensorrt_rtx-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Proprietary", "GPLv3"))
    assert licences.main([site]) == 1
    assert "refused: tensorrt-rtx: GPLv3" in capsys.readouterr().err


def test_what_is_looked_at(site: Path) -> None:
    """Extras and their extras, no tools of developers, nothing for other Pythons; what is not there is named."""
    packages, missing = runtime_dependencies([site])
    assert (list(packages), missing) == (["plain", "served"], ["inner"])
    with pytest.raises(LookupError, match="t5-trt is not installed"):
        runtime_dependencies([site / "empty"])


def test_the_real_dependencies_are_found() -> None:
    packages, _ = runtime_dependencies()
    assert {"torch", "transformers", "onnxruntime", "numpy", "jinja2", "matplotlib"} <= set(packages)
    assert not {"pytest", "mypy", "pip-audit"} & set(packages)


@pytest.fixture
def osv() -> Iterator[tuple[str, dict[str, Any]]]:
    """(address of a server with OSV's interface, its answers by name of package)."""
    answers: dict[str, Any] = {}

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(answers.get(query["package"]["name"], {})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    thread.join()
    server.server_close()


def flaw(package: str) -> dict[str, Any]:
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}]
    affected = [{"package": {"name": package, "ecosystem": "PyPI"}, "ranges": ranges}]
    return {"vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "summary": "bad", "affected": affected}]}


def test_vulnerabilities(
    site: Path, osv: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through pip-audit itself: a known one is a failure until its id is accepted with a reason."""
    url, answers = osv
    arguments = ["--service", "osv", "--osv-url", url]
    install(site, "inner", version="1.0+cpu")
    assert advisories.main(arguments, [site]) == 0
    assert "3 of 3 packages audited, 0 accepted, 0 found" in capsys.readouterr().out
    answers["inner"] = flaw("inner")
    assert advisories.main(arguments, [site]) == 1
    assert "vulnerable: inner 1.0: PYSEC-1, CVE-1; fixed in 1.1." in capsys.readouterr().err
    monkeypatch.setitem(advisories.ACCEPTED, "CVE-1", "nothing of ours calls it")
    assert advisories.main(arguments, [site]) == 0
    assert "accepted: inner 1.0: PYSEC-1, CVE-1: nothing of ours calls it" in capsys.readouterr().out


def test_no_service_answers(site: Path, osv: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """No failure, and no silence."""
    closed = "http://127.0.0.1:1"
    assert advisories.main(["--service", "osv", "--osv-url", closed], [site]) == 0
    words = capsys.readouterr()
    assert (
        "osv does not answer: " in words.err and "NOT AUDITED" in words.err and "2 packages: all of them" in words.err
    )
    assert "0 of 2 packages audited" in words.out


def test_what_a_service_does_not_know_is_asked_of_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def ask(service: str, versions: dict[str, str], *_: str) -> list[dict[str, Any]]:
        asked.append((service, sorted(versions)))
        knows = {"pypi": {"a"}, "osv": {"b"}}[service]
        skipped = {"skip_reason": "Dependency not found on PyPI"}
        return [{"name": name, **({"version": "1", "vulns": []} if name in knows else skipped)} for name in versions]

    monkeypatch.setattr(advisories, "ask", ask)
    reports, left = advisories.audit({"a": "1", "b": "1", "c": "1"}, ("pypi", "osv"))
    assert asked == [("pypi", ["a", "b", "c"]), ("osv", ["b", "c"])]
    assert [report["name"] for report in reports] == ["a", "b"] and left == {"c": "1"}
    assert "pypi knows 1 of 3 packages" in capsys.readouterr().out


def test_pip_audits_own_faults_are_failures() -> None:
    with pytest.raises(RuntimeError, match="pip-audit ended with status 2"):
        advisories.ask("osv", {"a": "1"}, "--no-such-option")


def test_pythons_that_do_not_run_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as pyenv's command for a version that it does not run here; then its folder is looked through."""

    def command(path: Path, line: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
        return path

    command(tmp_path / "shims" / "python3.12", "exit 127")
    command(tmp_path / "versions" / "3.12.1" / "bin" / "python", "echo 3 11")
    monkeypatch.setenv("PATH", str(tmp_path / "shims"), prepend=os.pathsep)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert find_python((3, 12)) is None
    right = command(tmp_path / "versions" / "3.12.9" / "bin" / "python", "echo 3 12")
    assert find_python((3, 12)) == right

"""Is a vulnerability known in what t5_trt depends on? The status is 1 if one is, and is not accepted.

    python -m audit.advisories

pip-audit asks PyPI, and OSV about the packages that PyPI did not know. It calls packages that no service knew "no known
vulnerabilities" and has the status 0 then; here they are counted and named, as a mirror of PyPI may know nothing at all.
A service that cannot be reached is said, and is no failure: that would stop all work whenever a network is down.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from packaging.version import Version

from audit.dependencies import runtime_dependencies

SERVICES = ("pypi", "osv")
#: vulnerabilities that have no fix, or cannot reach a user of t5_trt: id (of PyPI, CVE or GHSA) -> reason
ACCEPTED: dict[str, str] = {}
#: what pip-audit writes where a service does not answer: its own errors, and those of requests, which it lets through
_NO_ANSWER = re.compile(r"requests\.exceptions\.|ServiceError|Could not connect|blocking this service")
Report = dict[str, Any]  # one package: name, and version and vulns or skip_reason


class NoAnswerError(Exception):
    """An advisory service cannot be reached or does not work."""


def ask(service: str, versions: dict[str, str], *options: str) -> list[Report]:
    """What a service says about packages.

    Args:
        service: one of SERVICES.
        versions: by name.
        options: for pip-audit.

    Raises:
        NoAnswerError: it cannot be reached.
        RuntimeError: pip-audit failed in another way.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        # the index knows no local versions, such as torch 2.13.0+cpu
        file.writelines(f"{name}=={Version(version).public}\n" for name, version in versions.items())
        file.flush()
        pinned = ("--no-deps", "--disable-pip", "--requirement", file.name)  # pip must not resolve them again
        form = ("--format", "json", "--aliases", "on", "--progress-spinner", "off")
        command = [sys.executable, "-m", "pip_audit", *pinned, *form, "--vulnerability-service", service, *options]
        ended = subprocess.run(command, capture_output=True, text=True)
    try:
        reports: list[Report] = json.loads(ended.stdout)["dependencies"]
    except ValueError:
        words = ended.stderr.strip()
        if _NO_ANSWER.search(words):
            raise NoAnswerError(words.splitlines()[-1]) from None
        raise RuntimeError(f"pip-audit ended with status {ended.returncode}: {words[-800:] or 'no words'}") from None
    return reports


def audit(versions: dict[str, str], services: Sequence[str], *options: str) -> tuple[list[Report], dict[str, str]]:
    """(what the services know, the versions that none of them knows); each service is asked for what is left."""
    known: list[Report] = []
    left = dict(versions)
    for service in services:
        if not left:
            break
        try:
            reports = [report for report in ask(service, left, *options) if "skip_reason" not in report]
        except NoAnswerError as error:
            print(f"{service} does not answer: {error}", file=sys.stderr)
            continue
        print(f"{service} knows {len(reports)} of {len(left)} packages")
        known += reports
        left = {name: version for name, version in left.items() if name not in {report["name"] for report in reports}}
    return known, left


def judge(reports: Iterable[Report], accepted: dict[str, str]) -> tuple[list[str], list[str]]:
    """(accepted vulnerabilities with their reasons, the others), a line each."""
    excused, found = [], []
    for report in reports:
        for flaw in report["vulns"]:
            names = (flaw["id"], *flaw["aliases"])
            line = f"{report['name']} {report['version']}: {', '.join(names)}"
            reason = next((accepted[name] for name in names if name in accepted), None)
            if reason is not None:
                excused.append(f"{line}: {reason}")
            else:
                found.append(f"{line}; fixed in {', '.join(flaw['fix_versions']) or 'no version'}")
    return excused, found


def main(arguments: Sequence[str] | None = None, folders: Iterable[Path] | None = None) -> int:
    """Print what was found, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", choices=SERVICES, help="the only one to ask")
    parser.add_argument("--osv-url", help="of another server with OSV's interface")
    options = parser.parse_args(arguments)
    packages, missing = runtime_dependencies(folders)
    versions = {name: package.version for name, package in packages.items()}
    services = (options.service,) if options.service else SERVICES
    reports, left = audit(versions, services, *(("--osv-url", options.osv_url) if options.osv_url else ()))
    excused, found = judge(reports, ACCEPTED)
    print(
        f"vulnerabilities: {len(reports)} of {len(versions)} packages audited, {len(excused)} accepted, {len(found)} found"
    )
    for line in excused:
        print(f"accepted: {line}")
    if missing:
        print(f"not installed here, so not looked at: {', '.join(missing)}")
    if left:
        names = "all of them" if len(left) == len(versions) else ", ".join(left)
        print(f"NOT AUDITED, as no service that answered knows them: {len(left)} packages: {names}", file=sys.stderr)
    for line in found:
        print(
            f"vulnerable: {line}. Take a version with the fix; if there is none or it cannot reach a user, give the reason in "
            "ACCEPTED of audit/advisories.py.",
            file=sys.stderr,
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

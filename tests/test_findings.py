# SPDX-License-Identifier: Apache-2.0
"""The scripts of findings/: their form, and (slow, from a package registry) what they state of other libraries."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "findings").glob("*.sh"))

every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def header(script: Path) -> str:
    """Return the comment that a script begins with."""
    lines = script.read_text(encoding="utf-8").partition("\nset -euo pipefail\n")[0].splitlines()
    assert all(line.startswith("#") for line in lines)
    return " ".join(line.removeprefix("# ") for line in lines[2:])


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 6


@every_script
def test_script_has_the_agreed_form(script: Path) -> None:
    lines = script.read_text(encoding="utf-8").splitlines()
    assert os.access(script, os.X_OK)
    assert lines[:2] == ["#!/usr/bin/env bash", "# SPDX-License-Identifier: Apache-2.0"]
    said = header(script)
    assert "Guessed before: " in said
    assert "Seen with " in said
    assert lines.count("work=$(mktemp -d)") == lines.count("trap 'rm -rf \"$work\"' EXIT") == 1
    assert [line for line in lines if len(line) > 120] == []


@every_script
def test_script_installs_pinned_versions_that_it_names(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    (packages,) = re.findall(r"pip\" install --quiet --disable-pip-version-check \\\n +(.*)", text)
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9.]*", package) for package in packages.split())
    assert all(f" {package.partition('==')[2]}" in header(script) for package in packages.split())
    assert "://" not in text
    assert "--index-url" not in text


@every_script
def test_script_does_without_this_package(script: Path) -> None:
    assert not re.search(r"unias|uniad", script.read_text(encoding="utf-8"), re.IGNORECASE)


@pytest.mark.slow
@every_script
def test_script_sees_what_it_states(script: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    environment.pop("PYTHONPATH", None)
    ended = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 1
    assert list(tmp_path.glob("tmp.*")) == []  # what it made; libraries leave their own

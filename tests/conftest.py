# SPDX-License-Identifier: Apache-2.0
"""Keeps the tests honest about which copy of the package they run, and starts fresh interpreters for them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openvino as ov
import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Stop if the tests would import the source tree by accident instead of the installed package.

    A source tree named in ``PYTHONPATH`` or installed with ``pip install -e`` is meant; one that is found because
    ``python -m pytest`` puts the current folder on ``sys.path`` hides what the wheel lacks.
    """
    spec = find_spec("anomalib_uniass")
    if spec is None or spec.origin is None:
        pytest.exit("anomalib_uniass is not installed; run `make test`, or `pip install '.[test]'` first", returncode=4)
    from_source = Path(spec.origin).resolve().is_relative_to(ROOT / "anomalib_uniass")
    if from_source and not _named_in_pythonpath() and not _installed_editable():
        pytest.exit(
            f"the tests would import the source tree {ROOT}, not the installed package; run `make test` or `pytest` "
            "instead of `python -m pytest`, or set PYTHONPATH=$PWD if you mean the source tree",
            returncode=4,
        )


def _named_in_pythonpath() -> bool:
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return any(Path(entry).resolve() == ROOT for entry in entries if entry)


def _installed_editable() -> bool:
    try:
        direct_url = distribution("anomalib-uniass").read_text("direct_url.json")
    except PackageNotFoundError:
        return False
    return direct_url is not None and json.loads(direct_url).get("dir_info", {}).get("editable", False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let reports travel between processes, which take UTF-8 alone: tests of other file names log these."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def keep_cores() -> Iterator[None]:
    """Let no `openvino.Core` go before the process ends.

    Each brings a stack for signal handlers, where the processor has AMX (seen in 2026.4). Of two that go in the order
    in which they came the second one restores the stack of the first, which is gone, and the next signal kills the
    process: the end of a worker of a data loader, for one.
    """
    cores = []
    create = ov.Core.__init__

    def create_and_keep(self: ov.Core, *arguments: Any) -> None:
        create(self, *arguments)
        cores.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ov.Core, "__init__", create_and_keep)
        yield


@pytest.fixture
def hook() -> None:
    """Skip a test that needs the start-up hook where the source tree is run without installing it."""
    if find_spec("_anomalib_uniass_autoload") is None:
        pytest.skip("the start-up hook is not installed")


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a fresh Python in an empty folder and gives what it printed on both streams."""

    def run(*arguments: str, **environment: str) -> str:
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    return run

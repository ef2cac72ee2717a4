# SPDX-License-Identifier: Apache-2.0
"""No tracked file tells where on some machine things lay; nor do the results that the benchmarks write."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("work", "root", "home", "tmp", "Users", "mnt")
# An absolute path with something below a folder that is a machine's own; not "results/work/x" and not a URL.
MACHINE_PATH = re.compile(rf"(?<![\w.~/-])(?:/(?:{'|'.join(FOLDERS)})/|[A-Z]:\\)\w[^\s\"'`,)]*")


def absolute(*parts: str) -> str:
    """Join an absolute path that this file itself must not hold."""
    return "/" + "/".join(parts)


@pytest.fixture
def speed_report(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("speed_report")


def test_tracked_files_hold_no_path_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    texts = {file: file.read_bytes() for file in files if file.is_file()}
    texts = {file: content for file, content in texts.items() if b"\0" not in content}
    assert len(texts) > 100
    found = {
        f"{file.relative_to(ROOT)}:{number}": match[0]
        for file, content in texts.items()
        for number, line in enumerate(content.decode().splitlines(), 1)
        if (match := MACHINE_PATH.search(line))
    }
    assert found == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_search_finds_paths_of_a_machine(folder: str) -> None:
    for text in ('"{}",', "at {}: missing", "--work={}", "`{}`"):
        assert MACHINE_PATH.search(text.format(absolute(folder, "me", "model.ckpt")))
    assert not MACHINE_PATH.search(f"results{absolute(folder, 'model.ckpt')} https://host{absolute(folder, 'page')}")


def test_benchmarks_write_names_without_their_folders(
    speed_report: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, checkpoint = absolute("work", "data", "parts"), absolute("home", "me", "my-run", "model.ckpt")
    monkeypatch.setattr(
        sys, "argv", ["speed.py", data, f"--checkpoint={checkpoint}", "--work", "results/work/a", "2/3"]
    )
    machine = speed_report.machine(torch.device("cpu"), 1)
    assert machine["arguments"] == [".../parts", "--checkpoint=.../model.ckpt", "--work", "results/work/a", "2/3"]

    report = speed_report.Report.load(tmp_path)
    report.skip("a model", FileNotFoundError(f"No such file: '{checkpoint}', see https://host/a/page"))
    assert report.results["skipped"]["a model"] == (
        "FileNotFoundError: No such file: '.../model.ckpt', see https://host/a/page"
    )


def test_every_benchmark_that_writes_its_arguments_takes_them_from_there() -> None:
    readers = [path.name for path in (ROOT / "benchmarks").glob("*.py") if "sys.argv" in path.read_text()]
    assert readers == ["speed_report.py"]

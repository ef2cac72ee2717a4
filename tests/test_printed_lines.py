# SPDX-License-Identifier: Apache-2.0
"""What a user sees of the commands: few lines, none twice, and at the end what there is and what comes next."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from anomalib_uniass.__main__ import COMMANDS
from anomalib_uniass.__main__ import main as our_main
from tests.helpers.datasets import make_mvtec_layout

PACKAGE = Path(__file__).parents[1]
ADVERTS = ("💡", "litlogger", "pypi.org")
DIGITS = re.compile(r"\d+")


def anomalib(folder: Path, *words: str) -> list[str]:
    """Run the stock command and return all that it prints, in order, as in a file that takes both streams."""
    environment = os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "anomalib_uniass", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=False,
    )
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0, "\n".join(lines[-30:])
    return lines


def repeated(lines: list[str]) -> list[str]:
    """Return log lines that come more than once, whatever the time before them."""
    said = [line.split(" - ", maxsplit=1)[-1].strip() for line in lines]
    return [line for line, count in Counter(said).items() if count > 1 and re.search(r"\w{3}.*\s.*\w{3}", line)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Train a small model by the command line, in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("my parts")
    make_mvtec_layout(folder / "DIR", ["bolt", "cap", "nut"], train=4, good=1, defective=1)
    model = ["--model", "UniAS", "--model.backbone", "resnet18", "--model.pre_trained", "false"]
    sizes = ["--model.image_size", "[128, 128]", "--model.hidden_dim", "32", "--model.feedforward_dim", "32"]
    data = ["--data", "Unified", "--data.root", "DIR", "--data.num_workers", "0", "--data.comparison", "comparison"]
    trainer = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    return folder, anomalib(folder, "train", *model, *sizes, *data, *trainer)


def test_training_says_no_line_twice_and_no_advert(run: tuple[Path, list[str]]) -> None:
    _, lines = run
    assert not [line for line in lines if any(advert in line for advert in ADVERTS)]
    assert repeated(lines) == []
    assert len(lines) <= 75


def test_training_ends_with_what_there_is_and_what_comes_next(run: tuple[Path, list[str]]) -> None:
    folder, lines = run
    last = "\n".join(lines[-6:])
    found = dict(re.findall(r"^(Table|Page|Comparison|Checkpoint): +(\S+)", last, flags=re.MULTILINE))
    assert list(found) == ["Table", "Page", "Comparison", "Checkpoint"]
    for name, path in found.items():
        assert (folder / path).is_file(), name
    (next_command,) = (line for line in lines if line.startswith("Next:"))
    command = f"--model UniAS --ckpt_path {found['Checkpoint']}"
    assert next_command.split(maxsplit=1)[1] == f"anomalib predict {command} --data IMAGES"
    assert lines[-1].strip() == f"anomalib export {command} --export_type openvino"


def test_tables_of_a_training_are_in_percent(run: tuple[Path, list[str]]) -> None:
    folder, lines = run
    metrics = json.loads((folder / "results/UniAS/DIR/v0/metrics/per_category.json").read_text())["mean"]
    (row,) = (line.split() for line in lines if re.match(" *mean +\\d+ +\\d+ ", line))  # that of the metrics
    assert f"{100 * metrics['pixel_AP']:.2f}" in row
    (pooled,) = (line for line in lines if line.startswith("All categories together"))
    assert "percent" in pooled and len(re.findall(r"\d+\.\d\d\b", pooled)) == 4
    assert not any("Test metric" in line for line in lines)


@pytest.mark.slow
def test_export_prints_what_it_wrote_and_no_diary(run: tuple[Path, list[str]]) -> None:
    folder, _ = run
    checkpoint = "results/UniAS/DIR/v0/weights/lightning/model.ckpt"
    model = ["--model", "UniAS", "--model.backbone", "resnet18", "--model.pre_trained", "false"]
    sizes = ["--model.image_size", "[128, 128]", "--model.hidden_dim", "32", "--model.feedforward_dim", "32"]
    given = ["--export_type", "openvino", "--ckpt_path", checkpoint, "--export_root", "OUT"]
    lines = anomalib(folder, "export", *model, *sizes, *given)
    assert len(lines) <= 30
    assert not [line for line in lines if "onnx" in line or any(advert in line for advert in ADVERTS)]
    exported = "OUT/weights/openvino/model.xml"
    size = sum((folder / exported).with_suffix(end).stat().st_size for end in (".xml", ".bin")) / 1e6
    assert f"Exported:   {exported} ({size:.1f} MB, weights in float32)" in lines
    assert "Thresholds: OUT/weights/openvino/category_thresholds.json" in lines
    assert f"Next:       anomalib-uniass validate-export CKPT {exported} --data DIR" in lines


@pytest.mark.slow
def test_benchmark_ends_with_a_table_and_a_page_that_are_there(tmp_path: Path) -> None:
    make_mvtec_layout(tmp_path / "parts", ["bolt", "cap"], train=4, good=1, defective=1)
    backbone = {"backbone": "resnet18", "pre_trained": False}
    bank = {"class_path": "BoundedPatchcore", "init_args": backbone | {"image_size": [64, 64], "coreset_size": 10}}
    padim = {"class_path": "Padim", "init_args": backbone | {"layers": ["layer1"], "n_features": 4}}
    data = {"class_path": "Unified", "init_args": {"root": "parts", "num_workers": 0, "comparison": "comparison"}}
    config = {"accelerator": "cpu", "benchmark": {"seed": 0, "model": {"grid": [bank, padim]}, "data": data}}
    (tmp_path / "benchmark.yaml").write_text(json.dumps(config))
    lines = anomalib(tmp_path, "benchmark", "--config", "benchmark.yaml")
    assert lines[-1] == "Page:  comparison/report.html"
    assert lines[-2] == "Table: comparison/table.csv (fractions)"
    assert (tmp_path / "comparison/report.html").is_file()
    rows = [line.split() for line in lines[-15:]]
    assert [row[0] for row in rows if len(row) == 9 and row[0] in ("BoundedPatchcore", "Padim")] == [
        "BoundedPatchcore",
        "Padim",
    ]
    for path in re.findall(r"(?<!\S)/[^\s:]*(?:\.html|\.csv|\.json)\b", "\n".join(lines)):
        assert Path(path).exists(), f"{path} is named, and there is no such file"


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_names_our_commands(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["anomalib-uniass", word])
    with pytest.raises(SystemExit) as ended:
        our_main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for name, words in COMMANDS.items():
        assert f"  {name}" in said and words in said
    for name in ("fit", "train", "predict", "export"):
        assert re.search(rf"\b{name}\b", said.partition("anomalib's:")[2])


def test_an_unknown_command_is_told_which_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["anomalib-uniass", "validate_export", "CKPT"])
    with pytest.raises(SystemExit) as ended:
        our_main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "no command 'validate_export'. Did you mean validate-export?" in said
    for name in (*COMMANDS, "fit", "train", "test", "predict", "export", "install"):
        assert name in said

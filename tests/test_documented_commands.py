# SPDX-License-Identifier: Apache-2.0
"""Every command and every block of code in the documentation, extracted from the text and run.

Run as they are written, but small; what is put in place of what is written stands in the tables below:

- `ENDS`: options at the end of a command: one epoch on a CPU without workers, two categories of a dataset that has
  more, a ResNet-18 with random weights at width 32 and 128 x 128 pixels. `SAMPLE_SIZES`: few small images.
- `ENTRIES`: the same in the entries of a benchmark's file, whose accelerator becomes the CPU.
- `PYTHON`: the same in Python. What a block of Python takes as given stands in its surroundings.
- Names such as `DIR`, `IMAGES`, `GOOD`, `CKPT`, `model.xml` and `part.png` are files and folders of that name.
- Our own wheel is built and installed without what it needs. Other packages of `pip install` must be declared, and
  targets of `make` must exist.
- docs/first_hour.md, whose blocks take what those before them leave, is run by tests/test_first_hour.py.

A command or a block that no rule covers fails: extend the tables with what is new.
"""

import ast
import inspect
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anomalib.models
import pandas as pd
import pytest
import torch
import yaml
from anomalib.cli.cli import main
from anomalib.engine import Engine
from anomalib.models import list_models
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from PIL import Image

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.__main__ import main as our_main
from anomalib_uniass.prediction import PredictFolder
from anomalib_uniass.thresholds.post_processor import CategoryThresholdPostProcessor
from tests.helpers.datasets import make_mvtec_layout, make_visa_layout
from tests.models.test_unias_parity import official_state_dict

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "MODEL_CARD.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").glob("*.yaml")),
]
SCRIPTS = [*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/sample_data/*.py")]
PROGRAMS = ("anomalib", "anomalib-uniass", "make", "pip", "python", "pytest")
OWN_WHEEL = re.compile(r"pip (wheel|install) .*(\.|\.whl'?)$")
"""Commands that build or install this package; the others install packages of a registry."""
IN_ORDER = "docs/first_hour.md"
OWN_PARTS = ["bolt", "bottle", "cap", "carpet"]

# --- What is put in place of what is written -------------------------------------------------------------------------

CPU = ["--trainer.accelerator", "cpu"]
EPOCH = [*CPU, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"]
EPOCHS = [*CPU, "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "1"]
NETWORK = {"backbone": "resnet18", "pre_trained": False, "weights": None, "image_size": [128, 128]}
WIDTH = {"hidden_dim": 32, "feedforward_dim": 32}
SHALLOW = {"channel_branch": False}  # half of the time of an export
LOADERS = {"num_workers": 0, "train_batch_size": 8, "eval_batch_size": 8}

MODELS: dict[str, dict[str, Any]] = {
    "UniAS": NETWORK | WIDTH | SHALLOW,
    "UniAD": NETWORK | WIDTH,
    "BoundedPatchcore": NETWORK | {"max_patches": 500, "coreset_size": 20},
    "Padim": {"backbone": "resnet18", "pre_trained": False, "layers": ["layer1"], "n_features": 4},
}
ENTRIES = MODELS | {name: MODELS[name] | {"max_epochs": 1} for name in ("UniAS", "UniAD")}
DATA: dict[str, dict[str, Any]] = {
    "MVTec": LOADERS | {"categories": ["bottle", "carpet"]},
    "VisA": LOADERS | {"categories": ["candle", "fryum"]},
    "Unified": LOADERS | {"categories": ["bolt", "cap"]},
    "MVTecAD": LOADERS,
}
SAMPLE_ROOT = "datasets/inspection_sample"
SAMPLE_DATA = LOADERS | {"categories": ["brick", "solar_mono"]}
SAMPLE_SIZES = ["--image-size", "64", "--train", "3", "--good", "1", "--per-defect", "1"]
# Subcommands, the sizes of model and data aside. The only documented `fit` goes on after an epoch.
ENDS = {"train": EPOCH, "fit": EPOCHS, "test": CPU, "predict": CPU, "export": list[str]()}
PYTHON = {
    "max_epochs=1000": "max_epochs=1, accelerator='cpu'",
    "UniAS()": f"UniAS(**{MODELS['UniAS']})",
    'root="datasets/MVTecAD", train_batch_size=64': f'root="datasets/MVTecAD", **{DATA["MVTec"]}',
}
"""Texts of Python blocks and their replacements, each of which must be found somewhere."""

FOLDERS = re.compile(r"DIR/<category>/")
"""Beginning of blocks that show folders."""

LEAVES = {
    "train": "results/**/metrics/per_category.csv",
    "fit": "results/**/weights/lightning/model.ckpt",
    "test": "results/**/metrics/per_category.csv",
    "predict": "results/**/images/**/*.png",
    "export": "**/weights/openvino/model.xml",
    "benchmark": "results/comparison/*/table.csv",
    "validate-export": "validation/validation.json",
    "calibrate": "calibrated.ckpt",
}

# --- Reading the texts -----------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A command as it is written: variables before it, the program and its arguments."""

    environment: dict[str, str]
    words: list[str]

    @classmethod
    def parse(cls, line: str) -> "Command":
        words = shlex.split(line.removeprefix("$ "), comments=True)
        variables = list(itertools.takewhile(re.compile(r"[A-Z_]+=").match, words))
        return cls(dict(word.split("=", 1) for word in variables), words[len(variables) :])

    @property
    def program(self) -> str:
        return self.words[0] if self.words else ""


def blocks(text: str) -> Iterator[str]:
    """Yield the code blocks of a Markdown text, fenced ones and indented ones."""
    text = re.sub(r"^```\{.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)  # directives of Sphinx
    for fenced in re.finditer(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield fenced[1]
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for indented in re.finditer(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE):
        yield re.sub(r"^    ", "", indented[0], flags=re.MULTILINE).strip("\n") + "\n"


def is_command(line: str) -> bool:
    return re.match(rf"(\$ )?([A-Z_]+=\S+ )*({'|'.join(PROGRAMS)}) ", line) is not None


def lines_of(path: Path) -> Iterator[str]:
    """Yield the commands of a file: lines of code blocks, spans of code with options, and comments in YAML."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        yield from (line for line in re.findall(r"^#   (.*)$", text, re.MULTILINE) if is_command(line))
        return
    for block in blocks(text):
        yield from (line for line in block.splitlines() if is_command(line))
    for span in re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", text):
        if is_command(span) and (" --" in span or span.startswith(("make ", "pip "))):
            yield " ".join(span.split())


def all_commands() -> dict[str, Command]:
    found = [Command.parse(line) for path in TEXTS for line in lines_of(path)]
    return {shlex.join([*(f"{k}={v}" for k, v in c.environment.items()), *c.words]): c for c in found}


def all_blocks() -> dict[str, str]:
    """Return the code blocks that hold no command, by file and number."""
    return {
        f"{path.relative_to(ROOT)}:{number}": block
        for path in TEXTS
        if path.suffix == ".md" and path != ROOT / IN_ORDER
        for number, block in enumerate(blocks(path.read_text(encoding="utf-8")))
        if not any(is_command(line) for line in block.splitlines())
    }


COMMANDS = all_commands()
BLOCKS = all_blocks()
(EXPORT,) = [written for written in COMMANDS if " export " in written and "--compression_type" in written]
(SAMPLE,) = [written for written in COMMANDS if "sample_data" in written]


def runs() -> list[Any]:
    """Return the commands to run; exports that do less than the one to INT8 are slow and add little."""
    marks = {True: [pytest.mark.slow], False: []}
    return [
        pytest.param(written, id=written, marks=marks[" export " in written and written != EXPORT])
        for written, command in COMMANDS.items()
        if command.program not in ("make", "pip")
    ]


# --- Where they run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the files and folders that the texts name, once."""
    folder = tmp_path_factory.mktemp("documented")
    tiny = {"train": 3, "good": 1, "defective": 1}
    make_mvtec_layout(folder / "DIR", [*OWN_PARTS, *named_in_configs()], **tiny)
    make_visa_layout(folder / "VISA", ["candle", "fryum"], **tiny)
    make_mvtec_layout(folder / "datasets/MVTecAD", ["bottle", "carpet"], **tiny)
    shutil.copytree(folder / "DIR/bolt/test", folder / "IMAGES")
    shutil.copytree(folder / "DIR/bolt/test/good", folder / "GOOD/bolt")
    Image.open(folder / "DIR/bolt/test/good/000.png").save(folder / "part.png")
    torch.save({"state_dict": official_state_dict("unias_head_h32")}, folder / "OFFICIAL.pth")
    for path in [*ROOT.glob("configs/*.yaml"), *ROOT.glob("benchmarks/configs/*.yaml"), *SCRIPTS]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(shrunk(path.read_text()) if path.name.startswith("benchmark_") else path.read_text())

    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=folder / "training", logger=False)
    data = Unified(root=folder / "DIR", **(LOADERS | {"categories": OWN_PARTS}))
    engine.fit(UniAS(**MODELS["UniAS"], visualizer=False), datamodule=data)
    engine.trainer.save_checkpoint(folder / "CKPT")
    stopped = folder / "results/UniAS/MVTecAD/v0"
    (stopped / "weights/lightning").mkdir(parents=True)
    shutil.copy(folder / "CKPT", stopped / "weights/lightning/model.ckpt")
    (stopped.parent / "latest").symlink_to("v0")
    shutil.rmtree(folder / "training")
    return folder


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Go to a fresh copy of that folder, with an exported model or the demo's data if the text names one."""
    written = next(iter(request.node.callspec.params.values()))
    if "model.xml" in BLOCKS.get(written, written):
        prepared = request.getfixturevalue("exported")
    if "demo.yaml" in BLOCKS.get(written, written):
        prepared = request.getfixturevalue("sample")
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def exported(prepared: Path) -> Path:
    """Run the documented export to INT8 there, whose result all that needs an exported model shares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prepared)
        run_words(COMMANDS[EXPORT].words, patch)
    for path in (prepared / "OUT/weights/openvino").iterdir():
        shutil.copy(path, prepared / path.name)
    return prepared


@pytest.fixture(scope="module")
def sample(prepared: Path) -> Path:
    """Run the documented command that writes the demo's data there, which all that trains on them shares."""
    for package in ("elpv_dataset", "skimage"):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prepared)
        run_words([*COMMANDS[SAMPLE].words, *SAMPLE_SIZES], patch)
    return prepared


def named_in_configs() -> list[str]:
    """Return the categories that configurations for `Unified` name, in lists of augmentations."""
    names: set[str] = set()
    for path in [*ROOT.glob("configs/*.yaml"), *ROOT.glob("benchmarks/configs/*.yaml")]:
        data = data_of(yaml.safe_load(path.read_text()))
        if data["class_path"] == "Unified":
            arguments = data["init_args"]
            names |= {name for key in ("hflip", "vflip", "rotate", "categories") for name in arguments.get(key) or ()}
    return sorted(names)


def data_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["benchmark"]["data"] if "benchmark" in config else config["data"]


def shrunk(text: str) -> str:
    """Put small models and data into a benchmark's file."""
    config = yaml.safe_load(text)
    config["accelerator"] = ["cpu"]
    for entry in config["benchmark"]["model"]["grid"]:
        arguments = arguments_of(entry["init_args"]) | ENTRIES[entry["class_path"]]
        arguments.pop("weights", None)
        written = ", ".join(f"{key}: {json.dumps(value)}" for key, value in arguments.items())
        entry["init_args"] = f"${{oc.create:{{{written}}}}}"
    data = config["benchmark"]["data"]
    data["init_args"] |= small(data["class_path"], data["init_args"]["root"])
    return yaml.safe_dump(config)


def arguments_of(written: str | dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a benchmark's entry, which are one string."""
    return OmegaConf.to_container(OmegaConf.create({"entry": written}), resolve=True)["entry"]  # type: ignore[index, call-overload, return-value]


def options(prefix: str, arguments: dict[str, Any]) -> list[str]:
    return [word for key, value in arguments.items() for word in (f"--{prefix}.{key}", json.dumps(value).strip('"'))]


def short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def small(data: str, root: str | None) -> dict[str, Any]:
    return SAMPLE_DATA if root == SAMPLE_ROOT else DATA[short(data)]


def ended(words: list[str]) -> list[str]:
    """Append what keeps a command small: rules by subcommand, model and data."""
    given = dict(itertools.pairwise(words))
    config = yaml.safe_load(Path(given["--config"]).read_text()) if "--config" in given else {}
    model = given.get("--model") or config.get("model", {}).get("class_path")
    data = given.get("--data") or config.get("data", {}).get("class_path")
    extra = []
    if model and not (words[0] in ("test", "predict", "export") and "--ckpt_path" in given):  # CKPT is all it takes
        extra += options("model", MODELS[short(model)])
    if data and not Path(data).is_dir():
        root = given.get("--data.root") or config.get("data", {}).get("init_args", {}).get("root")
        extra += options("data", small(data, root))
    return [*words, *extra, *ENDS[words[0]]]


def run_words(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Run a command of Python or anomalib in this process."""
    program, *arguments = words
    if program == "python":
        program, *arguments = [argument for argument in arguments if argument != "-m"]
    if arguments[:1] in (["validate-export"], ["calibrate"]):
        patch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as ended_with:
            our_main()
        wrong = 1 if arguments[0] == "validate-export" else 0  # INT8 of a model that learned nothing decides otherwise
        assert ended_with.value.code in (0, wrong)
    elif program in ("anomalib", "anomalib-uniass", "anomalib_uniass"):
        patch.setattr(sys, "argv", ["anomalib", *(arguments if arguments[0] == "benchmark" else ended(arguments))])
        (main if program == "anomalib" else our_main)()
    else:
        patch.setattr(sys, "argv", [program, *arguments])
        if program.endswith(".py"):
            patch.syspath_prepend(Path(program).resolve().parent)  # as Python does
        (runpy.run_path if program.endswith(".py") else runpy.run_module)(program, run_name="__main__")


# --- Tests -----------------------------------------------------------------------------------------------------------


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 20
    assert {command.program for command in COMMANDS.values()} <= set(PROGRAMS)
    for expected in ("anomalib train --model UniAS --data MVTec", "pip install .", "make demo"):
        assert expected in COMMANDS


def test_a_block_with_a_command_holds_commands_alone() -> None:
    markdown = [path for path in TEXTS if path.suffix == ".md"]
    found = [block.splitlines() for path in markdown for block in blocks(path.read_text(encoding="utf-8"))]
    mixed = [lines for lines in found if any(map(is_command, lines))]
    assert [line for lines in mixed for line in lines if line and not is_command(line)] == []


@pytest.mark.parametrize("written", runs())
def test_documented_command_runs(
    written: str, here: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if written == EXPORT:
        assert list((request.getfixturevalue("exported") / "OUT").glob(LEAVES["export"]))
        return
    if written == SAMPLE:
        assert list((request.getfixturevalue("sample") / SAMPLE_ROOT).glob("*/train/good/*.png"))
        return
    command = COMMANDS[written]
    if command.words[-1] == "--help" or ".help " in written:
        monkeypatch.setattr(sys, "argv", command.words)
        with pytest.raises(SystemExit) as ended_with:
            (main if command.program == "anomalib" else our_main)()
        assert ended_with.value.code in (None, 0)
        return
    for name, value in command.environment.items():
        monkeypatch.setenv(name, value)
    if "visa" in written:
        (here / "DIR").rename(here / "PARTS")
        (here / "VISA").rename(here / "DIR")
    subcommand = next((word for word in command.words if word in LEAVES), None)
    before = set(here.glob(LEAVES[subcommand])) if subcommand else set()
    run_words(command.words, monkeypatch)
    if subcommand:
        left = sorted(set(here.glob(LEAVES[subcommand])) - before)
        assert left
        if subcommand == "benchmark":
            grid = yaml.safe_load(Path(command.words[-1]).read_text())["benchmark"]["model"]["grid"]
            assert list(pd.read_csv(left[0])["model"]) == [entry["class_path"] for entry in grid]


@pytest.mark.parametrize("written", [key for key, c in COMMANDS.items() if c.program == "make"])
def test_documented_target_of_make_exists(written: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(COMMANDS[written].words[1:]) <= set(targets)


def test_documented_installation_works(tmp_path: Path) -> None:
    """In a copy of what is installed from, in the order of the page; without a network and what the package needs."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("anomalib_uniass", "autoload"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    commands = [command for written, command in COMMANDS.items() if OWN_WHEEL.match(written)]
    assert [command.words[1] for command in commands] == ["install", "wheel", "install"]
    for number, command in enumerate(commands):
        words = [str(path) for word in command.words for path in tmp_path.glob(word if "*" in word else "-")] or ["."]
        target = tmp_path / f"installed_{number}"
        given = [word for word in command.words[1:] if word != "." and "*" not in word]
        given += ["--no-build-isolation", "--no-deps", "--quiet"]
        given += ["--target", str(target)] if command.words[1] == "install" else []
        subprocess.run([sys.executable, "-m", "pip", *given, *words], cwd=tmp_path, check=True)
        if command.words[1] == "install":
            assert (target / "anomalib_uniass/__init__.py").is_file()
            assert (target / "anomalib_uniass.pth").is_file()


@pytest.mark.parametrize(
    "written", [key for key, c in COMMANDS.items() if c.program == "pip" and not OWN_WHEEL.match(key)]
)
def test_documented_package_is_declared(written: str) -> None:
    """The name of this project would not do: it is on no registry."""
    project = (ROOT / "pyproject.toml").read_text()
    declared = {"openvino", *re.findall(r'^ +"([A-Za-z0-9-]+)', project, re.MULTILINE)}
    _, subcommand, *packages = COMMANDS[written].words
    assert subcommand == "install"
    assert {package.partition("[")[0] for package in packages} <= declared


@pytest.mark.parametrize(
    "page", [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.svg"), ROOT / "README.md"], ids=lambda p: p.name
)
def test_named_files_are_where_they_are_said_to_be(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"(?<![\w/.])(?:\w+/)*\w+\.(?:py|yaml)\b", text))
    places = ("", "anomalib_uniass/", "anomalib_uniass/models/unias/", "configs/")
    assert [name for name in sorted(names) if not any((ROOT / place / name).is_file() for place in places)] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_is_short_and_narrow() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_words_are_explained_where_the_readme_points_to() -> None:
    """Before its first table; these were used by README and docs without a word on what they are."""
    terms = (ROOT / "docs/terms.md").read_text(encoding="utf-8")
    explained = " ".join(re.findall(r"^\| ([^|]+) \|", terms, re.MULTILINE))
    words = "pixel AP, AUPRO, DSC, pixel F1-max, image AUROC, mask, false-positive rate, category, threshold, 0.5, "
    words += "calibration, backbone, level, stride, token, memory bank, coreset, recipe, preset, segmentation head, "
    words += "CKPT, DIR, GOOD, IMAGES, epoch, INT8, bfloat16, OpenVINO, AMX, acceleration"
    assert [word for word in words.split(", ") if word not in explained] == []
    before_tables = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n|")[0]
    assert "(docs/terms.md)" in before_tables


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda p: p.name)
def test_a_page_of_the_docs_is_short_and_narrow(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "    "))] == []


@pytest.mark.parametrize("place", BLOCKS)
def test_documented_block_of_code_runs(place: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = BLOCKS[place]
    if FOLDERS.match(block):
        return
    if is_python(block):
        run_python_block(block)
        return
    content = yaml.safe_load(block)
    if isinstance(content, list):  # entries of a benchmark
        for entry in content:
            assert entry["class_path"] in list_models("pascal")
            cls = getattr(anomalib.models, entry["class_path"])
            assert set(arguments_of(entry["init_args"])) <= set(inspect.signature(cls).parameters)
        return
    assert set(content) <= {"model", "data", "trainer"}, "a block that is neither a command nor Python nor YAML"
    (here / "block.yaml").write_text(block)
    arguments = ended(["train", "--config", "block.yaml", "--data", "Unified", "--data.root", "DIR"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended_with:
        patch.setattr(sys, "argv", ["anomalib", *arguments, "--print_config"])
        main()
    assert ended_with.value.code == 0
    printed = capsys.readouterr().out
    for name in re.findall(r"class_path: (\S+)", block):
        assert short(name) in printed


def is_python(block: str) -> bool:
    try:
        tree = ast.parse(block)
    except SyntaxError:
        return False
    return not all(isinstance(node, ast.AnnAssign | ast.Expr) and not is_call(node) for node in tree.body)


def is_call(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def run_python_block(block: str) -> None:
    """Run a block with what its text takes as given: a trained model, its data and an engine."""
    engine = Engine(accelerator="cpu", max_epochs=1)
    given = {
        "UniAS": UniAS,
        "CategoryThresholdPostProcessor": CategoryThresholdPostProcessor,
        "path": Path("CKPT"),
        "engine": engine,
        "datamodule": Unified(root="DIR", categories=OWN_PARTS, **LOADERS),
    }
    for text, replacement in PYTHON.items():
        block = block.replace(text, replacement)
    exec(compile(block, "documented", "exec"), given)


def test_every_replacement_of_python_is_needed() -> None:
    assert [text for text in PYTHON if not any(text in block for block in BLOCKS.values())] == []


def test_documented_options_exist() -> None:
    owners = {"model": [UniAS], "data": [Unified, PredictFolder], "trainer": [Trainer]}
    options = {
        kind: {name for owner in of for name in inspect.signature(owner).parameters} for kind, of in owners.items()
    }
    texts = " ".join(path.read_text(encoding="utf-8") for path in TEXTS if path.suffix == ".md")
    of_anomalib = {("data", "category"), ("model", "help")}
    named = set(re.findall(rf"--({'|'.join(owners)})\.([a-z_]+)", texts)) - of_anomalib
    assert len(named) > 5
    assert {(owner, name) for owner, name in named if name not in options[owner]} == set()

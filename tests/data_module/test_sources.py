# SPDX-License-Identifier: Apache-2.0
import sys
from collections.abc import Iterator
from pathlib import Path

import anomalib.models
import pytest
from anomalib.data import MPDD, BTech, Kaputt, MVTecAD, RealIAD, Visa

from anomalib_uniass.data.mvtec_layout import MVTecLayout
from anomalib_uniass.data.sources import (
    category_folders,
    check_names,
    has_mvtec_layout,
    load_source,
    official_categories,
    present_categories,
    read_with,
)
from tests.helpers.datasets import make_mvtec_layout, make_visa_layout


def test_source_by_name_and_by_class_path() -> None:
    assert load_source("MVTecAD") is MVTecAD
    assert load_source("anomalib.data.BTech") is BTech


@pytest.mark.parametrize(
    "name", ["NoSuchData", "Folder", "AnomalibDataModule", "MVTec3D", "UCSDped", "pathlib.Path", "no.x"]
)
def test_source_that_cannot_be_used(name: str) -> None:
    with pytest.raises(ValueError, match=f"source='{name}'"):
        load_source(name)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of a user that says so when it is imported."""
    for name in ("__init__", "data"):
        path = tmp_path / "my_parts" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"print('imported')\nfrom anomalib.data import MPDD\nclass Mine(MPDD):\n    name = '{name}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_parts"
    for name in ("my_parts", "my_parts.data"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("module", ["my_parts", "my_parts.data", "antigravity", "this.s"])
def test_no_module_is_imported_for_a_name(module: str, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValueError, match=rf"source='{module}.Mine' is in a module that is not imported.* `import {module}` before, or"
    ):
        load_source(f"{module}.Mine")
    assert module not in sys.modules
    assert "imported" not in capsys.readouterr().out


def test_class_of_an_imported_module(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import my_parts  # what the message asks for

    assert load_source("my_parts.Mine") is my_parts.Mine
    with pytest.raises(ValueError, match=r"`import my_parts\.data` before"):
        load_source("my_parts.data.Mine")
    monkeypatch.setattr(sys.modules["__main__"], "Script", my_parts.Mine, raising=False)
    assert load_source("__main__.Script") is my_parts.Mine


@pytest.mark.parametrize("module", ["my_parts", "my_parts.data"])
def test_class_of_an_allowed_package(module: str, package: str) -> None:
    anomalib.models.ALLOWED_MODULES.add(package)
    try:
        assert issubclass(load_source(f"{module}.Mine"), MPDD)
        for name in ("my_parts.nothing.Mine", "my_parts.Yours", "my_parts.data.Yours"):
            with pytest.raises(ValueError, match=f"source='{name}'"):
                load_source(name)
        with pytest.raises(ValueError, match="is not imported"):
            load_source("my_parts_too.Mine")
    finally:
        anomalib.models.ALLOWED_MODULES.remove(package)


def test_mvtec_layout_is_read_by_our_own_reader(tmp_path: Path) -> None:
    assert type(read_with(MVTecAD, root=tmp_path, category="nut")) is MVTecLayout
    assert type(read_with(BTech, root=tmp_path, category="01")) is BTech
    assert has_mvtec_layout(MVTecAD) and has_mvtec_layout(MVTecLayout)
    assert not has_mvtec_layout(MPDD) and not has_mvtec_layout(type("Mine", (MVTecAD,), {}))


def test_unusable_source_lists_the_usable_ones() -> None:
    with pytest.raises(ValueError, match=r"AutoVI, BMAD, BTech, Kaputt, MPDD, MVTecAD, .*RealIAD, VAD, Visa;"):
        load_source("mvtec")


def test_official_categories() -> None:
    assert len(official_categories(MVTecAD)) == 15
    assert len(official_categories(Visa)) == 12
    assert official_categories(BTech) == ("01", "02", "03")
    assert len(official_categories(RealIAD)) == 30
    assert len(official_categories(Kaputt)) > 0


def test_official_categories_of_a_subclass() -> None:
    class Mine(MVTecAD):
        pass

    assert official_categories(Mine) == official_categories(MVTecAD)


def test_present_categories_of_mvtec_layout_may_be_incomplete(tmp_path: Path) -> None:
    make_mvtec_layout(tmp_path, ["nut", "bolt"], 8, train=1)
    (tmp_path / "results" / "images").mkdir(parents=True)
    (tmp_path / "empty" / "train" / "good").mkdir(parents=True)
    (tmp_path / ".cache" / "train").mkdir(parents=True)
    (tmp_path / "readme.txt").touch()
    assert list(category_folders(MVTecAD, tmp_path)) == ["bolt", "empty", "nut", "results"]
    (tmp_path / "tested" / "Test").mkdir(parents=True)
    assert present_categories(MVTecAD, tmp_path) == ["bolt", "empty", "nut", "tested"]
    assert present_categories(MVTecAD, tmp_path / "missing") == []


def test_present_categories_of_others_need_training_images(tmp_path: Path) -> None:
    make_mvtec_layout(tmp_path, ["nut"], 8, train=1)
    (tmp_path / "empty" / "train" / "good").mkdir(parents=True)
    (tmp_path / "empty" / "train" / "good" / ".DS_Store").touch()
    assert present_categories(MPDD, tmp_path) == ["nut"]


def test_present_categories_of_visa_raw_and_converted(tmp_path: Path) -> None:
    make_visa_layout(tmp_path, ["candle", "pcb1"], 8, train=1)
    assert present_categories(Visa, tmp_path) == ["candle", "pcb1"]
    (tmp_path / "visa_pytorch" / "fryum" / "train" / "good").mkdir(parents=True)  # left by anomalib's conversion
    make_mvtec_layout(tmp_path / "visa_pytorch", ["own"], 8, train=1)
    assert present_categories(Visa, tmp_path) == ["candle", "own", "pcb1"]


def test_names() -> None:
    check_names(["b", "a"], ["a", "b", "c"], argument="categories", context="here")
    with pytest.raises(ValueError, match=r"hflip names unknown categories: 'hazel_nut' \(did you mean 'hazelnut'\?\)"):
        check_names(["hazel_nut"], ["hazelnut", "metal_nut"], argument="hflip", context="here")
    with pytest.raises(ValueError, match=r"'x', 'y'\. Known from here: a, b"):
        check_names(["x", "a", "y"], ["b", "a"], argument="categories", context="here")
    with pytest.raises(ValueError, match="categories names a category twice: a"):
        check_names(["a", "b", "a"], ["a", "b"], argument="categories", context="here")

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from anomalib.data import BTech, Kaputt, MVTecAD, RealIAD, Visa

from anomalib_uniass.data.sources import (
    category_folders,
    check_names,
    load_source,
    official_categories,
    present_categories,
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


def test_present_categories_need_training_images(tmp_path: Path) -> None:
    make_mvtec_layout(tmp_path, ["nut", "bolt"], 8, train=1)
    (tmp_path / "results" / "images").mkdir(parents=True)
    (tmp_path / "empty" / "train" / "good").mkdir(parents=True)
    (tmp_path / ".cache" / "train").mkdir(parents=True)
    (tmp_path / "readme.txt").touch()
    assert list(category_folders(MVTecAD, tmp_path)) == ["bolt", "empty", "nut", "results"]
    assert present_categories(MVTecAD, tmp_path) == ["bolt", "nut"]
    assert present_categories(MVTecAD, tmp_path / "missing") == []


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

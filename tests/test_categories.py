# SPDX-License-Identifier: Apache-2.0
"""Which category an image has: by its folders, in every spelling and layout, and by its dataset."""

import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from anomalib_uniass.categories import (
    CategoryNames,
    category_of,
    default_category,
    folders_above,
    row_categories,
    sample_categories,
)

NAMES = CategoryNames(["bolt", "cap", "Größe", "two words", "test rig"])


@pytest.mark.parametrize(
    ("path", "category"),
    [
        ("/d/bolt/1.png", "bolt"),
        ("/d/Bolt/1.png", "bolt"),
        ("/d/BOLT/1.png", "bolt"),
        ("/d/bolt /1.png", "bolt"),
        ("/d/ bolt/1.png", "bolt"),
        (unicodedata.normalize("NFD", "/d/Größe/1.png"), "Größe"),
        (unicodedata.normalize("NFD", "/d/GRÖSSE/1.png"), "Größe"),
        ("/d/Two Words/1.png", "two words"),
        ("/d/twowords/1.png", None),
        ("/d/bolts/1.png", None),
        ("/d/incoming/1.png", None),
        ("/d/incoming/bolt.png", None),  # a file, no folder
        ("/bolt.png", None),
        ("", None),
        ("/d/cap/bolt/1.png", "bolt"),  # the nearest
        ("/d/cap/Bolt/deeper/1.png", "bolt"),
        # the layout <category>/<split>/<defect> wins
        ("/d/bolt/test/cap/1.png", "bolt"),
        ("/d/bolt/TEST/cap/1.png", "bolt"),
        ("/d/Bolt/test/Cap/1.png", "bolt"),
        ("/d/bolt/train/cap/1.png", "bolt"),
        ("/d/bolt/ground_truth/cap/1.png", "bolt"),
        ("/d/bolt/test_public/cap/1.png", "bolt"),
        ("/d/bolt/test/cap/deeper/1.png", "bolt"),
        ("/d/bolt/test/1.png", "bolt"),
        ("/d/bolt/test/cap/test/good/1.png", "cap"),  # of two, the nearer one
        ("/d/test/cap/1.png", "cap"),  # no category above the split
        ("/d/bolt/today/cap/1.png", "cap"),  # no split
        ("/d/cap/../bolt/1.png", "bolt"),
        ("/d/cap/../incoming/1.png", None),
        ("/d//bolt//1.png", "bolt"),
        # lists that Windows made
        ("C:\\d\\bolt\\1.png", "bolt"),
        ("C:\\d\\bolt\\test\\cap\\1.png", "bolt"),
        ("\\\\server\\share\\Bolt\\1.png", "bolt"),
        ("parts\\cap\\..\\bolt\\1.png", "bolt"),
    ],
)
def test_category_of_a_path(path: str, category: str | None) -> None:
    assert NAMES.of_path(path) == category
    assert not path or NAMES.of_path(Path(path)) == category


def test_a_category_that_is_called_like_a_split() -> None:
    names = CategoryNames(["bolt", "test", "good"])
    assert names.of_path("/d/test/test/good/1.png") == "test"
    assert names.of_path("/d/test/train/good/1.png") == "test"
    assert names.of_path("/d/bolt/test/good/1.png") == "bolt"
    assert names.of_path("/d/test/1.png") == "test"


def test_relative_paths_lie_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Bolt").mkdir()
    monkeypatch.chdir(tmp_path / "Bolt")
    assert NAMES.of_path("1.png") == NAMES.of_path("./x/1.png") == "bolt"
    assert NAMES.of_path("../1.png") is None


def test_links_count_by_their_own_names(tmp_path: Path) -> None:
    (tmp_path / "cap").mkdir()
    (tmp_path / "bolt").symlink_to(tmp_path / "cap")
    assert NAMES.of_path(tmp_path / "bolt" / "1.png") == "bolt"


def test_two_categories_of_one_spelling_are_known_by_their_exact_names() -> None:
    names = CategoryNames(["bolt", "Bolt", "cap"])
    assert [names.match(name) for name in ("bolt", "Bolt", "BOLT", "bolt ", "CAP")] == [
        "bolt",
        "Bolt",
        None,
        None,
        "cap",
    ]


def test_nothing_is_known_without_names() -> None:
    assert CategoryNames([]).of_path("/d/bolt/1.png") is None
    assert CategoryNames([]).match("") is None


def test_names_that_are_no_text_of_unicode() -> None:
    assert NAMES.of_path("/d/Gr\udcf6\udcdfe/1.png") is None
    assert folders_above("/d/Gr\udcf6\udcdfe/1.png")[-1] == "Gr\udcf6\udcdfe"


def test_a_dataset_tells_before_a_folder() -> None:
    told = sample_categories(
        SimpleNamespace(samples=pd.DataFrame({"image_path": [Path("/d/cap/1.png")], "category": ["bolt"]})),
        SimpleNamespace(samples=pd.DataFrame({"image_path": ["/d/cap/2.png"]})),
        SimpleNamespace(),
        None,
    )
    assert told == {"/d/cap/1.png": "bolt"}
    assert category_of("/d/cap/1.png", told, NAMES) == "bolt"
    assert category_of(Path("/d/cap/2.png"), told, NAMES) == "cap"


def test_rows_without_a_category_share_one() -> None:
    frame = pd.DataFrame({"category": ["bolt", 7]}, index=[3, 5])
    assert row_categories(frame).to_dict() == {3: "bolt", 5: "7"}
    assert row_categories(frame.drop(columns="category")).to_dict() == {3: "all", 5: "all"}


class Named:
    name = 7


@pytest.mark.parametrize(
    ("datamodule", "category"),
    [
        (None, "all"),
        (SimpleNamespace(category="bolt", name="MVTecAD"), "bolt"),
        (SimpleNamespace(category="", name="Folder"), "Folder"),
        (Named(), "Named"),
    ],
)
def test_default_category(datamodule: object, category: str) -> None:
    assert default_category(datamodule) == category

# SPDX-License-Identifier: Apache-2.0
"""Properties of the bookkeeping of splits and categories, for whatever categories and numbers of images."""

from collections import Counter
from typing import Any

import pandas as pd
import pytest
from anomalib.data.datasets.base import AnomalibDataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from anomalib_uniass.data.dataset import UnifiedDataset
from anomalib_uniass.data.sources import check_names
from anomalib_uniass.data.unified import split_rows

properties = settings(
    deadline=None, max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = st.text(min_size=1, max_size=6)
RATIOS = st.floats(0, 1, exclude_min=True, exclude_max=True)
SEEDS = st.one_of(st.none(), st.integers(0, 2**32 - 1))
FILES = 24


@st.composite
def columns(draw: st.DrawFn) -> pd.Series:
    """Draw the category of each row: two rows at least of each category, in any order."""
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    rows = [name for name in names for _ in range(draw(st.integers(2, 12)))]
    return pd.Series(draw(st.permutations(rows)), dtype=object)


@properties
@given(columns(), RATIOS, SEEDS)
@example(pd.Series(["a", "a"]), 0.999999, 0)
@example(pd.Series(["a", "a"]), 5e-324, None)
def test_split_takes_a_share_of_each_category_never_none_and_never_all(
    categories: pd.Series, ratio: float, seed: int | None
) -> None:
    rows = split_rows(categories, ratio=ratio, seed=seed)
    assert rows == sorted(set(rows))
    assert set(rows) <= set(range(len(categories)))
    taken, total = Counter(categories.iloc[rows]), Counter(categories)
    assert taken.keys() == total.keys()
    for category, count in taken.items():
        share = ratio * total[category]
        if 1 <= share <= total[category] - 1:
            assert abs(count - share) <= 0.5
        else:
            assert count == (1 if share < 1 else total[category] - 1)


@properties
@given(columns(), RATIOS, st.integers(0, 2**32 - 1))
def test_split_of_a_category_does_not_depend_on_the_others(categories: pd.Series, ratio: float, seed: int) -> None:
    together = split_rows(categories, ratio=ratio, seed=seed)
    assert split_rows(categories, ratio=ratio, seed=seed) == together
    for category in categories.unique():
        positions = [i for i, name in enumerate(categories) if name == category]
        alone = split_rows(pd.Series([category] * len(positions)), ratio=ratio, seed=seed)
        assert [positions[row] for row in alone] == [row for row in together if categories[row] == category]


@properties
@given(columns(), NAMES, RATIOS, SEEDS)
def test_split_refuses_a_category_of_one_image_and_names_it(
    categories: pd.Series, single: str, ratio: float, seed: int | None
) -> None:
    if single in set(categories):
        categories = categories[categories != single].reset_index(drop=True)
    with pytest.raises(ValueError, match="has a single training image") as error:
        split_rows(pd.concat([categories, pd.Series([single])], ignore_index=True), ratio=ratio, seed=seed)
    assert repr(single) in str(error.value)


@properties
@given(st.lists(NAMES, max_size=5), st.lists(NAMES, max_size=5))
def test_names_pass_if_all_are_known_and_distinct_and_are_named_if_not(names: list[str], known: list[str]) -> None:
    unknown = [name for name in names if name not in known]
    if not unknown and len(set(names)) == len(names):
        check_names(names, known, argument="hflip", context="here")
        return
    with pytest.raises(ValueError, match=r"^hflip names ") as error:
        check_names(names, known, argument="hflip", context="here")
    twice = [] if unknown else [name for name in names if names.count(name) > 1]
    assert all(repr(name) in str(error.value) for name in unknown)
    assert all(name in str(error.value) for name in twice)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{i:02}.png" for i in range(FILES)]
    for path in paths:
        path.touch()
    return [str(path) for path in paths]


class Part(AnomalibDataset):
    """A source's dataset of one category."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__()
        frame = pd.DataFrame({"image_path": paths, "split": "train", "label_index": 0, "mask_path": ""})
        frame.attrs["task"] = "segmentation"
        self.samples = frame


@properties
@given(st.data())
def test_joined_and_subsampled_rows_keep_their_category(files: list[str], data: st.DataObject) -> None:
    names = data.draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    owner = dict(zip(data.draw(st.permutations(files)), data.draw(owners(names)), strict=True))
    parts = {name: Part([path for path, own in owner.items() if own == name]) for name in names}

    joined = UnifiedDataset.join(parts)
    assert list(joined.samples["image_path"]) == sorted(owner)
    assert dict(zip(joined.samples["image_path"], joined.samples["category"], strict=True)) == owner
    assert joined.task == "segmentation"

    rows = data.draw(st.lists(st.integers(0, len(joined) - 1), unique=True, min_size=1))
    paths = [joined.samples["image_path"][row] for row in rows]
    some = joined.subsample(rows).samples
    assert dict(zip(some["image_path"], some["category"], strict=True)) == {path: owner[path] for path in paths}
    assert list(some["image_path"]) == sorted(paths)
    assert len(joined) == FILES, "the whole stays as it is"

    # A split in two loses nothing and has nothing twice.
    if min(Counter(owner.values()).values()) > 1:
        held_out = split_rows(joined.samples["category"], ratio=0.3, seed=0)
        rest = sorted(set(range(FILES)) - set(held_out))
        halves = [list(joined.subsample(part).samples["image_path"]) for part in (held_out, rest)]
        assert sorted(halves[0] + halves[1]) == sorted(files)


def owners(names: list[str]) -> st.SearchStrategy[list[str]]:
    """Draw a category for each file, each category at least once."""
    rest: Any = st.lists(st.sampled_from(names), min_size=FILES - len(names), max_size=FILES - len(names))
    return rest.map(lambda more: [*names, *more])

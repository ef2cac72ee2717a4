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
from anomalib_uniass.data.splits import held_out

properties = settings(
    deadline=None, max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = st.text(min_size=1, max_size=6)
RATIOS = st.floats(0, 1, exclude_min=True, exclude_max=True)
SEEDS = st.integers(0, 2**32 - 1)
FILES = 24


@st.composite
def columns(draw: st.DrawFn) -> pd.Series:
    """Draw the category of each row: two rows at least of each category, in any order."""
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    rows = [name for name in names for _ in range(draw(st.integers(2, 12)))]
    return pd.Series(draw(st.permutations(rows)), dtype=object)


def split(categories: pd.Series, *, ratio: float, seed: int) -> list[int]:
    """Hold out rows named by their position."""
    return held_out(list(categories), [f"{i}.png" for i in range(len(categories))], ratio=ratio, seed=seed)


@properties
@given(columns(), RATIOS, SEEDS)
@example(pd.Series(["a", "a"]), 0.999999, 0)
@example(pd.Series(["a", "a"]), 5e-324, 1)
def test_split_takes_a_share_of_each_category_never_none_and_never_all(
    categories: pd.Series, ratio: float, seed: int
) -> None:
    rows = split(categories, ratio=ratio, seed=seed)
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
@given(columns(), RATIOS, SEEDS, st.randoms(use_true_random=False))
def test_split_depends_on_names_alone(categories: pd.Series, ratio: float, seed: int, random: Any) -> None:
    names = [f"{category}/{i}" for i, category in enumerate(categories)]
    together = {names[row] for row in held_out(list(categories), names, ratio=ratio, seed=seed)}
    for category in categories.unique():
        own = [name for name, one in zip(names, categories, strict=True) if one == category]
        random.shuffle(own)
        alone = {own[row] for row in held_out([category] * len(own), own, ratio=ratio, seed=seed)}
        assert alone == together & set(own)


@properties
@given(st.integers(2, 60), st.integers(1, 20), RATIOS, SEEDS)
def test_images_that_come_or_go_move_at_most_as_many_others(old: int, more: int, ratio: float, seed: int) -> None:
    names = [f"{i:03}.png" for i in range(old + more)]
    few, many = (
        {names[row] for row in held_out(["a"] * count, names[:count], ratio=ratio, seed=seed)}
        for count in (old, old + more)
    )
    assert len((few ^ many) & set(names[:old])) <= more


@properties
@given(columns(), RATIOS, SEEDS, st.data())
def test_copies_stay_together_and_count_once(
    categories: pd.Series, ratio: float, seed: int, data: st.DataObject
) -> None:
    """A copy beside each image changes no side; with copies elsewhere there is still none on both."""
    names = [f"{i}.png" for i in range(len(categories))]
    twins = [f"copies/{name}" for name in names]
    pairs = [[i, i + len(names)] for i in range(len(names))]
    rows = set(held_out([*categories, *categories], names + twins, pairs, ratio=ratio, seed=seed))
    assert all((first in rows) == (second in rows) for first, second in pairs)
    assert len(rows) == 2 * len(split(categories, ratio=ratio, seed=seed))

    some = data.draw(st.lists(st.integers(0, len(names) - 1), unique=True, max_size=len(names)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(some)), max_size=3)))
    groups = [some[a:b] for a, b in zip([0, *cuts], [*cuts, len(some)], strict=True) if b - a > 1]
    try:
        rows = set(held_out(list(categories), names, groups, ratio=ratio, seed=seed))
    except ValueError as error:
        assert "all equal" in str(error) or "of other categories that validate" in str(error)
        return
    assert all(rows.isdisjoint(group) or rows.issuperset(group) for group in groups)
    for category in categories.unique():
        own = {i for i, one in enumerate(categories) if one == category}
        assert own & rows and own - rows


@properties
@given(columns(), NAMES, RATIOS, SEEDS)
def test_split_refuses_a_category_of_one_image_and_names_it(
    categories: pd.Series, single: str, ratio: float, seed: int
) -> None:
    if single in set(categories):
        categories = categories[categories != single].reset_index(drop=True)
    with pytest.raises(ValueError, match="has a single training image") as error:
        split(pd.concat([categories, pd.Series([single])], ignore_index=True), ratio=ratio, seed=seed)
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
        validate = split(joined.samples["category"], ratio=0.3, seed=0)
        rest = sorted(set(range(FILES)) - set(validate))
        halves = [list(joined.subsample(part).samples["image_path"]) for part in (validate, rest)]
        assert sorted(halves[0] + halves[1]) == sorted(files)


def owners(names: list[str]) -> st.SearchStrategy[list[str]]:
    """Draw a category for each file, each category at least once."""
    rest: Any = st.lists(st.sampled_from(names), min_size=FILES - len(names), max_size=FILES - len(names))
    return rest.map(lambda more: [*names, *more])

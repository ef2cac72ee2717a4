# SPDX-License-Identifier: Apache-2.0
"""Which images a page shows: beside a plain sort of all of them."""

import random

import pytest
import torch

from anomalib_uniass.report.gallery import KINDS, PANEL, Gallery, Kind, Maps, TestedImage, reduce_map

NO_MAPS = Maps(None, None, None)


def images(count: int, *, threshold: float | None) -> list[TestedImage]:
    draw = random.Random(0)
    scores = [draw.random() for _ in range(count)]
    return [
        TestedImage(
            str(i), draw.choice("ab"), score, draw.random() > 0.5, None if threshold is None else score > threshold
        )
        for i, score in enumerate(scores)
    ]


def expected(found: list[TestedImage], category: str, kind: Kind, per_kind: int) -> list[str]:
    """Sort all images."""
    wanted = {"hits": (True, True), "misses": (True, False), "false alarms": (False, True)}[kind]
    chosen = [
        one
        for one in found
        if one.category == category and one.is_defective is wanted[0] and one.is_flagged in (wanted[1], None)
    ]
    chosen.sort(key=lambda one: one.score, reverse=kind != "misses")
    return [one.path for one in chosen[:per_kind]]


@pytest.mark.parametrize("threshold", [0.6, None])
@pytest.mark.parametrize("processes", [1, 3])
def test_a_gallery_keeps_what_a_sort_puts_first(threshold: float | None, processes: int) -> None:
    found = images(100, threshold=threshold)
    galleries = [Gallery(3) for _ in range(processes)]
    for i, image in enumerate(found):
        galleries[i % processes].add(image, lambda: NO_MAPS)
    galleries[-1].add(found[0], lambda: NO_MAPS)  # the sampler repeats an image
    merged = galleries[0].merge(galleries[1:])
    for category in "ab":
        for kind in KINDS:
            shown = [example.image.path for example in merged.examples[category, kind]]
            assert shown == expected(found, category, kind, 3)


def test_maps_are_made_of_kept_images_alone() -> None:
    made = []
    gallery = Gallery(1)
    for score in (0.9, 0.8, 0.95):
        image = TestedImage(str(score), "a", score, True, True)
        gallery.add(image, lambda score=score: made.append(score) or NO_MAPS)  # type: ignore[misc, func-returns-value]
    assert made == [0.9, 0.95]


def test_an_image_that_is_listed_twice_is_no_trouble() -> None:
    gallery, maps = Gallery(2), Maps(torch.zeros(2, 2), None, None)
    for _ in range(3):
        gallery.add(TestedImage("same.png", "a", 0.5, True, True), lambda: maps)
    merged = gallery.merge([gallery])
    assert {example.image.path for example in merged.examples["a", "hits"]} == {"same.png"}


def test_raw_maps_of_any_range_are_kept() -> None:
    kept = reduce_map(torch.full((8, 6), 1e30))
    assert kept is not None
    assert kept.float().max() == pytest.approx(1e30, rel=0.01)


def test_a_defect_of_one_pixel_stays_in_a_small_map() -> None:
    mask = torch.zeros(1, 3000, 2000, dtype=torch.bool)
    mask[0, 1234, 567] = True
    small = reduce_map(mask)
    assert small is not None
    assert small.shape == (PANEL, PANEL * 2 // 3)
    assert small.dtype == torch.bool
    assert small.sum() == 1
    kept = reduce_map(torch.full((8, 6), 0.25))
    assert kept is not None
    assert kept.shape == (8, 6)
    assert kept.tolist() == [[0.25] * 6] * 8

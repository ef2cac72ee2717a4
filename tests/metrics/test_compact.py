"""Compact maps against exact metrics and scikit-learn: many pixels, ties, negative scores, mixed sizes."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from anomalib_uniass.metrics import CategoryMetrics, category_metrics, pixel_metrics
from anomalib_uniass.metrics.compact import compress, rank_compact


def photographs(seed: int, count: int = 6, side: int = 160) -> tuple[Tensor, Tensor]:
    """Maps like those of the models: products of distances over orders of magnitude, with defects in most images."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(count, side, side, generator=generator).mul(1.5).exp() * 1e-4
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    for number in range(1, count):
        top, left = torch.randint(0, side - 40, (2,), generator=generator).tolist()
        masks[number, top : top + 9 * number, left : left + 12] = True
        masks[number, : number + 1, :7] = True  # a second region
    return torch.where(masks, maps * 20, maps), masks


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.log(), lambda x: 1000 * x - 0.5], ids=["", "log", "sign"])
def test_rank_compact_are_the_exact_ones(change: object) -> None:
    maps, masks = photographs(0)
    maps = change(maps)  # type: ignore[operator]
    exact = pixel_metrics(maps, masks)
    compact = rank_compact(list(map(compress, maps, masks))).metrics()
    assert compact == pytest.approx(exact, abs=1e-3)  # of 6 small maps; what is highest of many counts is noise
    for name in ("pixel_AP", "pixel_AUROC", "AUPRO"):
        assert compact[name] == pytest.approx(exact[name], abs=1e-4)
    assert compact["pixel_AP"] == pytest.approx(average_precision_score(masks.flatten(), maps.flatten()), abs=1e-4)


def test_a_photograph_takes_little() -> None:
    kept = compress(torch.rand(2000, 2000), torch.zeros(2000, 2000, dtype=torch.bool))
    assert sum(values.numel() for values in kept) < 2000 * 2000 / 100


def test_without_defects_and_without_good_pixels() -> None:
    good = [compress(torch.rand(4, 5), torch.zeros(4, 5, dtype=torch.bool))]
    assert all(np.isnan(value) for value in rank_compact(good).metrics().values())
    bad = [compress(torch.rand(4, 5), torch.ones(4, 5, dtype=torch.bool))]
    assert rank_compact(bad).metrics()["pixel_AP"] == 1 and np.isnan(rank_compact(bad).metrics()["AUPRO"])


def test_too_many_pixels_are_made_compact(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, masks = photographs(1)
    tables = []
    for limit in (10**9, 3 * maps[0].numel()):
        monkeypatch.setattr(category_metrics, "EXACT_PIXELS", limit)
        metric = CategoryMetrics(["a", "b"])
        for rows in torch.arange(6).split(2):
            names = ["a", "b"]
            metric.update(maps[rows], masks[rows], maps[rows].amax((1, 2)), masks[rows].any(2).any(1), names)
        assert bool(metric.lengths) == (limit < 10**9)
        tables.append(metric.compute())
    for name in ("a", "b", "mean"):
        assert tables[1][name] == pytest.approx(tables[0][name], abs=1e-3, nan_ok=True)


def test_photographs_of_different_sizes() -> None:
    """Of three sizes, in the middle of a run: as if all pixels lay in one image of each label."""
    sizes = [(160, 160), (60, 160), (100, 41)]
    metric, scores, target = CategoryMetrics(["a"]), [], []
    for seed, (height, width) in enumerate(sizes):
        maps, masks = (x[:, :height, :width] for x in photographs(seed))
        metric.update(maps, masks, maps.amax((1, 2)), masks.any(2).any(1), ["a"] * len(maps))
        scores.append(maps.flatten())
        target.append(masks.flatten())
    row = metric.compute()["a"]
    assert row["pixel_AP"] == pytest.approx(average_precision_score(torch.cat(target), torch.cat(scores)), abs=1e-4)
    assert row["n_images"] == 18 and metric.map_size is None


def test_order_of_scores_across_zero() -> None:
    values = [-1e30, -2.0, -1e-30, 0.0, 1e-30, 1.5, 3e38]
    for low, high in pairwise(values):
        maps = torch.tensor([[low, high]])
        assert rank_compact([compress(maps, maps == high)]).metrics()["pixel_AUROC"] == pytest.approx(1)
        assert rank_compact([compress(maps, maps == low)]).metrics()["pixel_AUROC"] == pytest.approx(0)

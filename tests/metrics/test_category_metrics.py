# SPDX-License-Identifier: Apache-2.0
"""The metric's states: categories, means, undefined values, errors, copies and gathering across processes."""

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing
from torch.utils.data import DistributedSampler

from anomalib_uniass.metrics import CategoryMetrics, image_metrics, pixel_metrics
from anomalib_uniass.metrics.functional import METRICS, PIXEL_METRICS

PARITY = Path(__file__).parents[1] / "data" / "parity"


def random_batch(seed: int, category: list[str]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(len(category), 8, 9, generator=generator) < 0.2
    masks[0] = False
    maps = torch.rand(masks.shape, generator=generator) + 0.3 * masks
    return maps, masks, maps.flatten(1).std(1), masks.flatten(1).any(1), category


def test_release_means_through_batches() -> None:
    data = np.load(PARITY / "metrics.npz")
    expected = json.loads((PARITY / "metrics.json").read_text())
    maps, masks = torch.from_numpy(data["preds"]), torch.from_numpy(data["masks"])
    metric = CategoryMetrics(["beta", "alpha"])
    for batch in torch.randperm(len(maps), generator=torch.Generator().manual_seed(0)).split(5):
        labels = masks[batch].flatten(1).any(1)
        categories = [str(data["category"][index]) for index in batch]
        metric.update(maps[batch].unsqueeze(1), masks[batch], maps[batch].flatten(1).std(1), labels, categories)
    table = metric.compute()
    assert list(table) == ["alpha", "beta", "mean"]
    for name, row in table.items():
        for key, release_key in (("pixel_AP", "ap"), ("DSC", "dice"), ("pixel_AUROC", "pixel"), ("image_AUROC", "std")):
            assert row[key] == pytest.approx(expected[f"{name}_{release_key}_auc"], abs=1e-6)
    assert table["mean"]["n_images"] == len(maps)
    assert table["mean"]["n_anomalous"] == int(masks.flatten(1).any(1).sum())
    assert metric.map_size == (64, 64)


def test_keeps_raw_copies() -> None:
    maps, masks, scores, labels, category = random_batch(0, ["a"] * 4)
    maps = 50 * maps - 20
    expected = pixel_metrics(maps, masks) | image_metrics(scores, labels)
    metric = CategoryMetrics(["a"])
    metric.update(maps, masks, scores, labels, category)
    for tensor in (maps, masks, scores, labels):
        tensor.zero_()
    row = metric.compute()["a"]
    assert {key: row[key] for key in METRICS} == expected


def test_mean_leaves_undefined_categories_out() -> None:
    maps, masks, scores, labels, _ = random_batch(0, ["a"] * 4)
    metric = CategoryMetrics(["a", "good", "never"])
    metric.update(maps, masks, scores, labels, ["a"] * 4)
    metric.update(maps, torch.zeros_like(masks), scores, torch.zeros(4), ["good"] * 4)
    with pytest.warns(UserWarning) as warnings:
        table = metric.compute()
    messages = [str(warning.message) for warning in warnings]
    assert len(messages) == 2
    assert "'good': its test images are all good and its masks have no anomalous pixel" in messages[0]
    assert all(key in messages[0] for key in METRICS)
    assert "'never': it has no test images" in messages[1]
    assert all(math.isnan(table["good"][key]) and math.isnan(table["never"][key]) for key in METRICS)
    assert {key: table["mean"][key] for key in METRICS} == {key: table["a"][key] for key in METRICS}
    assert table["never"]["n_images"] == 0


def test_warnings_name_the_reason() -> None:
    maps, masks, scores, _, _ = random_batch(0, ["a"] * 4)
    metric = CategoryMetrics(["bad", "vanished"])
    metric.update(maps, torch.ones_like(masks), scores, torch.ones(4), ["bad"] * 4)
    metric.update(maps, torch.zeros_like(masks), scores, torch.tensor([0, 0, 1, 1]), ["vanished"] * 4)
    with pytest.warns(UserWarning) as warnings:
        table = metric.compute()
    first, second = (str(warning.message) for warning in warnings)
    assert "'bad': its test images are all anomalous and its masks have no normal pixel" in first
    assert first.endswith("left out of the mean: AUPRO, pixel_AUROC, image_AUROC.")
    assert "'vanished': its masks have no anomalous pixel" in second
    assert not math.isnan(table["vanished"]["image_AUROC"])


@pytest.mark.parametrize("missing", ["maps", "masks"])
def test_without_maps_or_masks_only_image_auroc(missing: str) -> None:
    maps, masks, scores, labels, category = random_batch(0, ["a"] * 4)
    metric = CategoryMetrics(["a"])
    metric.update(None if missing == "maps" else maps, None if missing == "masks" else masks, scores, labels, category)
    with pytest.warns(UserWarning, match="No anomaly maps or no masks") as warnings:
        row = metric.compute()["mean"]
    assert len(warnings) == 1
    assert all(math.isnan(row[key]) for key in PIXEL_METRICS)
    assert row["image_AUROC"] == image_metrics(scores, labels)["image_AUROC"]
    assert metric.map_size is None


def test_merged_states_equal_one_metric() -> None:
    batches = [random_batch(0, ["a", "b", "a"]), random_batch(1, ["b", "b"]), random_batch(2, ["a", "b", "b"])]
    whole, left, right = (CategoryMetrics(["a", "b"]) for _ in range(3))
    for batch in batches:
        whole.update(*batch)
    left.update(*batches[0])
    right.update(*batches[1])
    right.update(*batches[2])
    left.merge_state(right)
    assert left.compute() == whole.compute()
    whole.reset()
    assert whole.map_size is None


# --- Several processes -----------------------------------------------------------------------------------------------

RANKS = 3
forks = pytest.mark.skipif(sys.platform != "linux", reason="forks")


def rank_table(rank: int, folder: str, batches: list[list[tuple[Any, ...]]]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    metric = CategoryMetrics(["a", "b"])
    for batch in batches[rank]:
        metric.update(*batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = {"table": metric.compute(), "warnings": [str(warning.message) for warning in caught]}
        except ValueError as error:
            result = {"error": str(error)}
    assert len(metric.category_id) == len(batches[rank]), "states must be local again after compute"
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    distributed.barrier()
    distributed.destroy_process_group()


def in_ranks(folder: Path, batches: list[list[tuple[Any, ...]]]) -> list[dict[str, Any]]:
    """Give each rank its batches and return what each computes."""
    multiprocessing.start_processes(rank_table, args=(str(folder), batches), nprocs=RANKS, start_method="fork")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def rows_of(batch: tuple[Any, ...], rows: list[int], names: list[str] | None) -> tuple[Any, ...]:
    *tensors, category = batch
    chosen = [None if tensor is None else tensor[rows] for tensor in tensors]
    return *chosen, [category[row] for row in rows], None if names is None else [names[row] for row in rows]


def table_of(*batches: tuple[Any, ...]) -> dict[str, dict[str, float]]:
    metric = CategoryMetrics(["a", "b"])
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def approx(table: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {name: pytest.approx(row, abs=1e-12, nan_ok=True) for name, row in table.items()}


@forks
@pytest.mark.parametrize("missing", [(), (0, 1), (1,)], ids=["pixels", "scores alone", "no masks"])
@pytest.mark.parametrize("count", [7, 6, 2])
def test_repeats_of_the_sampler_do_not_count(tmp_path: Path, count: int, missing: tuple[int, ...]) -> None:
    """Three processes with a `DistributedSampler` give the table of one."""
    batch = random_batch(count, ["a", "b", "b", "a", "b", "b", "b"][:count])
    batch = tuple(None if index in missing else value for index, value in enumerate(batch))
    names = [f"{row}.png" for row in range(count)]
    samplers = [DistributedSampler(range(count), RANKS, rank, shuffle=False) for rank in range(RANKS)]
    assert sum(len(list(sampler)) for sampler in samplers) == 3 * math.ceil(count / 3)
    # Batches of two, so that ranks have full and smaller ones.
    batches = [[rows_of(batch, rows.tolist(), names) for rows in torch.tensor(list(s)).split(2)] for s in samplers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = table_of(batch)
    for result in in_ranks(tmp_path, batches):
        assert result["table"] == approx(expected)
        assert result["table"]["mean"]["n_images"] == count


@forks
def test_ranks_without_images_and_lists_with_repeats(tmp_path: Path) -> None:
    """One process has no image at all; one lists an image twice, which counts twice as in a run by itself."""
    first, second = random_batch(0, ["a", "b", "a"]), random_batch(1, ["b", "b"])
    names = ["0.png", "1.png", "0.png"]
    results = in_ranks(
        tmp_path, [[rows_of(first, [0, 1, 2], names)], [], [rows_of(second, [0, 1], ["1.png", "2.png"])]]
    )
    expected = table_of(first, rows_of(second, [1], None))
    assert expected["mean"]["n_images"] == 4
    for result in results:
        assert result["table"] == approx(expected)


@forks
def test_images_without_a_name_count_with_a_word(tmp_path: Path) -> None:
    batches = [random_batch(rank, ["a", "b"]) for rank in range(RANKS)]
    results = in_ranks(tmp_path, [[rows_of(batch, [0, 1], ["", ""])] for batch in batches])
    for result in results:
        assert result["table"] == approx(table_of(*batches))
    assert any("6 images came without a name" in message for message in results[0]["warnings"])


@forks
def test_ranks_with_maps_of_other_sizes(tmp_path: Path) -> None:
    batch, (maps, masks, *rest) = random_batch(0, ["a", "b"]), random_batch(1, ["a", "b"])
    other = (maps[:, :5], masks[:, :5], *rest)
    results = in_ranks(tmp_path, [[batch], [other], []])
    for result in results:
        assert result["table"] == approx(table_of(batch, other))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nccl_gathers_cpu_states(tmp_path: Path) -> None:
    metric = CategoryMetrics(["a"])
    metric.update(*random_batch(0, ["a"] * 4))
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        synced = metric.compute()
    finally:
        torch.distributed.destroy_process_group()
    alone = CategoryMetrics(["a"])
    alone.update(*random_batch(0, ["a"] * 4))
    assert synced == alone.compute()


@pytest.mark.parametrize("categories", [[], ["a", "a"], ["a", "mean"]])
def test_bad_categories(categories: list[str]) -> None:
    with pytest.raises(ValueError, match="distinct names other than 'mean'"):
        CategoryMetrics(categories)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": ["a", "a", "x", "a"]}, r"unknown categories \['x'\].*\['a'\]"),
        ({"category": ["a"]}, r"pred_score must have shape \(1,\), got \(4,\)"),
        ({"gt_label": torch.ones(4, 1)}, r"gt_label must have shape \(4,\), got \(4, 1\)"),
        ({"anomaly_map": torch.rand(4, 5, 9)}, r"gt_mask must have shape \(4, 5, 9\), got \(4, 8, 9\)"),
        ({"anomaly_map": torch.rand(4, 2, 8, 9)}, r"anomaly_map must have shape \(4, .*got \(4, 2, 8, 9\)"),
        ({"anomaly_map": torch.rand(3, 8, 9)}, r"anomaly_map must have shape \(4, 8, 9\), got \(3, 8, 9\)"),
        ({"anomaly_map": torch.full((4, 8, 9), math.inf)}, "anomaly_map must be finite, got 288"),
        ({"pred_score": torch.tensor([0, 0, 0, math.nan])}, "pred_score must be finite, got 1"),
    ],
)
def test_bad_batches_leave_no_trace(change: dict[str, object], message: str) -> None:
    names = ("anomaly_map", "gt_mask", "pred_score", "gt_label", "category")
    batch = dict(zip(names, random_batch(0, ["a"] * 4), strict=True))
    metric = CategoryMetrics(["a"])
    with pytest.raises(ValueError, match=message):
        metric.update(**(batch | change))
    assert not metric.category_id
    assert not metric.anomaly_map


def test_batches_have_maps_or_have_none() -> None:
    maps, masks, scores, labels, category = random_batch(0, ["a"] * 4)
    metric = CategoryMetrics(["a"])
    metric.update(maps, masks, scores, labels, category)
    with pytest.raises(ValueError, match="with every batch or with none"):
        metric.update(None, None, scores, labels, category)

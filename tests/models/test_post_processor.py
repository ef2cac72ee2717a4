# SPDX-License-Identifier: Apache-2.0
"""Thresholds per category: statistics, post-processor, and the way through checkpoint, prediction and export."""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import pandas as pd
import pytest
import torch
from anomalib.cli.cli import main
from anomalib.data import ImageBatch, ImageItem, InferenceBatch, PredictDataset
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from torch import Tensor, distributed, multiprocessing, nn
from torch.utils.data import DataLoader

from anomalib_uniass import UniAD, UniAS, Unified
from anomalib_uniass.layers.tiling import TiledModel
from anomalib_uniass.models.unias.detector.recipes import paper
from anomalib_uniass.models.unias.torch_model import Reconstruction
from anomalib_uniass.thresholds.calibration import (
    image_thresholds,
    images_needed,
    outliers,
    pixel_thresholds,
)
from anomalib_uniass.thresholds.checks import read_thresholds
from anomalib_uniass.thresholds.good_images import TAIL_RATES, GoodImage, join, map_tails
from anomalib_uniass.thresholds.post_processor import (
    CategoryThresholdPostProcessor,
    missing_thresholds,
)
from tests.helpers import models
from tests.helpers.datasets import make_mvtec_layout

SMALL: dict[str, Any] = models.SMALL | {
    "visualizer": False,
    "evaluator": False,
}
CATEGORIES = ["bolt", "cap", "rod"]
Run = tuple[Path, Path, UniAS]
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "thresholds.py"

# --- Statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.5, 1), (0.03, 33)])
def test_images_needed_is_the_first_count_whose_highest_score_will_do(rate: float, needed: int) -> None:
    assert images_needed(rate) == needed
    assert 1 / (needed + 1) <= rate + 1e-12 < 1 / needed


def test_enough_images_give_the_rank_of_conformal_prediction() -> None:
    scores = torch.from_numpy(np.random.default_rng(0).permutation(np.arange(1.0, 20.0)))  # 1 to 19
    thresholds = image_thresholds({"a": scores, "b": 100 * scores}, 0.1)
    assert thresholds == {"a": pytest.approx(18), "b": pytest.approx(1800)}  # ceil(20 * 0.9)


def test_image_rate_is_kept_with_enough_images() -> None:
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(300):
        calibration, new = rng.lognormal(sigma=1.5, size=(2, 50))
        rates.append(np.mean(new > image_thresholds({"a": torch.from_numpy(calibration)}, 0.1)["a"]))
    assert np.mean(rates) == pytest.approx(5 / 51, abs=0.015)


def kinds(
    rng: np.random.Generator, count: int, *, shift: float = 0.5
) -> Iterator[tuple[str, Callable[[int], Tensor], Tensor]]:
    """Yield categories: a name, a function that draws scores of new good images, and those of 60 training images.

    They differ by orders of magnitude and spread differently; training images have lower scores.
    """
    for number in range(count):
        place, spread = rng.uniform(-10, 0), rng.uniform(0.15, 0.7)

        def draw(images: int, place: float = place, spread: float = spread) -> Tensor:
            return torch.from_numpy(np.exp(rng.normal(place, spread, images)))

        yield f"c{number}", draw, draw(60) * math.exp(-shift * rng.uniform(0.5, 1.5))


@pytest.mark.parametrize("rate", [0.1, 0.05, 0.01])
def test_three_images_keep_the_rate_by_the_spread_of_training_images(rate: float) -> None:
    rng = np.random.default_rng(0)
    achieved, borrowed = [], []
    for _ in range(60):
        drawn = list(kinds(rng, 9))
        new = {name: draw(3) for name, draw, _ in drawn}
        ours = image_thresholds(new, rate, learned={name: scores for name, _, scores in drawn})
        without = image_thresholds(new, rate)
        for name, draw, _ in drawn:
            later = draw(200)
            achieved.append(float((later > ours[name]).double().mean()))
            borrowed.append(float((later > without[name]).double().mean()))
    assert np.mean(achieved) == pytest.approx(rate, abs=0.3 * rate + 0.01)
    assert np.mean(borrowed) < rate + 0.05  # the spread of all categories, without training images
    assert np.mean(achieved) < 0.25  # what the highest of three would give


@pytest.mark.parametrize("factor", [10, 1000, 1e6])
@pytest.mark.parametrize("count", [3, 5, 12])
@pytest.mark.parametrize("has_learned", [True, False])
def test_one_bad_image_moves_no_threshold(factor: float, count: int, has_learned: bool) -> None:
    """A mislabelled, dark or broken image among the good ones: of images and of pixels, its own category included."""
    rng = np.random.default_rng(1)
    drawn = list(kinds(rng, 15))
    new = {name: draw(count) for name, draw, _ in drawn}
    learned = {name: scores for name, _, scores in drawn} if has_learned else None
    spoilt = new | {"c3": torch.cat([new["c3"][:-1], factor * new["c3"].max(dim=0, keepdim=True).values])}
    before, after = (image_thresholds(scores, 0.01, learned=learned) for scores in (new, spoilt))
    moved = {name: after[name] / before[name] for name in before}
    own = moved.pop("c3")
    assert max(abs(value - 1) for value in moved.values()) < (0.05 if has_learned else 0.2)
    assert 0.5 < own < 2.5
    if factor > 10 or has_learned:  # ten times as high is within what the others spread by themselves
        assert outliers(spoilt, learned=learned)["c3"] == [count - 1]
    assert not any(outliers(new, learned=learned).values())


def test_single_images_are_their_own_threshold_where_nothing_else_is_known() -> None:
    found = image_thresholds({"a": torch.tensor([3.0]), "b": torch.tensor([0.0])}, 0.01)
    assert found == {"a": pytest.approx(3.0), "b": pytest.approx(0.0, abs=1e-20)}
    assert list(found) == ["a", "b"]


def test_a_category_without_training_images_has_the_usual_spread() -> None:
    rng = np.random.default_rng(2)
    drawn = list(kinds(rng, 9))
    learned = {name: scores for name, _, scores in drawn}
    found = image_thresholds({"new": torch.tensor([1.0, 1.1])}, 0.01, learned=learned)["new"]
    assert math.exp(2 * 0.15) < found < math.exp(4 * 0.7)


def test_tails_are_the_quantiles_of_maps() -> None:
    rng = np.random.default_rng(0)
    maps = torch.from_numpy(rng.lognormal(size=(2, 1, 64, 64)))
    tails = map_tails(maps)
    assert tails.shape == (2, len(TAIL_RATES))
    for row, values in zip(tails, maps.flatten(1), strict=True):
        for rate, value in zip(TAIL_RATES.tolist()[1:], row.tolist()[1:], strict=True):
            assert (values > value).double().mean() == pytest.approx(rate, abs=1.5 / 4096)
    assert map_tails(torch.zeros(1, 2, 2)).sum() == 0


def test_pixel_rate_is_kept_in_images_that_were_not_calibrated_on() -> None:
    """Brightness differs between images, so that the quantile of three is exceeded far too often in others."""
    rng = np.random.default_rng(0)

    def maps(count: int) -> np.ndarray:
        return np.exp(rng.normal(size=(count, 1)) + 0.5 * rng.normal(size=(count, 2000)))

    naive, achieved = [], []
    for _ in range(10):
        learned = {str(i): map_tails(torch.from_numpy(0.7 * maps(60))) for i in range(8)}
        new = {str(i): maps(3) for i in range(8)}
        tails = {category: map_tails(torch.from_numpy(images)) for category, images in new.items()}
        thresholds = pixel_thresholds(tails, 0.01, learned=learned)
        for category, images in new.items():
            later = maps(50)
            naive.append(np.mean(later > np.quantile(images, 0.99)))
            achieved.append(np.mean(later > thresholds[category]))
    assert np.mean(naive) > 0.04
    assert 0.005 < np.mean(achieved) < 0.025


# --- Post-processor --------------------------------------------------------------------------------------------------


def batch(paths: list[str], scores: list[float], *, anomalous: list[bool] | None = None) -> ImageBatch:
    """Maps that are constant at a tenth of the score."""
    maps = torch.tensor(scores)[:, None, None, None].expand(-1, 1, 4, 4) / 10
    return ImageBatch(
        image=torch.zeros(len(scores), 3, 4, 4),
        image_path=paths,
        pred_score=torch.tensor(scores),
        anomaly_map=maps.clone(),
        gt_label=torch.tensor(anomalous or [False] * len(scores)),
    )


def calibrate(post_processor: PostProcessor, images: ImageBatch) -> None:
    """Run the hooks of a validation whose datamodule has a column of categories: the first folder."""
    paths = images.image_path or []
    samples = pd.DataFrame({"image_path": paths, "category": [path.split("/")[1] for path in paths]})
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(val_data=SimpleNamespace(samples=samples)))
    module: Any = None
    post_processor.setup(trainer, module, "validate")
    post_processor.on_validation_epoch_start(trainer, module)
    post_processor.on_validation_batch_end(trainer, module, images)
    post_processor.on_validation_epoch_end(trainer, module)
    post_processor.teardown(trainer, module, "validate")


@pytest.fixture
def calibrated() -> CategoryThresholdPostProcessor:
    post_processor = CategoryThresholdPostProcessor(image_fpr=0.5, pixel_fpr=0.5)
    paths = ["/bolt/good/0.png", "/bolt/good/1.png", "/cap/good/0.png", "/cap/bad/1.png"]
    calibrate(post_processor, batch(paths, [1.0, 2.0, 100.0, 1e6], anomalous=[False, False, False, True]))
    return post_processor


def test_calibration_takes_good_images_by_category(calibrated: CategoryThresholdPostProcessor) -> None:
    assert calibrated.calibration is not None
    assert calibrated.calibration["image"] == pytest.approx(
        {"bolt": 2.0, "cap": 100.0}
    )  # rank ceil(3 / 2) of 2, ceil(2 / 2) of 1
    assert calibrated.calibration["pixel"]["cap"] < 100
    assert float(calibrated.image_threshold) == 100
    assert float(calibrated.pixel_threshold) == pytest.approx(calibrated.calibration["pixel"]["cap"])
    assert (calibrated.calibration["image_fpr"], calibrated.calibration["pixel_fpr"]) == (0.5, 0.5)


def test_prediction_uses_the_threshold_of_the_nearest_known_folder(calibrated: CategoryThresholdPostProcessor) -> None:
    images = batch(["/x/bolt/y/0.png", "/bolt/cap/0.png", "/x/elsewhere/0.png", "/bolt.png"], [2.01, 99.0, 101.0, 99.0])
    calibrated.post_process_batch(images)
    assert images.pred_label is not None
    assert images.pred_label.tolist() == [True, False, True, False]
    scores = batch(["/bolt/0.png"] * 3, [1.0, 2.0, 1e9])
    calibrated.post_process_batch(scores)
    assert scores.pred_score is not None
    below, at, above = scores.pred_score.tolist()
    assert below == pytest.approx(1 / (1 + math.sqrt(2)))
    assert at == 0.5
    assert 0.9 < above < 1


def test_batches_and_exported_graphs_agree_on_the_fallback(calibrated: CategoryThresholdPostProcessor) -> None:
    images = batch(["/elsewhere/0.png"] * 3, [0.0, 50.0, 150.0])
    exported = calibrated(InferenceBatch(pred_score=images.pred_score, anomaly_map=images.anomaly_map))
    calibrated.post_process_batch(images)
    for name in ("pred_score", "pred_label", "anomaly_map", "pred_mask"):
        torch.testing.assert_close(getattr(exported, name), getattr(images, name))


def test_exported_thresholds_are_in_units_of_exported_outputs(calibrated: CategoryThresholdPostProcessor) -> None:
    thresholds = calibrated.exported_thresholds()
    assert thresholds is not None
    assert set(thresholds) == {"image", "pixel", "image_fpr", "pixel_fpr", "images", "units"}
    assert thresholds["image"]["cap"] == thresholds["pixel"]["cap"] == 0.5
    images = batch(["/bolt/0.png"] * 3, [1.99, 2.0, 2.01])
    exported = calibrated(InferenceBatch(pred_score=images.pred_score, anomaly_map=images.anomaly_map))
    assert (exported.pred_score > thresholds["image"]["bolt"]).tolist() == [False, False, True]
    assert not exported.pred_label.any()


def test_uncalibrated_outputs_stay_raw_and_have_no_thresholds() -> None:
    post_processor = CategoryThresholdPostProcessor()
    raw = torch.tensor([0.1, 7.0])
    assert torch.equal(post_processor(InferenceBatch(pred_score=raw)).pred_score, raw)
    assert post_processor.exported_thresholds() is None


def test_scores_of_zero_stay_below_a_threshold_of_zero() -> None:
    post_processor = CategoryThresholdPostProcessor()
    calibrate(post_processor, batch(["/bolt/0.png", "/bolt/1.png"], [0.0, 0.0]))
    images = batch(["/bolt/0.png", "/bolt/1.png"], [0.0, 1e-3])
    post_processor.post_process_batch(images)
    assert images.pred_label is not None
    assert images.pred_label.tolist() == [False, True]


def test_says_once_which_categories_have_too_few_images(caplog: pytest.LogCaptureFixture) -> None:
    post_processor = CategoryThresholdPostProcessor(image_fpr=0.05)
    module: Any = None
    with caplog.at_level(logging.WARNING):
        calibrate(post_processor, batch(["/bolt/0.png", "/bolt/1.png"], [1.0, 2.0]))
        post_processor.on_validation_batch_end(module, module, batch(["/bolt/0.png"], [1.0]))
        post_processor.on_validation_epoch_end(module, module)
    (message,) = [record.message for record in caplog.records]
    assert "0.05 takes 19 good validation images" in message
    assert "bolt (2)" in message


def test_validation_without_good_images_keeps_the_thresholds(
    calibrated: CategoryThresholdPostProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    before = calibrated.calibration
    calibrate(calibrated, batch(["/bolt/0.png"], [5.0], anomalous=[True]))
    assert calibrated.calibration is before
    assert "No good images" in caplog.text


@pytest.mark.parametrize("arguments", [{"image_fpr": 0}, {"image_fpr": 1}, {"pixel_fpr": -0.1}, {"gamma": 0}])
def test_rates_and_exponent_are_checked(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} .*, got {next(iter(arguments.values()))}"):
        CategoryThresholdPostProcessor(**arguments)


def gather(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    counts = torch.tensor([rank])
    listed_twice = [GoodImage("/bolt/0.png", 0.0, counts), GoodImage("/bolt/0.png", 0.0, counts)]
    parts = [
        {"bolt": [*listed_twice, GoodImage("", 0.25, counts)]},
        {
            "bolt": [GoodImage("/bolt/1.png", 1.0, counts), GoodImage("/bolt/0.png", 0.0, counts)],  # a repeat
            "cap": [GoodImage("/cap/0.png", 5.0, counts), GoodImage("", 6.0, counts)],
        },
    ]
    joined = join(parts[rank])
    Path(folder, str(rank)).write_text(
        json.dumps({name: [image.score for image in images] for name, images in joined.items()})
    )


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_processes_calibrate_on_the_images_of_all_without_repeats_of_the_sampler(tmp_path: Path) -> None:
    multiprocessing.start_processes(gather, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in ("0", "1"):
        assert json.loads((tmp_path / rank).read_text()) == {"bolt": [0.0, 0.0, 0.25, 1.0], "cap": [5.0, 6.0]}


# --- What is not finite ---

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_is_never_good(
    dtype: torch.dtype, calibrated: CategoryThresholdPostProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    """In batches and in exported graphs, image and pixel alike; a negative score is a low one."""
    paths = [f"/bolt/{i}.png" for i in range(6)]
    images = batch(paths, [NAN, INF, -INF, 0.0, -1.0, 1.0])
    maps = torch.zeros(6, 4, 4, dtype=dtype)
    maps[3, 0, 0] = NAN
    images.anomaly_map = maps
    images.pred_score = images.pred_score.to(dtype)
    exported = calibrated(InferenceBatch(pred_score=images.pred_score, anomaly_map=images.anomaly_map))
    calibrated.post_process_batch(images)
    for found in (exported, images):
        assert found.pred_label.tolist() == [True, True, True, True, False, False]
        assert found.pred_score.isinf().tolist() == [True, True, True, True, False, False]
        assert found.pred_mask.sum() == found.anomaly_map.isinf().sum() == 1
        assert found.pred_mask.reshape(6, 4, 4)[3, 0, 0]
    with caplog.at_level(logging.WARNING):
        calibrated.on_predict_end(None, None)
    (message,) = [record.message for record in caplog.records]
    assert "4 images of the prediction have scores or maps that are not finite" in message
    assert "/bolt/3.png" in message and "/bolt/4.png" not in message and "never good" in message


@pytest.mark.parametrize("post_processor", [CategoryThresholdPostProcessor(), PostProcessor()])
def test_nothing_is_added_without_thresholds(post_processor: PostProcessor) -> None:
    images = batch(["/bolt/0.png"], [NAN])
    post_processor.post_process_batch(images)
    assert images.pred_score.isnan().all()


class Graph(nn.Module):
    """An exported model whose raw map is its input, and whose score is the map's standard deviation."""

    def __init__(self, post_processor: PostProcessor) -> None:
        super().__init__()
        self.post_processor = post_processor

    def forward(self, maps: Tensor) -> tuple[Tensor | None, ...]:
        found = self.post_processor(InferenceBatch(anomaly_map=maps, pred_score=maps.flatten(1).std(dim=1)))
        return found.pred_score, found.pred_label, found.anomaly_map, found.pred_mask


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_openvino_does_not_lose_what_is_not_finite(
    precision: str, half: bool, calibrated: CategoryThresholdPostProcessor, tmp_path: Path
) -> None:
    """It takes the greater of NaN and 0 for 0."""
    maps = torch.rand(4, 1, 8, 8)
    for row, value in enumerate((NAN, INF, -INF)):
        maps[row, 0, 2, 3] = value
    names = ["pred_score", "pred_label", "anomaly_map", "pred_mask"]
    graph = torch.onnx.export(
        Graph(calibrated).eval(), (torch.rand(4, 1, 8, 8),), output_names=names, dynamo=True, verbose=False
    )
    graph.save(tmp_path / "model.onnx")
    ov.save_model(ov.convert_model(tmp_path / "model.onnx"), tmp_path / "model.xml", compress_to_fp16=half)
    compiled = ov.Core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": precision})
    found = compiled(maps.numpy())
    assert found["pred_label"].tolist() == [True, True, True, False]
    assert np.isinf(found["pred_score"]).tolist() == [True, True, True, False]
    for values in (np.isinf(found["anomaly_map"]), found["pred_mask"]):
        assert np.argwhere(values).tolist() == [[row, 0, 2, 3] for row in range(3)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image": {"bolt": NAN}, "pixel": {"bolt": 1.0}}, "image threshold of 'bolt' .* got nan"),
        ({"image": {"bolt": 1.0}, "pixel": {"bolt": INF}}, "pixel threshold of 'bolt' .* got inf"),
        ({"image": {"bolt": -1.0}, "pixel": {"bolt": 1.0}}, "image threshold of 'bolt' .* got -1.0"),
        ({"image": {"bolt": "0.5"}, "pixel": {"bolt": 1.0}}, "image threshold of 'bolt' .* got '0.5'"),
        ({"image": {"bolt": True}, "pixel": {"bolt": 1.0}}, "image threshold of 'bolt' .* got True"),
        ({"image": {"bolt": None}, "pixel": {"bolt": 1.0}}, "image threshold of 'bolt' .* got None"),
        ({"image": {"bolt": 1.0, "cap": 1.0}, "pixel": {"bolt": 1.0}}, "no pixel threshold of 'cap'"),
        ({"image": {"bolt": 1.0}, "pixel": {"bolt": 1.0, "cap": 1.0}}, "no image threshold of 'cap'"),
        ({"image": {"bolt": 1.0}}, "under 'pixel', got no such entry"),
        ({"image": {}, "pixel": {}}, r"under 'image', got \{\}"),
        ({"image": [1.0], "pixel": {}}, r"under 'image', got \[1.0\]"),
        ([], r"by 'image' and 'pixel', got \[\]"),
    ],
)
def test_broken_thresholds_are_refused_by_their_entry(content: Any, message: str, tmp_path: Path) -> None:
    """In a checkpoint, set by hand, and in the file beside an exported model."""
    post_processor = CategoryThresholdPostProcessor()
    with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
        post_processor.load_checkpoint_config({"calibration": content})
    assert post_processor.calibration is None
    post_processor.calibration = content
    for use in (post_processor.exported_thresholds, lambda: post_processor.on_predict_start(None, None)):
        with pytest.raises(ValueError, match=f"model: .*{message}"):
            use()
    file = tmp_path / "category_thresholds.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file}: .*{message}"):
        read_thresholds(file)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_a_file_of_thresholds_that_is_no_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "category_thresholds.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"category_thresholds.json: no JSON in UTF-8"):
        read_thresholds(tmp_path / "category_thresholds.json")


@pytest.mark.parametrize("value", [INF, -1.0, NAN])
def test_the_threshold_of_all_must_decide(value: float, calibrated: CategoryThresholdPostProcessor) -> None:
    calibrated._image_threshold.fill_(value)
    calibrated._pixel_threshold.fill_(value)
    with pytest.raises(ValueError, match="image threshold of all categories is"):
        calibrated.on_test_start(None, None)


def test_thresholds_of_an_earlier_version_are_read() -> None:
    post_processor = CategoryThresholdPostProcessor()
    calibration = {"image": {"bolt": 0.0}, "pixel": {"bolt": 1}, "image_fpr": 0.01, "pixel_fpr": 0.001}
    post_processor.load_checkpoint_config({"gamma": 0.5, "calibration": calibration, "categories": ["bolt"]})
    assert post_processor.calibration == calibration
    post_processor.load_checkpoint_config({"gamma": 0.5, "calibration": None, "categories": []})
    assert post_processor.calibration is None


# --- Scores of rounding -----------------------------------------------------------------------------------------------


def test_a_score_of_rounding_sets_no_threshold(caplog: pytest.LogCaptureFixture) -> None:
    """A copy of a training image among the held-out ones: the model reproduces it to the last digit."""
    post_processor = CategoryThresholdPostProcessor(image_fpr=0.5, pixel_fpr=0.5)
    paths = [f"/{name}/{i}.png" for name in ("bolt", "cap", "rod") for i in range(3)]
    with caplog.at_level(logging.WARNING):
        calibrate(post_processor, batch(paths, [1e-10, 2e-2, 3e-2, 1e-2, 2e-2, 3e-2, 1e-10, 0.0, 1e-11]))
    assert post_processor.calibration is not None
    assert post_processor.calibration["image"].keys() == {"bolt", "cap"}
    assert min(post_processor.calibration["image"].values()) > 1e-2
    assert "4 good images of the validation have scores below" in caplog.text
    assert "/bolt/0.png" in caplog.text and "/rod/1.png" in caplog.text and "copies" in caplog.text


@pytest.mark.parametrize("scores", [[1e-6, 1.0], [1e-20, 3e-20], [0.0, 0.0], [5.0]])
def test_scores_over_some_orders_of_magnitude_count(scores: list[float], caplog: pytest.LogCaptureFixture) -> None:
    post_processor = CategoryThresholdPostProcessor(image_fpr=0.5, pixel_fpr=0.5)
    with caplog.at_level(logging.WARNING):
        calibrate(post_processor, batch([f"/bolt/{i}.png" for i in range(len(scores))], scores))
    assert post_processor.calibration is not None
    assert "rounding" not in caplog.text


def test_thresholds_that_most_good_test_images_exceed_are_said(
    calibrated: CategoryThresholdPostProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    good = [f"/bolt/{i}.png" for i in range(5)]
    scores, anomalous = [1.0, 2.1, 2.1, 2.1, 2.1, 1e3, 50.0, 1e3, 1e3], [False] * 5 + [True, False, False, True]
    with caplog.at_level(logging.WARNING):
        calibrated.on_test_start(SimpleNamespace(), None)
        calibrated.post_process_batch(batch([*good, "/bolt/5.png", *["/cap/0.png"] * 3], scores, anomalous=anomalous))
        calibrated.on_test_end(None, None)
        calibrated.on_test_end(None, None)
    (message,) = [record.message for record in caplog.records if "exceed" in record.message]
    assert message.startswith("Most good test images exceed the threshold of their category: bolt (4 of 5). 50 % ")
    calibrated.post_process_batch(batch(good, [9.0] * 5))
    calibrated.on_predict_end(None, None)  # says nothing of what it does not know to be good
    assert sum("exceed" in record.message for record in caplog.records) == 1


# --- Categories that are not known ------------------------------------------------------------------------------------


def test_says_once_of_how_many_images_the_category_is_not_known(
    calibrated: CategoryThresholdPostProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for paths in (["/x/incoming/0.png", "/x/Bolt/0.png"], ["/x/incoming/1.png", "/x/incoming/Kiste/1.png"]):
            calibrated.post_process_batch(batch(paths, [1.0, 1.0]))
        assert not caplog.records
        calibrated.on_predict_end(None, None)
        calibrated.on_predict_end(None, None)
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("The category of 3 images is not known, by folder: 'Kiste' (1), 'incoming' (2).")
    assert "one of bolt, cap" in message and "that of cap for images and that of cap for pixels" in message


def test_another_spelling_has_the_thresholds_of_its_category(calibrated: CategoryThresholdPostProcessor) -> None:
    """By folder, and as a datamodule tells it."""
    samples = pd.DataFrame({"image_path": ["/x/0.png"], "category": ["BOLT"]})
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(test_data=SimpleNamespace(samples=samples)))
    calibrated.setup(trainer, None, "test")
    images = batch(["/x/0.png", "/y/BOLT /0.png", "/y/0.png"], [2.01, 2.01, 2.01])
    assert calibrated.categories_of(images) == ["BOLT", "bolt", None]
    assert calibrated.thresholds_of(images) == ["bolt", "bolt", "cap"]
    calibrated.post_process_batch(images)
    assert images.pred_label.tolist() == [True, True, False]
    assert missing_thresholds(calibrated, ["BOLT"]) is None
    assert "for nut:" in str(missing_thresholds(calibrated, ["BOLT", "nut"]))


def test_a_single_category_has_the_threshold_that_there_is(caplog: pytest.LogCaptureFixture) -> None:
    post_processor = CategoryThresholdPostProcessor(image_fpr=0.5, pixel_fpr=0.5)
    calibrate(post_processor, batch(["/bolt/0.png"], [1.0]))
    images = batch(["/incoming/0.png"], [2.0])
    with caplog.at_level(logging.WARNING):
        post_processor.post_process_batch(images)
        post_processor.on_predict_end(None, None)
    assert images.pred_label.tolist() == [True]
    assert post_processor.thresholds_of(images) == ["bolt"]
    assert not caplog.records


# --- Checkpoint, prediction, export ----------------------------------------------------------------------------------


def engine(folder: Path) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)


def data(root: Path) -> Unified:
    return Unified(root=root, num_workers=0, val_split_ratio=0.5, eval_batch_size=4)


class Distances(TiledModel):
    """Stands for the network of UniAS, whose export takes a minute: ``(B, 3, H, 128)`` to maps of that size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 1, 3, padding=1), nn.LayerNorm(128)
        )
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.01)
        self.detector = paper((1, 1, 1, 1), (128, 128))

    def reconstruct(self, x: Tensor) -> Reconstruction:
        return Reconstruction([x], [x])

    def forward(self, x: Tensor) -> InferenceBatch:
        return self.detect(self.reconstruct(x), x)

    def detect(self, reconstruction: Reconstruction, image: Tensor) -> InferenceBatch:
        del image
        anomaly_map = self.layers(reconstruction.targets[0]).square()
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=anomaly_map.flatten(1).std(1))


def predict(model: UniAS, folder: Path, scratch: Path) -> list[ImageItem]:
    """Predict all images below a folder as the command line does, without a datamodule."""
    dataset = PredictDataset(folder)
    loader = DataLoader(dataset, batch_size=4, collate_fn=dataset.collate_fn)
    return [image for batch in engine(scratch).predict(model, dataloaders=loader) for image in batch]


def pixels(image: ImageItem) -> Tensor:
    return read_image(image.image_path, as_tensor=True)[None]


def category_of(image: ImageItem) -> str:
    return next(category for category in CATEGORIES if category in Path(image.image_path).parts)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Folder of the data, checkpoint, and the model that was trained."""
    folder = tmp_path_factory.mktemp("thresholds")
    root = make_mvtec_layout(folder / "parts", CATEGORIES, train=6, good=2, defective=1)
    post_processor = CategoryThresholdPostProcessor(image_fpr=0.25, pixel_fpr=0.01)
    model = UniAS(**SMALL, seed=0, post_processor=post_processor)
    runner = engine(folder)
    runner.fit(model, datamodule=data(root))
    yield root, Path(runner.trainer.checkpoint_callback.best_model_path), model


@pytest.fixture(scope="module")
def light(run: Run) -> UniAS:
    """A calibrated model that is quick to export."""
    model = UniAS.load_from_checkpoint(run[1], post_processor=CategoryThresholdPostProcessor(image_fpr=0.25), **SMALL)
    model.model = Distances()
    engine(run[0].parent / "light").validate(model, datamodule=data(run[0]))
    return model.eval()


@pytest.fixture(scope="module")
def exported(light: UniAS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its OpenVINO model in float32."""
    folder = tmp_path_factory.mktemp("exported")
    return engine(folder).export(light, "openvino", export_root=folder, input_size=(64, 64))


def test_checkpoint_brings_the_calibration(run: Run) -> None:
    _, checkpoint, trained = run
    loaded = UniAS.load_from_checkpoint(checkpoint)  # with weights_only=True
    assert set(trained.post_processor.calibration["image"]) == set(CATEGORIES)
    assert loaded.post_processor.calibration == trained.post_processor.calibration
    assert loaded.post_processor.calibration["image_fpr"] == 0.25
    assert torch.equal(loaded.post_processor.image_threshold, trained.post_processor.image_threshold)


def test_thresholds_are_those_of_the_held_out_images(run: Run) -> None:
    root, _, model = run
    datamodule = data(root)
    datamodule.setup()
    model.eval()
    for category in CATEGORIES:
        rows = datamodule.val_data.samples.query("category == @category")["image_path"]
        images = torch.stack([read_image(path, as_tensor=True) for path in rows])
        with torch.no_grad():
            scores = model.model(model.pre_processor.transform(images)).pred_score
        assert len(scores) == 3
        expected = pytest.approx(float(scores.max()), rel=1e-5)  # rank ceil(4 * 0.75)
        assert model.post_processor.calibration["image"][category] == expected


def test_predict_applies_the_thresholds_of_categories(run: Run, light: UniAS, tmp_path: Path) -> None:
    images = predict(light, run[0], tmp_path)
    assert len(images) > 3 * len(CATEGORIES)
    for image in images:
        category = category_of(image)
        with torch.no_grad():
            raw = light.model(light.pre_processor.transform(pixels(image)))
        score, limit = float(raw.pred_score), light.post_processor.calibration["image"][category]
        if score != pytest.approx(limit, rel=1e-5):  # an image that was calibrated on lies on the threshold
            assert bool(image.pred_label) == (score > limit)
        mask = raw.anomaly_map > light.post_processor.calibration["pixel"][category]
        assert (image.pred_mask.squeeze() == mask.squeeze()).float().mean() > 0.999


def test_exported_model_brings_the_thresholds_that_predict_applies(
    run: Run, light: UniAS, exported: Path, tmp_path: Path
) -> None:
    assert {path.name for path in exported.parent.iterdir()} == {"model.xml", "model.bin", "category_thresholds.json"}
    thresholds = json.loads((exported.parent / "category_thresholds.json").read_text())
    network = ov.Core().read_model(exported)
    assert json.loads(network.get_rt_info("category_thresholds").value) == thresholds
    compiled = ov.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for image in predict(light, run[0], tmp_path):
        output = compiled(pixels(image).numpy())
        score, limit = output["pred_score"].item(), thresholds["image"][category_of(image)]
        if score != pytest.approx(limit, rel=1e-5):
            assert (score > limit) == bool(image.pred_label)
        mask = output["anomaly_map"].squeeze() > thresholds["pixel"][category_of(image)]
        assert (mask == image.pred_mask.squeeze().numpy()).mean() > 0.999


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_an_exported_model_finds_no_image_good_that_is_not_finite(precision: str, light: UniAS, exported: Path) -> None:
    """The network, which has a ReLU in front, sees nothing of it in OpenVINO."""
    images = np.random.default_rng(0).random((5, 3, 64, 64), np.float32)
    for row, value in enumerate((NAN, INF, -INF, 1e38)):
        images[row, :, :, 40] = value
    config = {"INFERENCE_PRECISION_HINT": precision}
    found = ov.Core().compile_model(exported, "CPU", config)(images)
    with torch.no_grad():
        in_torch = light(torch.from_numpy(images))
    for output in (found, {name: np.asarray(values) for name, values in in_torch._asdict().items()}):
        assert np.isinf(output["pred_score"]).flatten().tolist() == [True] * 4 + [False]
        assert output["pred_label"].flatten()[:4].all()
        assert np.isinf(output["anomaly_map"])[:4].all() and np.isfinite(output["anomaly_map"][4]).all()
        assert output["pred_mask"][:4].all()


@pytest.mark.parametrize("kind", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_thresholds_lie_beside_other_exports(light: UniAS, tmp_path: Path, kind: str) -> None:
    path = engine(tmp_path).export(light, kind, export_root=tmp_path)
    written = json.loads((path.parent / "category_thresholds.json").read_text())
    assert written == light.post_processor.exported_thresholds()


def test_exports_without_thresholds_leave_no_file_of_an_earlier_one(run: Run, light: UniAS, tmp_path: Path) -> None:
    folder = light.to_torch(tmp_path).parent
    assert (folder / "category_thresholds.json").is_file()
    UniAS.load_from_checkpoint(run[1], post_processor=PostProcessor()).to_torch(tmp_path)
    assert not (folder / "category_thresholds.json").exists()


@pytest.mark.slow
def test_half_precision_export_stays_half_precision(light: UniAS, exported: Path, tmp_path: Path) -> None:
    half = engine(tmp_path).export(light, "openvino", export_root=tmp_path, compression_type="fp16")
    assert ov.Core().read_model(half).has_rt_info("category_thresholds")
    sizes = [path.with_suffix(".bin").stat().st_size for path in (exported, half)]
    assert sizes[1] < 0.6 * sizes[0]


def test_trained_model_is_calibrated_anew_for_other_rates(run: Run, tmp_path: Path) -> None:
    root, checkpoint, _ = run
    model = UniAS.load_from_checkpoint(checkpoint, post_processor=CategoryThresholdPostProcessor(image_fpr=0.5))
    assert model.post_processor.calibration["image_fpr"] == 0.25
    runner = engine(tmp_path)
    runner.validate(model, datamodule=data(root))
    runner.trainer.save_checkpoint(tmp_path / "new.ckpt")
    old, new = (UniAS.load_from_checkpoint(path).post_processor for path in (checkpoint, tmp_path / "new.ckpt"))
    assert new.calibration["image_fpr"] == 0.5
    assert all(new.calibration["image"][name] < old.calibration["image"][name] for name in CATEGORIES)


def test_checkpoint_of_anomalibs_thresholds_keeps_its_decisions(run: Run, tmp_path: Path) -> None:
    """As written before this post-processor existed: one threshold, no calibration."""
    root, _, _ = run
    model = UniAS(**SMALL, post_processor=PostProcessor())
    runner = engine(tmp_path)
    runner.fit(model, datamodule=data(root))
    path = runner.trainer.checkpoint_callback.best_model_path
    assert "calibration" not in torch.load(path)["anomalib_post_processor_config"]
    loaded = UniAS.load_from_checkpoint(path)
    assert isinstance(loaded.post_processor, CategoryThresholdPostProcessor)
    assert loaded.post_processor.calibration is None
    scores = torch.linspace(0, 2, 101) * model.post_processor.image_threshold
    predictions = InferenceBatch(pred_score=scores, anomaly_map=scores[:, None, None, None])
    theirs, ours = model.post_processor(predictions), loaded.post_processor(predictions)
    assert torch.equal(theirs.pred_label, ours.pred_label)
    assert torch.equal(theirs.pred_mask, ours.pred_mask)
    assert 0 < int(ours.pred_label.sum()) < 101


def test_both_kinds_are_chosen_on_the_command_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    init_args = {key: value for key, value in SMALL.items() if key != "image_size"} | {"image_size": [128, 128]}
    ours = {"class_path": "anomalib_uniass.thresholds.post_processor.CategoryThresholdPostProcessor"}
    choices = {
        "rates": ours | {"init_args": {"image_fpr": 0.2, "pixel_fpr": 0.02}},
        "anomalib": {"class_path": "anomalib.post_processing.PostProcessor"},
    }
    stored = {}
    for name, choice in choices.items():
        config = {
            "model": {"class_path": "UniAS", "init_args": init_args | {"post_processor": choice}},
            "data": {"class_path": "Unified", "init_args": {"root": str(run[0]), "num_workers": 0}},
            "trainer": {"max_epochs": 1, "accelerator": "cpu"},
            "default_root_dir": name,
        }
        Path("config.yaml").write_text(json.dumps(config))  # JSON is YAML
        monkeypatch.setattr(sys, "argv", ["anomalib", "fit", "--config", "config.yaml"])
        main()
        (path,) = {path.resolve() for path in Path(name).glob("UniAS/*/v0/weights/lightning/model.ckpt")}
        stored[name] = torch.load(path)["anomalib_post_processor_config"]
    assert stored["rates"]["calibration"]["image_fpr"] == 0.2
    assert stored["rates"]["calibration"]["pixel_fpr"] == 0.02
    assert "calibration" not in stored["anomalib"]


@pytest.mark.slow
def test_benchmark_measures_achieved_rates(run: Run, tmp_path: Path, run_python: Callable[..., str]) -> None:
    root, checkpoint, _ = run
    arguments = ["--root", str(root), "--checkpoint", str(checkpoint), "--val-split-ratio", "0.5", "--draws", "2"]
    for name in ("inspection", "demo"):
        run_python(str(BENCHMARK), "--name", name, "--images", "2", *arguments, "--output", str(tmp_path))
    results = json.loads((tmp_path / "thresholds.json").read_text())
    for found in results["datasets"].values():
        assert (len(found["image"]), len(found["pixel"])) == (4 * 3, 4 * 3)
        assert all(set(row["categories"]) == set(CATEGORIES) for row in found["image"] + found["pixel"])
        ours = {row["asked"]: row for row in found["image"] if row["rule"] == "ours"}
        assert ours[0.1]["achieved"] >= ours[0.01]["achieved"]
        assert all(0 <= row["F1"] <= row["F1Max"] <= 1 for row in found["pixel"])
    assert len(results["summary"]) == 2 * 10
    assert results["summary"]["demo_own_f1"] == results["summary"]["own_f1"]
    assert "## inspection: 2 good images" in (tmp_path / "thresholds.md").read_text()


def test_uniad_has_thresholds_per_category_on_its_own_scale() -> None:
    post_processor = UniAD(**SMALL).post_processor
    assert isinstance(post_processor, CategoryThresholdPostProcessor)
    assert post_processor.gamma == 1


def test_settings_that_a_checkpoint_overrides_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """The thresholds of a checkpoint hold until it is calibrated anew; settings at their defaults ask for nothing."""
    saved = CategoryThresholdPostProcessor(gamma=1.0)
    saved.calibration = {"image": {"bolt": 1.0}, "pixel": {"bolt": 1.0}, "image_fpr": 0.02, "pixel_fpr": 0.001}
    saved._image_threshold.fill_(1.0)
    saved._pixel_threshold.fill_(1.0)

    def load_and_predict(**settings: float) -> str:
        caplog.clear()
        post_processor = CategoryThresholdPostProcessor(**settings)
        post_processor.load_checkpoint_config(saved.checkpoint_config())
        post_processor.load_state_dict(saved.state_dict())
        post_processor.on_predict_start(SimpleNamespace(datamodule=None), None)  # type: ignore[arg-type]
        return caplog.text

    for quiet in ({}, {"image_fpr": 0.02}, {"gamma": 1.0}, {"gamma": 0.5}):
        assert load_and_predict(**quiet) == ""
    assert "made for image_fpr=0.02, as the checkpoint has them, not for the 0.1" in load_and_predict(image_fpr=0.1)
    assert "made for pixel_fpr=0.001" in load_and_predict(pixel_fpr=0.1)
    assert "gamma is 1 as the checkpoint has it, not 0.25" in load_and_predict(gamma=0.25)

# SPDX-License-Identifier: Apache-2.0
"""Large images by tiles: covering and blending by hand, both models through engine, callback, checkpoint and export."""

import importlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import InferenceBatch
from anomalib.engine import Engine
from torch import Tensor

from anomalib_uniass import UniAD, UniAS, Unified
from anomalib_uniass.layers.tiling import TILE_BATCH, Tiling, make_tiling
from anomalib_uniass.metrics import CategoryMetricsCallback
from tests.helpers.datasets import make_mvtec_layout

SMALL: dict[type, dict[str, Any]] = {
    UniAS: {"image_size": (128, 128), "hidden_dim": 32, "feedforward_dim": 32, "recipe": "best", "seed": 0},
    UniAD: {"image_size": (128, 128), "hidden_dim": 32, "feedforward_dim": 32, "seed": 0},
}


def small(model: type, **arguments: Any) -> Any:
    return model(backbone="resnet18", pre_trained=False, visualizer=False, **SMALL[model] | arguments)


@pytest.mark.parametrize("stride", [1, 13, 48, 64])
@pytest.mark.parametrize("size", [(64, 64), (65, 200), (191, 64), (333, 127)])
def test_tiles_cover_the_image_evenly(size: tuple[int, int], stride: int) -> None:
    tiling = Tiling(tile_size=(64, 64), stride=(stride, stride))
    for starts, side in zip(tiling.starts(size), size, strict=True):
        assert starts[0] == 0 and starts[-1] == side - 64
        steps = [second - first for first, second in pairwise(starts)]
        assert not steps or (max(steps) <= stride and min(steps) >= max(steps) - 1)


@pytest.mark.parametrize("size", [(16, 24), (17, 24), (50, 61), (16, 100), (40, 20_000)])
@pytest.mark.parametrize("stride", [(12, 18), (16, 24), (3, 5)])
def test_a_map_that_does_not_depend_on_tiles_comes_back_whole(size: tuple[int, int], stride: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    seen: list[int] = []

    def network(tiles: Tensor) -> InferenceBatch:
        seen.append(len(tiles))
        return InferenceBatch(anomaly_map=tiles[:, :1], pred_score=tiles[:, 1].amax((1, 2)))

    found = Tiling(tile_size=(16, 24), stride=stride).detect(images, network)
    torch.testing.assert_close(found.anomaly_map, images[:, :1])
    assert torch.equal(found.pred_score, images[:, 1].amax((1, 2)))  # of the most anomalous tile of each image
    assert max(seen) <= TILE_BATCH


def test_no_seams_between_tiles_that_disagree() -> None:
    """Tiles of alternating height blend without a step, where the plain mean would jump by half."""
    heights = iter(torch.arange(100.0) % 2)

    def network(tiles: Tensor) -> InferenceBatch:
        maps = torch.stack([torch.full((1, 32, 32), float(next(heights))) for _ in tiles])
        return InferenceBatch(anomaly_map=maps, pred_score=maps.amax((1, 2, 3)))

    found = Tiling(tile_size=(32, 32), stride=(32, 16)).detect(torch.rand(1, 3, 32, 160), network)
    assert found.anomaly_map is not None
    assert found.anomaly_map.diff(dim=3).abs().max() < 0.11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_size": 32, "stride": 33}, "stride from 1 to their size"),
        ({"tile_size": 32, "stride": 0}, "stride from 1 to their size"),
        ({"tile_size": 0}, "stride from 1 to their size"),
        ({"tile_size": [32, 32, 32]}, "number of pixels, or"),
        ({"tile_size": "32"}, "number of pixels, or"),
        ({"tile_size": 0.5}, "number of pixels, or"),
        ({"stride": 16}, "needs a tile_size"),
    ],
)
def test_tiles_that_do_not_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(UniAS, **arguments)


def test_default_stride() -> None:
    tiling = make_tiling([448, 30], None)
    assert tiling is not None and tiling.stride == (336, 22)
    assert make_tiling(1, None) == Tiling(tile_size=(1, 1), stride=(1, 1))


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (47, 48)])
def test_images_smaller_than_a_tile(size: tuple[int, int]) -> None:
    model = small(UniAS, tile_size=48).eval()
    with pytest.raises(ValueError, match="48 x 48 pixels does not fit into an image of"):
        model.model(torch.rand(1, 3, *size))


def test_small_images_are_refused_before_training(tmp_path: Path) -> None:
    root = make_mvtec_layout(tmp_path / "parts", ["bolt"], 64)
    with pytest.raises(ValueError, match=r"\.png: A tile of 65 x 65"):
        run(tmp_path, small(UniAS, tile_size=65), root)


def run(folder: Path, model: Any, root: Path, *callbacks: Any) -> tuple[Engine, Unified]:
    """Train and test for an epoch."""
    engine = Engine(default_root_dir=folder, accelerator="cpu", max_epochs=1, logger=False, callbacks=[*callbacks])
    data = Unified(root=root, train_batch_size=2, eval_batch_size=4, num_workers=0, rotate=["bolt"])
    engine.fit(model, datamodule=data)
    engine.test(model, datamodule=data, verbose=False)
    return engine, data


def photographs(folder: Path) -> Path:
    """Write two categories, of photographs of two sizes that no tile divides."""
    make_mvtec_layout(folder, ["bolt"], (150, 211))
    return make_mvtec_layout(folder, ["cap"], (99, 130))


@pytest.mark.parametrize("model", [pytest.param(UniAS, marks=pytest.mark.slow), UniAD])
def test_photographs_of_mixed_sizes(model: type, tmp_path: Path) -> None:
    """Trained on tiles, tested at the size of the photographs, the same from a checkpoint and by the callback."""
    root = photographs(tmp_path / "parts")
    trained = small(model, tile_size=96, stride=64)
    engine, data = run(tmp_path / "a", trained, root)
    table = next(c.table for c in engine.trainer.callbacks if isinstance(c, CategoryMetricsCallback))
    assert table is not None and table["mean"]["pixel_AP"] > 0
    assert trained.post_processor.calibration["image"].keys() == {"bolt", "cap"}

    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    loaded = model.load_from_checkpoint(checkpoint)  # type: ignore[attr-defined]
    assert loaded.model.tiling == trained.model.tiling and loaded.input_size is None
    expected = maps_of(engine, trained, data)
    assert {tuple(anomaly_map.shape[-2:]) for anomaly_map in expected.values()} == {(150, 211), (99, 130)}
    for path, anomaly_map in maps_of(engine, loaded, data).items():
        assert torch.equal(anomaly_map, expected[path])
    assert data.test_dataloader().batch_size == 1
    assert data.eval_batch_size == 4, "a later model of whole images has its batches"


@pytest.mark.parametrize("model", [pytest.param(UniAS, marks=pytest.mark.slow), UniAD])
def test_tiler_of_anomalib(model: type, tmp_path: Path) -> None:
    """The callback does what the arguments do, though it comes when the data is set up."""
    root = make_mvtec_layout(tmp_path / "parts", ["bolt"], (150, 211))
    torch.manual_seed(0)
    by_arguments = small(model, tile_size=96, stride=64)
    engine, data = run(tmp_path / "a", by_arguments, root)
    torch.manual_seed(0)
    by_callback = small(model)
    other, data = run(tmp_path / "b", by_callback, root, TilerConfigurationCallback(True, tile_size=96, stride=64))
    assert by_callback.model.tiler.tile_size_h == 96
    expected = maps_of(engine, by_arguments, data)
    for path, anomaly_map in maps_of(other, by_callback, data).items():
        torch.testing.assert_close(anomaly_map, expected[path])
    loaded = model.load_from_checkpoint(other.trainer.checkpoint_callback.best_model_path)  # type: ignore[attr-defined]
    assert loaded.model.tiling == by_arguments.model.tiling


def test_tiles_that_cannot_be_turned_or_cached(tmp_path: Path) -> None:
    root = make_mvtec_layout(tmp_path / "parts", ["bolt"], 128)
    with pytest.raises(ValueError, match="must be squares"):
        run(tmp_path, small(UniAS, tile_size=[96, 80]), root)
    data = Unified(root=root, num_workers=0, cache_images=True)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, logger=False)
    with pytest.raises(ValueError, match="cache_images"):
        engine.fit(small(UniAS, tile_size=96), datamodule=data)


def maps_of(engine: Engine, model: Any, data: Unified) -> dict[str, Tensor]:
    predictions = engine.predict(model, dataloaders=data.test_dataloader(), return_predictions=True)
    return {str(batch.image_path[0]): batch.anomaly_map for batch in predictions}  # type: ignore[union-attr]


def test_tiler_with_borders_is_refused(tmp_path: Path) -> None:
    callback = TilerConfigurationCallback(True, tile_size=96, stride=64, remove_border_count=4)
    root = make_mvtec_layout(tmp_path / "parts", ["bolt"], (150, 211))
    with pytest.raises(ValueError, match="remove_border_count must be 0"):
        run(tmp_path, small(UniAS), root, callback)


def test_training_takes_every_place_equally_often() -> None:
    tiling = Tiling(tile_size=(2, 3), stride=(2, 3))
    image = torch.arange(20.0).view(1, 1, 4, 5)
    torch.manual_seed(0)
    corners = torch.stack([tiling.random_tiles(image)[0, 0, 0, 0] for _ in range(1800)])
    values, counts = corners.unique(return_counts=True)
    assert values.tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert int(counts.min()) > 150 and int(counts.max()) < 250


@pytest.mark.parametrize(("height", "expected"), [(-1, (1, 3, 96, 96)), (150, (1, 3, 150, 211))])
def test_calibration_of_what_the_graph_takes(height: int, expected: tuple[int, ...]) -> None:
    parameter = ov.opset13.parameter(ov.PartialShape([-1, 3, height, -1]))
    graph = ov.Model([ov.opset13.relu(parameter)], [parameter])
    images = [torch.rand(1, 3, 150, 211).numpy() for _ in range(3)]
    model = small(UniAS, tile_size=96)
    inputs = model.calibration_inputs(graph, images)
    assert [image.shape for image in inputs] == [expected] * 3
    for image, again in zip(inputs, model.calibration_inputs(graph, images), strict=True):
        np.testing.assert_array_equal(image, again)  # the same tiles in every export


@pytest.mark.parametrize("model", [pytest.param(UniAS, marks=pytest.mark.slow), UniAD])
def test_exported_photographs(model: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tiles of a photograph in one graph, for any batch; a single tile for any size."""
    root = make_mvtec_layout(tmp_path / "parts", ["bolt"], (150, 211))
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    trained = small(model, tile_size=96, stride=64)
    run(tmp_path, trained, root)
    trained.eval()
    images = torch.rand(2, 3, 150, 211)
    core = ov.Core()
    for name, size in {"photograph": (150, 211), "tile": None}.items():
        path = trained.to_openvino(tmp_path / name, input_size=size)
        graph = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        taken = images if size else images[..., 7:103, 30:126]
        with torch.no_grad():
            expected = trained(taken)
        result = graph(taken.numpy())
        assert result["anomaly_map"].shape == ((2, 1, 150, 211) if size else (2, 1, *trained.model.image_size))
        np.testing.assert_allclose(result["pred_score"].flatten(), expected.pred_score, atol=1e-4)
        if size:
            np.testing.assert_allclose(result["anomaly_map"], expected.anomaly_map, atol=1e-4)
    assert trained.model.tiling is not None and trained.input_size is None  # as before

    # The example cuts and blends by itself, outputs of the graph instead of raw maps.
    example = importlib.import_module("openvino_predict")
    found = example.predict_by_tiles(graph, images[0].permute(1, 2, 0).numpy(), 96, 64)
    with torch.no_grad():
        expected = trained(images[:1])
    assert found["pred_score"] == pytest.approx(expected.pred_score.item(), abs=1e-4)
    np.testing.assert_allclose(found["anomaly_map"], expected.anomaly_map[0, 0], atol=0.02)
    with pytest.raises(SystemExit, match="do not cover an image of 95 x 211"):
        example.predict_by_tiles(graph, np.zeros((95, 211, 3), np.float32), 96, 64)

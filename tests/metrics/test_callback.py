# SPDX-License-Identifier: Apache-2.0
"""The callback in real anomalib runs (values, order, files) and its corner cases on a stub trainer."""

import csv
import json
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_uniass.metrics import CategoryMetricsCallback, write_table
from anomalib_uniass.metrics.functional import METRICS, PIXEL_METRICS

SIZE = 64
MEAN_KEYS = {f"mean_{key}" for key in METRICS}


def make_dataset(root: Path) -> None:
    """Write four training and four test images of a category `part` in the layout of MVTec AD."""
    rng = np.random.default_rng(0)
    for folder in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (root / "part" / folder).mkdir(parents=True)
    for folder, count in (("train/good", 4), ("test/good", 2), ("test/spot", 2)):
        for index in range(count):
            image = rng.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
            if folder == "test/spot":
                mask = np.zeros((SIZE, SIZE), np.uint8)
                mask[10 + 20 * index : 30 + 20 * index, 20:44] = 255
                image[mask > 0] += 120
                Image.fromarray(mask).save(root / "part" / "ground_truth" / "spot" / f"{index:03}_mask.png")
            Image.fromarray(image).save(root / "part" / folder / f"{index:03}.png")


class RawMaps:
    """Collects what the network itself returns, without any callback."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.maps: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []
        self._handle = network.register_forward_hook(self._collect)

    def _collect(self, _module: object, _inputs: object, output: SimpleNamespace) -> None:
        self.maps.append(output.anomaly_map.clone().squeeze(1))
        self.scores.append(output.pred_score.clone().flatten())

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        self._handle.remove()
        return torch.cat(self.maps).numpy(), torch.cat(self.scores).numpy()


class Seen(Callback):
    """Keeps the maps as the callbacks after the post-processor see them."""

    def __init__(self) -> None:
        self.maps: list[torch.Tensor] = []

    def on_test_batch_end(
        self, _trainer: object, _module: object, _outputs: object, batch: SimpleNamespace, *_args: object
    ) -> None:
        self.maps.append(batch.anomaly_map.clone().squeeze(1))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Padim, MVTecAD, Path]:
    root = tmp_path_factory.mktemp("run")
    make_dataset(root)
    torch.manual_seed(0)
    datamodule = MVTecAD(root=root, category="part", train_batch_size=4, eval_batch_size=3, num_workers=0)
    pre_processor = Padim.configure_pre_processor(image_size=(SIZE, SIZE))
    model = Padim(
        "resnet18", ["layer1"], pre_trained=False, n_features=8, pre_processor=pre_processor, visualizer=False
    )
    engine(root).fit(model, datamodule=datamodule)
    # A threshold at the minimum makes normalisation clamp the upper half of the scores, which changes every metric.
    model.post_processor._pixel_threshold.copy_(model.post_processor.pixel_min)
    return model, datamodule, root


def engine(root: Path, *callbacks: Callback) -> Engine:
    return Engine(
        callbacks=list(callbacks),
        default_root_dir=root,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture
def model(fitted: tuple[Padim, MVTecAD, Path]) -> Padim:
    return fitted[0]


@pytest.fixture
def datamodule(fitted: tuple[Padim, MVTecAD, Path]) -> Iterator[MVTecAD]:
    """The fitted datamodule, whose test set a test may change."""
    datamodule = fitted[1]
    samples = datamodule.test_data.samples.copy()
    yield datamodule
    datamodule.test_data.samples = samples


def masks_and_labels(datamodule: MVTecAD) -> tuple[np.ndarray, np.ndarray]:
    items = [datamodule.test_data[index] for index in range(len(datamodule.test_data))]
    return np.stack([item.gt_mask.bool().numpy() for item in items]), np.array([bool(item.gt_label) for item in items])


@pytest.mark.parametrize("behind_post_processor", [False, True])
def test_engine_scores_raw_maps(
    model: Padim,
    datamodule: MVTecAD,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    behind_post_processor: bool,
) -> None:
    callback, seen, raw = CategoryMetricsCallback(), Seen(), RawMaps(model.model)
    # Lightning appends the model's own callbacks, the post-processor among them, to the trainer's.
    last = [callback, seen] if behind_post_processor else [seen]
    own_callbacks = model.configure_callbacks()
    monkeypatch.setattr(model, "configure_callbacks", lambda: [*own_callbacks, *last])
    runner = engine(tmp_path, *([] if behind_post_processor else [callback]))
    results = runner.test(model, datamodule=datamodule)[0]

    maps, scores = raw.take()
    masks, labels = masks_and_labels(datamodule)
    raw_ap = average_precision_score(masks.ravel(), maps.ravel())
    normalised_ap = average_precision_score(masks.ravel(), torch.cat(seen.maps).flatten())
    assert abs(raw_ap - normalised_ap) > 1e-3, "the test must tell raw maps from normalised ones"
    assert callback.table is not None
    row = callback.table["part"]
    assert row["pixel_AP"] == pytest.approx(raw_ap, abs=1e-9)
    assert row["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)
    assert row["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert (row["n_images"], row["n_anomalous"]) == (4, 2)
    assert {key: results[key] for key in MEAN_KEYS} == pytest.approx({f"mean_{key}": row[key] for key in METRICS})
    assert {"image_AUROC", "pixel_AUROC"} <= set(results), "anomalib's own metrics keep their names"

    folder = Path(runner.trainer.default_root_dir) / "metrics"
    report = json.loads((folder / "per_category.json").read_text())
    assert report["categories"] | {"mean": report["mean"]} == callback.table
    about = {key: report[key] for key in ("model", "datamodule", "map_size", "n_images")}
    assert about == {"model": "Padim", "datamodule": "MVTecAD", "map_size": [SIZE, SIZE], "n_images": 4}
    with (folder / "per_category.csv").open(newline="") as file:
        rows = {
            line.pop("category"): {key: float(value) for key, value in line.items()} for line in csv.DictReader(file)
        }
    assert rows == callback.table
    printed = capsys.readouterr().out
    assert "Padim per category" in printed
    assert f"{100 * row['pixel_AP']:.2f}" in printed


def test_category_column_decides(model: Padim, datamodule: MVTecAD, tmp_path: Path) -> None:
    samples = datamodule.test_data.samples
    datamodule.test_data.samples = samples.assign(category=["left", "right"] * 2)
    callback = CategoryMetricsCallback()
    engine(tmp_path, callback).test(model, datamodule=datamodule)
    assert callback.table is not None
    assert list(callback.table) == ["left", "right", "mean"]
    assert callback.table["left"]["n_images"] == callback.table["right"]["n_images"] == 2


def test_all_good_test_set(model: Padim, datamodule: MVTecAD, tmp_path: Path) -> None:
    good = np.flatnonzero(datamodule.test_data.samples.label_index == 0)
    datamodule.test_data.subsample(good.tolist(), inplace=True)
    callback = CategoryMetricsCallback()
    runner = engine(tmp_path, callback)
    with pytest.warns(UserWarning, match="'part': its test images are all good"):
        results = runner.test(model, datamodule=datamodule)[0]
    assert all(math.isnan(results[key]) for key in MEAN_KEYS)
    report = json.loads((Path(runner.trainer.default_root_dir) / "metrics" / "per_category.json").read_text())
    assert report["mean"]["pixel_AP"] is None


def test_without_datamodule_and_in_predict(model: Padim, datamodule: MVTecAD, tmp_path: Path) -> None:
    callback = CategoryMetricsCallback()
    runner = engine(tmp_path, callback)
    runner.predict(model, dataloaders=datamodule.test_dataloader())
    assert callback.table is None
    runner.test(model, dataloaders=datamodule.test_dataloader())
    assert callback.table is not None
    assert list(callback.table) == ["all", "mean"]


def stub_trainer(root: Path, callback: Callback, datamodule: object = None) -> SimpleNamespace:
    return SimpleNamespace(
        callbacks=[callback], datamodule=datamodule, default_root_dir=str(root), is_global_zero=True, world_size=1
    )


def stub_batch(**fields: object) -> SimpleNamespace:
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[2:, 2:5, 2:5] = True
    maps = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0)) + masks
    batch = {
        "anomaly_map": maps,
        "gt_mask": masks,
        "pred_score": maps.amax((1, 2)),
        "gt_label": torch.tensor([False, False, True, True]),
        "image_path": ["a.png", "b.png", "c.png", "d.png"],
    }
    return SimpleNamespace(**(batch | fields))


def run_stub(trainer: SimpleNamespace, batch: SimpleNamespace) -> dict[str, float]:
    """Run the test hooks of the trainer's first callback and return what was logged."""
    logged: dict[str, float] = {}
    module = SimpleNamespace(log_dict=lambda values, sync_dist: logged.update(values))
    callback = trainer.callbacks[0]
    callback.on_test_start(trainer, module)
    callback.on_test_epoch_start(trainer, module)
    callback.on_test_batch_end(trainer, module, batch, batch, 0)
    callback.on_test_epoch_end(trainer, module)
    return logged


def test_moves_before_the_post_processor_only_if_needed(tmp_path: Path) -> None:
    callback, other, post_processor = CategoryMetricsCallback(), Callback(), PostProcessor()
    trainer = stub_trainer(tmp_path, callback)
    trainer.callbacks = [other, post_processor, callback]
    callback.on_test_start(trainer, None)
    assert trainer.callbacks == [callback, other, post_processor]
    trainer.callbacks = [other, callback, post_processor]
    callback.on_test_start(trainer, None)
    assert trainer.callbacks == [other, callback, post_processor]


@pytest.mark.parametrize(
    ("datamodule", "category"),
    [
        (None, "all"),
        (SimpleNamespace(category="pcb", name="Folder"), "pcb"),
        (SimpleNamespace(category="", name="Folder"), "Folder"),
        (SimpleNamespace(), "SimpleNamespace"),
    ],
)
def test_default_category(tmp_path: Path, datamodule: object, category: str) -> None:
    callback = CategoryMetricsCallback()
    run_stub(stub_trainer(tmp_path, callback, datamodule), stub_batch())
    assert callback.table is not None
    assert list(callback.table) == [category, "mean"]


def test_model_without_maps_logs_the_same_keys(tmp_path: Path) -> None:
    callback = CategoryMetricsCallback()
    with pytest.warns(UserWarning, match="No anomaly maps"):
        logged = run_stub(stub_trainer(tmp_path, callback), stub_batch(anomaly_map=None))
    assert set(logged) == MEAN_KEYS
    assert logged["mean_image_AUROC"] == 1.0
    assert all(math.isnan(logged[f"mean_{key}"]) for key in PIXEL_METRICS)


def test_map_of_another_size_and_missing_score(tmp_path: Path) -> None:
    batch = stub_batch(anomaly_map=stub_batch().anomaly_map[:, None, ::2, ::2].double(), pred_score=None)
    callback = CategoryMetricsCallback()
    logged = run_stub(stub_trainer(tmp_path, callback), batch)
    resized = torch.nn.functional.interpolate(batch.anomaly_map.float(), size=(8, 8), mode="bilinear")
    expected = average_precision_score(batch.gt_mask.flatten(), resized.flatten())
    assert logged["mean_pixel_AP"] == pytest.approx(expected)
    assert logged["mean_image_AUROC"] == 1.0


def test_unknown_image_and_unlabelled_batch(tmp_path: Path) -> None:
    samples = pd.DataFrame({"image_path": ["a.png"], "category": ["left"]})
    datamodule = SimpleNamespace(test_data=SimpleNamespace(samples=samples))
    with pytest.raises(ValueError, match=r"b.png is not in datamodule.test_data.samples"):
        run_stub(stub_trainer(tmp_path, CategoryMetricsCallback(), datamodule), stub_batch())
    with pytest.raises(ValueError, match="gt_label"):
        run_stub(stub_trainer(tmp_path, CategoryMetricsCallback()), stub_batch(gt_label=None))


def test_image_listed_twice_counts_twice_and_is_told_with_several_processes(tmp_path: Path) -> None:
    paths = ["a.png", "b.png", "c.png", "c.png"]
    datamodule = SimpleNamespace(test_data=SimpleNamespace(samples=pd.DataFrame({"image_path": paths})))
    trainer = stub_trainer(tmp_path, CategoryMetricsCallback(), datamodule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_stub(trainer, stub_batch(image_path=paths))
    assert trainer.callbacks[0].table["mean"]["n_images"] == 4
    trainer.world_size = 2
    with pytest.warns(UserWarning, match=r"list 1 images several times, such as c\.png\. With 2 processes"):
        run_stub(trainer, stub_batch(image_path=paths))


def test_unwritable_folder_keeps_the_printed_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics").write_text("a file where the folder should be")
    callback = CategoryMetricsCallback()
    with caplog.at_level(logging.WARNING):
        run_stub(stub_trainer(tmp_path, callback), stub_batch())
    assert "could not be saved" in caplog.text
    assert "100.00" in capsys.readouterr().out


def test_write_table_returns_its_paths(tmp_path: Path) -> None:
    row = dict.fromkeys(METRICS, math.nan) | {"n_images": 2, "n_anomalous": 0}
    table = {"a": row, "mean": row}
    csv_path, json_path = write_table(table, tmp_path / "new" / "folder", model="M", datamodule=None, map_size=None)
    assert csv_path.read_text().splitlines()[1] == "a,2,0,nan,nan,nan,nan,nan,nan"
    assert json.loads(json_path.read_text())["categories"]["a"]["DSC"] is None

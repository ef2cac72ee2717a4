# SPDX-License-Identifier: Apache-2.0
"""Which images of a folder `predict` takes: those that training reads, whatever anomalib lists."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import PredictDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.data.listing import list_images
from anomalib_uniass.prediction import PredictFolder
from tests.helpers.datasets import make_mvtec_layout
from tests.test_cli import Anomalib, anomalib
from tests.test_predict import CPU, MODEL, RUN, SMALL, engine, pictures, rows

__all__ = ["anomalib"]  # the fixture

ANOMALIBS = ("png", "jpg", "JPG", "jpeg", "bmp", "tif", "tiff", "webp", "ppm", "pgm")
OTHERS = ("jp2", "gif", "avif", "pcx", "tga", "sgi", "dib", "jfif", "jpe")
ENDINGS = ANOMALIBS + OTHERS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = make_mvtec_layout(tmp_path_factory.mktemp("data") / "parts", ["bolt"], 64, train=5)
    datamodule = Unified(root=parts, train_batch_size=4, eval_batch_size=2, num_workers=0, val_split_ratio=0.4)
    run = engine(tmp_path_factory.mktemp("run"), max_epochs=1)
    run.fit(UniAS(**SMALL, visualizer=False), datamodule=datamodule)
    path = tmp_path_factory.mktemp("checkpoint") / "model.ckpt"
    run.trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> UniAS:
    return UniAS.load_from_checkpoint(checkpoint)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same picture in every format, in a folder and one below it."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    home = tmp_path / "images"
    (home / "sub").mkdir(parents=True)
    for place, endings in ((home, ENDINGS), (home / "sub", ("png", "gif"))):
        for ending in endings:
            image.convert("L" if ending == "pgm" else "RGB").save(place / f"{ending}.{ending}")
    return home


def junk(folder: Path) -> None:
    (folder / "._png.png").write_bytes(b"\0\5\x16\7" + b"\0" * 60)
    (folder / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "png.png", folder / ".ipynb_checkpoints/png-checkpoint.png")
    (folder / "Thumbs.db").touch()
    for name in ("a.dcm", "b.dcm", "c.npy", "notes"):
        (folder / name).write_bytes(b"x")
    (folder / "folder.png").mkdir()
    shutil.copy(folder / "png.png", folder / "folder.png/inside.png")
    (folder / "loop").symlink_to(".")


ALL = {f"{ending}.{ending}" for ending in ENDINGS} | {"sub/png.png", "sub/gif.gif"}


def test_stock_command_predicts_what_training_reads_and_names_the_rest(
    anomalib: Anomalib, folder: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    junk(folder)
    with caplog.at_level(logging.WARNING):
        anomalib("predict", *MODEL, *CPU, "--data", "images", "--ckpt_path", str(checkpoint))
    table = rows(tmp_path / RUN)
    assert set(table) == ALL | {"folder.png/inside.png"}
    assert len(pictures(tmp_path / RUN)) == len(table)
    assert set(table) == {path.relative_to(folder).as_posix() for path in list_images(folder).images}
    (message,) = [record.getMessage() for record in caplog.records if "Not predicted" in record.getMessage()]
    assert "2 .dcm (a.dcm, ...), 1 .npy (c.npy), 1 without ending (notes)." in message


def test_stock_command_predicts_formats_that_anomalib_does_not_list(
    anomalib: Anomalib, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    for path in list_images(folder).images:
        if path.suffix[1:] in ANOMALIBS:
            path.unlink()
    arguments = ["--data", "PredictFolder", "--data.path", "images", "--ckpt_path", str(checkpoint)]
    anomalib("predict", *MODEL, *CPU, *arguments, "--model.visualizer", "false")
    assert set(rows(tmp_path / RUN)) == {f"{ending}.{ending}" for ending in OTHERS} | {"sub/gif.gif"}


def predicted(model: UniAS, tmp_path: Path, **what: object) -> set[str]:
    run = engine(tmp_path / "run")
    run.predict(model, **what)  # type: ignore[arg-type]
    return set(rows(Path(run.trainer.default_root_dir)))


def test_engine_predicts_the_same(model: UniAS, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    junk(folder)
    expected = ALL | {"folder.png/inside.png"}
    with caplog.at_level(logging.WARNING):
        assert predicted(model, tmp_path, data_path=folder) == expected
    assert "Not predicted" in caplog.text and "2 .dcm" in caplog.text
    assert predicted(model, tmp_path, dataset=PredictFolder(folder)) == expected
    dataset = PredictDataset(folder)
    assert predicted(model, tmp_path, dataloaders=DataLoader(dataset, 3, collate_fn=dataset.collate_fn)) == expected


def test_scores_do_not_depend_on_the_way_a_folder_is_given(model: UniAS, folder: Path, tmp_path: Path) -> None:
    (folder / "sub/png.png").unlink()
    (folder / "sub/gif.gif").unlink()
    scores = []
    for what in ({"data_path": folder}, {"dataset": PredictFolder(folder)}):
        run = engine(tmp_path / "run")
        run.predict(model, **what)  # type: ignore[arg-type]
        scores.append({path: row["score"] for path, row in rows(Path(run.trainer.default_root_dir)).items()})
    assert scores[0] == scores[1]
    lossless = [scores[0][f"{ending}.{ending}"] for ending in ("png", "bmp", "tif", "tga", "pcx", "sgi", "dib", "ppm")]
    assert len(set(lossless)) == 1


def test_one_image_is_predicted_alone(
    model: UniAS, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert predicted(model, tmp_path, data_path=folder / "png.png") == {"png.png"}
        assert predicted(model, tmp_path, dataset=PredictFolder(folder / "tga.tga")) == {"tga.tga"}
        assert "alone is predicted" not in caplog.text
        # Which of the two was given cannot be told from the file alone.
        assert predicted(model, tmp_path, data_path=folder / "sub") == {"png.png"}
    assert "alone is predicted" in caplog.text and "1 .gif (gif.gif)" in caplog.text


def test_choice_of_the_user_stays(model: UniAS, folder: Path, tmp_path: Path) -> None:
    dataset = PredictDataset(folder)
    dataset.image_filenames = [folder / "png.png", folder / "bmp.bmp"]
    assert predicted(model, tmp_path, dataset=dataset) == {"png.png", "bmp.bmp"}
    drawn = PredictDataset(folder)
    sampler = RandomSampler(drawn, num_samples=3)
    loader = DataLoader(drawn, sampler=sampler, collate_fn=drawn.collate_fn)
    assert len(predicted(model, tmp_path, dataloaders=loader)) == 3


def test_folder_of_hidden_images_is_refused(model: UniAS, folder: Path, tmp_path: Path) -> None:
    junk(folder)
    for path in list_images(folder).images:
        path.unlink()
    with pytest.raises(ValueError, match=r"There are no images in \S+images, only 2 \.dcm"):
        PredictFolder(folder)
    for path in list_images(folder).left_out:
        path.unlink()
    shutil.copytree(folder / ".ipynb_checkpoints", folder / ".hidden")
    with pytest.raises(ValueError, match=r"There are no images in .*, or they are hidden"):
        predicted(model, tmp_path, data_path=folder)


def test_links_that_lead_nowhere_are_named(model: UniAS, folder: Path, tmp_path: Path) -> None:
    (folder / "lost.tga").symlink_to("nowhere.tga")
    with pytest.raises(ValueError, match=r"images/lost\.tga: links that lead nowhere. Fetch the files"):
        predicted(model, tmp_path, data_path=folder)
    with pytest.raises(FileNotFoundError, match=r"There is no .*none"):
        PredictFolder(folder / "none")


@pytest.mark.parametrize("place", [".", "images", "images/../images", "linked"])
def test_folders_however_they_are_written(
    place: str, model: UniAS, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "linked").symlink_to(folder)
    monkeypatch.chdir(folder if place == "." else tmp_path)
    assert predicted(model, tmp_path, data_path=place) == ALL


@pytest.mark.parametrize("change", ["vanishes", "is cut"])
def test_image_that_changes_after_the_check_is_named(
    change: str, model: UniAS, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Change(Callback):
        def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            if change == "vanishes":
                (folder / "tiff.tiff").unlink(missing_ok=True)
            else:
                os.truncate(folder / "tiff.tiff", 1500)

    run = engine(tmp_path / "run", callbacks=[Change()])
    with caplog.at_level(logging.ERROR), pytest.raises(Exception):  # noqa: B017  # Pillow's, which names no file
        run.predict(model, data_path=folder)
    assert "1 images changed or vanished after they were checked" in caplog.text
    assert "tiff.tiff: " in caplog.text and "predict again" in caplog.text

# SPDX-License-Identifier: Apache-2.0
"""The pages of tests and comparisons: what they show, that they need nothing else, and that they stay small."""

import base64
import io
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.engine import Engine
from anomalib.models import Padim
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.metrics import CategoryMetrics, CategoryMetricsCallback
from anomalib_uniass.report.callback import ReportCallback
from anomalib_uniass.report.gallery import PANEL
from tests.helpers.datasets import make_mvtec_layout
from tests.helpers.models import tiny_padim

# --- A real run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Test two models on the same data: folders of their results, and of the comparison."""
    folder = tmp_path_factory.mktemp("pages")
    make_mvtec_layout(folder / "parts", ["bolt", "cap"], (240, 60), train=8, good=3, defective=6)
    small: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "image_size": (128, 128)}
    width = {"hidden_dim": 32, "feedforward_dim": 32, "channel_branch": False}
    models: dict[str, UniAS | Padim] = {
        "UniAS": UniAS(**small, **width, visualizer=False, seed=0),
        "Padim": tiny_padim(visualizer=False),
    }
    found = {"comparison": folder / "comparison"}
    for name, model in models.items():
        engine = Engine(default_root_dir=folder / name, accelerator="cpu", max_epochs=1, logger=False)
        data = Unified(
            root=folder / "parts",
            train_batch_size=4,
            eval_batch_size=4,
            num_workers=0,
            comparison=found["comparison"],
        )
        engine.fit(model, datamodule=data)
        engine.test(model, datamodule=data, verbose=False)
        found[name] = Path(engine.trainer.default_root_dir) / "metrics"
    return found


@pytest.mark.parametrize("name", ["UniAS", "Padim", "comparison"])
def test_a_page_needs_nothing_but_itself(runs: dict[str, Path], name: str) -> None:
    page = (runs[name] / "report.html").read_text()
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in addresses)
    assert "<script" not in page
    assert "url(http" not in page and "@import" not in page


@pytest.mark.parametrize("name", ["UniAS", "Padim"])
def test_a_page_shows_the_table_and_all_images(runs: dict[str, Path], name: str) -> None:
    page = (runs[name] / "report.html").read_text()
    table = pd.read_csv(runs[name] / "per_category.csv")
    for metric in ("pixel_AP", "DSC", "image_AUROC"):
        for value in table[metric]:
            assert f">{100 * value:.2f}</td>" in page
    assert f"{name} on parts" in page
    assert "Test of 18 images" in page
    told = re.findall(r"(\d+) of (\d+) defective images are found, (\d+) of (\d+) good ones are false alarms", page)
    total, *categories = np.array(told, dtype=int)  # the first lines of the page say it of all categories
    assert len(categories) == 2 and (total == sum(categories)).all() and total[[1, 3]].tolist() == [12, 6]
    assert page.count("good (3)") == page.count("defective (6)") == 2
    found, alarms = (
        sum(int(count) for count in re.findall(rf"(\d+) of \d+ {what}", page)) for what in ("defective", "good ones")
    )
    shown = {kind: page.count(f"<h3>{kind}") for kind in ("Surest hits", "Worst false alarms", "Worst misses")}
    assert (found > 0) == (shown["Surest hits"] > 0)
    assert (alarms > 0) == (shown["Worst false alarms"] > 0)
    assert (found < 12) == (shown["Worst misses"] > 0)


def test_a_page_says_what_gets_lost_at_the_size_of_the_model(runs: dict[str, Path]) -> None:
    assert "become smaller than a token" in (runs["UniAS"] / "report.html").read_text()
    assert "become smaller than a token" not in (runs["Padim"] / "report.html").read_text()


def test_pictures_show_image_mask_map_and_outlines(runs: dict[str, Path]) -> None:
    page = (runs["UniAS"] / "report.html").read_text()
    for source in re.findall(r"data:image/jpeg;base64,([^\"]*)", page):
        strip = Image.open(io.BytesIO(base64.b64decode(source)))
        assert strip.size == (4 * PANEL // 4 + 6, PANEL)  # of images four times as high as wide


def test_the_comparison_shows_the_models_side_by_side(runs: dict[str, Path]) -> None:
    page = (runs["comparison"] / "report.html").read_text()
    assert "Comparison of 2 models" in page
    assert re.findall(r"<h2>(\w+)</h2>", page) == ["bolt", "cap"]
    for category, row in pd.read_csv(runs["comparison"] / "per_category.csv").groupby("category"):
        section = page.split(f"<h2>{category}</h2>")[1].split("<section>")[0]
        for value in row["pixel_AP"]:
            assert f">{100 * value:.2f}</td>" in section


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("name", ["UniAS", "comparison"])
def test_a_browser_draws_the_page_bright_and_dark(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    pixels = {}
    for scheme in (1, 0):  # light, dark
        words = [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1250,2600"),
            *(f"--screenshot={tmp_path / f'{scheme}.png'}", (runs[name] / "report.html").as_uri()),
        ]
        subprocess.run(words, check=True, capture_output=True, timeout=120, cwd=tmp_path)
        pixels[scheme] = np.asarray(Image.open(tmp_path / f"{scheme}.png").convert("RGB")).astype(int)
    light, dark = pixels[1], pixels[0]
    assert light[0, 0].min() > 240 and dark[0, 0].max() < 40
    for shot in (light, dark):
        colours = {tuple(colour) for colour in shot[::5, ::5].reshape(-1, 3)}
        assert len(colours) > 1000, "no photographs"
        # Text is there in both: it is far from the background in the heading.
        assert np.abs(shot[20:90, 10:400] - shot[0, 0]).max() > 150


# --- Many categories, strange names, models without maps --------------------------------------------------------------


class Scored(CategoryMetricsCallback):
    """Metrics of a test that has ended."""

    def __init__(self, categories: list[str]) -> None:
        super().__init__()
        row = dict.fromkeys(("pixel_AP", "DSC", "pixel_F1Max", "AUPRO", "pixel_AUROC", "image_AUROC"), 0.5)
        self.table = {name: row | {"n_images": 3, "n_anomalous": 2} for name in [*categories, "mean"]}
        self.precision_recall = {name: [(0.5, 0.9), (1.0, 0.4)] for name in categories}

    def categories_of(self, batch: Any) -> list[str]:
        return list(batch.category)


def page_of(
    folder: Path, categories: list[str], *, maps: bool = True, read: Callable[[str], Tensor] | None = None
) -> str:
    """Test three images of each category on a stub trainer."""
    image = folder / "image.png"
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image)
    report = ReportCallback(read or (lambda _path: torch.from_numpy(noise).permute(2, 0, 1) / 255))
    trainer: Any = SimpleNamespace(
        callbacks=[Scored(categories), report],
        default_root_dir=folder,
        is_global_zero=True,
        global_rank=0,
        datamodule=SimpleNamespace(name="<data>", root=folder),
    )
    model: Any = SimpleNamespace(hparams={"width": 3}, device="cpu", post_processor=nn.Identity())
    report.on_test_start(trainer, model)
    for number, category in enumerate(categories):
        paths = [folder / f"{number}_{i}.png" for i in range(3)]
        for path in paths:
            path.symlink_to(image)
        some_map = torch.rand(3, 200, 300) if maps else None
        batch = SimpleNamespace(
            pred_score=torch.tensor([0.1, 0.4, 0.9]),
            gt_label=torch.tensor([0, 1, 1]),
            image_path=[str(path) for path in paths],
            category=[category] * 3,
            anomaly_map=some_map,
            pred_mask=None if some_map is None else some_map > 0.5,
            gt_mask=None if some_map is None else some_map > 0.9,
        )
        report.on_test_batch_end(trainer, model, None, batch, number)
    report.on_test_epoch_end(trainer, model)
    path = folder / "metrics" / "report.html"
    return path.read_text() if path.exists() else ""


def test_a_page_of_a_hundred_categories_stays_below_ten_megabytes(tmp_path: Path) -> None:
    page = page_of(tmp_path, [f"category {number}" for number in range(110)])
    assert len(page) < 10_000_000
    assert page.count("<h2>category") == 110
    sections = page.split("<section")[1:]
    without = sum("<img" not in section for section in sections)
    assert 0 < without < 60
    assert f"{without} categories have no pictures" in page


def test_every_category_has_its_first_pictures_before_one_has_its_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three images make five pictures: two hits, two misses, a false alarm; there is room for three and a few."""
    one = len(re.findall(r"data:image/jpeg[^\"]*", page_of(tmp_path, ["bolt"]))[0])
    monkeypatch.setattr("anomalib_uniass.report.callback.PICTURE_BYTES", 33 * one)
    (tmp_path / "more").mkdir()
    page = page_of(tmp_path / "more", [f"category {number}" for number in range(10)])
    counts = [section.count("<img") for section in page.split("<section")[1:]]
    assert min(counts) == 3
    assert 32 <= sum(counts) <= 36


def test_names_are_text(tmp_path: Path) -> None:
    page = page_of(tmp_path, ["<script>alert(1)</script>", 'a"b', "$x_", "ümlaut"])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;data&gt;" in page
    assert "<h2>ümlaut</h2>" in page


def test_models_without_maps_have_pictures_of_the_image_alone(tmp_path: Path) -> None:
    page = page_of(tmp_path, ["bolt"], maps=False)
    (source, *_) = re.findall(r"data:image/jpeg;base64,([^\"]*)", page)
    assert Image.open(io.BytesIO(base64.b64decode(source))).size == (PANEL, round(PANEL * 2 / 3))
    assert "There are no thresholds" in page


def test_what_cannot_be_written_costs_the_page_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics").write_text("a file where the folder should be")
    assert page_of(tmp_path, ["bolt"]) == ""
    assert "could not be written" in caplog.text


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_images_that_are_gone_cost_their_pictures_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    def read(path: str) -> Tensor:
        if path.endswith("1_2.png"):
            msg = f"{path}: is broken"
            raise error(msg)
        return torch.rand(3, 8, 8)

    page = page_of(tmp_path, ["bolt", "cap"], read=read)
    bolt, cap = page.split("<section")[1:]
    assert bolt.count("<img") == 5
    assert cap.count("<img") == 3  # it is a hit and a miss
    assert caplog.text.count("1_2.png: is broken") == 1


def test_a_page_without_any_picture_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def read(path: str) -> Tensor:
        msg = f"{path}: is gone"
        raise FileNotFoundError(msg)

    page = page_of(tmp_path, [f"category {number}" for number in range(4)], read=read)
    assert page.count("<h2>category") == 4
    assert "<img" not in page
    assert caplog.text.count("is gone") == 5
    assert "12 files in all" in caplog.text


# --- The curve -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(64, 64), (64, 32)], ids=["exact", "compact"])
def test_drawn_curves_have_the_area_of_the_average_precision(sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    metric = CategoryMetrics(["bolt", "cap"])
    scores, truth = [], []
    for side in sizes:
        mask = torch.rand(1, side, 64, generator=generator) > 0.9
        anomaly_map = torch.rand(1, side, 64, generator=generator) + 0.5 * mask
        metric.update(anomaly_map, mask, anomaly_map.amax((1, 2)), mask.any(2).any(1), ["bolt"])
        scores.append(anomaly_map.flatten())
        truth.append(mask.flatten())
    metric.compute()
    recall, precision = zip(*metric.precision_recall["bolt"], strict=True)
    assert len(recall) <= 101
    area = np.trapezoid([1.0, *precision], [0.0, *recall]) if hasattr(np, "trapezoid") else None
    expected = average_precision_score(torch.cat(truth).numpy(), torch.cat(scores).numpy())
    assert area is None or area == pytest.approx(expected, abs=0.01)
    assert "cap" not in metric.precision_recall

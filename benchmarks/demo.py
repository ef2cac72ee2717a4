# SPDX-License-Identifier: Apache-2.0
"""The demo of `make demo`: write images; train, test, export and predict through the stock anomalib command; compare.

Runs each command in the current folder and says it first, so that it can be repeated by hand. Timings and figures go to
``results/demo.json``, a sheet with a prediction of each category to ``results/demo.png``.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
WRITER = Path(__file__).parent / "sample_data" / "write.py"
RESULTS = Path("results")
BANK = {"max_patches": 20_000, "coreset_size": 1_000}
# Picked by hand; the photographs are in the public domain, the solar cells are not.
SHOWN_PHOTOGRAPHS = ("brick/test/foreign/000.png", "coins/test/chip/000.png", "gravel/test/foreign/002.png")
SHOWN_MISS = ("coins/test/scratch/000.png",)
SHOWN_SOLAR_CELLS = ("solar_mono/test/inactive/001.png", "solar_poly/test/chip/003.png")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="configuration of model, data and trainer")
    config_path = parser.parse_args().config.resolve()
    config = yaml.safe_load(config_path.read_text())
    root = Path(config["data"]["init_args"]["root"])
    start = time.monotonic()

    heading(1, "Write the sample dataset: photographs and solar cells from pip packages, with generated defects")
    command(sys.executable, str(WRITER), str(root))
    written = time.monotonic()

    heading(2, "Train UniAS on all categories, test it, write the table and the pictures")
    anomalib("train", "--config", str(config_path))
    run = max((RESULTS / "UniAS").glob("*/v*"), key=lambda folder: folder.stat().st_mtime)
    checkpoint = run / "weights" / "lightning" / "model.ckpt"
    trained = time.monotonic() - written

    heading(3, "Export to OpenVINO")
    anomalib(
        "export", "--model", "UniAS", "--model.pre_trained", "false", "--export_type", "openvino",
        "--ckpt_path", str(checkpoint), "--export_root", str(run),
    )  # fmt: skip
    exported = run / "weights" / "openvino" / "model.xml"

    heading(4, "Predict one image with anomalib's OpenVINOInferencer")
    image = next(root.glob("solar_mono/test/inactive/*.png"))
    print(f"{image}: {decision(predict(exported, image), exported, 'solar_mono')}")

    heading(5, "Compare with the untrained model and with a memory bank (Patchcore) on the same backbone")
    table = json.loads((run / "metrics" / "per_category.json").read_text())
    rows = {
        "UniAS, untrained": untrained_pixel_ap(config),
        "Patchcore, one bank": bank_pixel_ap(config),
        "UniAS, trained": table["mean"]["pixel_AP"],
    }
    picture = draw_sheet(run / "images", SHOWN_PHOTOGRAPHS + SHOWN_SOLAR_CELLS, RESULTS / "demo.png")
    for name, shown in (("demo_photographs", SHOWN_PHOTOGRAPHS), ("demo_miss", SHOWN_MISS)):  # for the README
        draw_sheet(run / "images", shown, RESULTS / f"{name}.png")
    report = {
        "pixel_ap_percent": {name: round(100 * value, 2) for name, value in rows.items()},
        "seconds": {"train_and_test": round(trained), "all": round(time.monotonic() - start)},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("anomalib-uniass", "anomalib", "torch", "openvino")},
    }
    (RESULTS / "demo.json").write_text(json.dumps(report, indent=2) + "\n")

    heading(6, "Results")
    for name, value in report["pixel_ap_percent"].items():
        print(f"  {name:<20} mean pixel AP {value:6.2f} %")
    print(f"\n  Table      {run}/metrics/per_category.csv (and .json)")
    print(f"  Page       {run}/metrics/report.html: open it in a browser")
    print(f"  Pictures   {run}/images, one sheet of them in {picture}")
    print(f"  Checkpoint {checkpoint}")
    print(f"  OpenVINO   {exported}")
    print(f"  Figures    {RESULTS}/demo.json ({report['seconds']['all']} s in all on {report['machine']})")


def heading(number: int, text: str) -> None:
    """Announce a step."""
    print(f"\n=== {number}. {text}", flush=True)


def anomalib(*arguments: str) -> None:
    """Run the stock console script that stands beside this Python."""
    script = shutil.which("anomalib", path=str(Path(sys.executable).parent))
    if script is None:
        sys.exit(f"No anomalib command beside {sys.executable}: run `make demo`, or install anomalib.")
    command(script, *arguments)


def command(program: str, *arguments: str) -> None:
    """Say a command and run it."""
    print("$", Path(program).name, *arguments, flush=True)
    subprocess.run([program, *arguments], check=True)


def predict(model: Path, image: Path) -> float:
    """Return the normalised image score of one image; float32, for many CPUs take bfloat16 unasked."""
    from anomalib.deploy import OpenVINOInferencer

    inferencer = OpenVINOInferencer(model, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    return float(inferencer.predict(image).pred_score.item())


def decision(score: float, model: Path, category: str) -> str:
    """Say what the category's own threshold, in the file beside an exported model, decides about a score.

    The exported graph sees no path and so no category: its own labels take the highest threshold of all.
    """
    threshold = json.loads(model.with_name("category_thresholds.json").read_text())["image"][category]
    word = "defective" if score > threshold else "good"
    return f"{word}, score {score:.3f} in [0, 1], threshold of {category} {threshold:.3f}"


def untrained_pixel_ap(config: dict[str, Any]) -> float:
    """Return the mean pixel AP of the model as it starts."""
    from anomalib_uniass import UniAS

    return pixel_ap(UniAS(**config["model"]["init_args"], visualizer=False), config, fit=False)


def bank_pixel_ap(config: dict[str, Any]) -> float:
    """Return the mean pixel AP of one memory bank for all categories, on the same backbone and weights."""
    from anomalib_uniass import BoundedPatchcore

    backbone = {name: config["model"]["init_args"][name] for name in ("backbone", "weights")}
    return pixel_ap(BoundedPatchcore(**backbone, **BANK, visualizer=False), config, fit=True)


def pixel_ap(model: Any, config: dict[str, Any], *, fit: bool) -> float:
    """Test a model on the demo's data and return its mean pixel AP, in [0, 1]."""
    from anomalib.engine import Engine

    from anomalib_uniass import Unified

    datamodule = Unified(**config["data"]["init_args"])
    engine = Engine(default_root_dir=RESULTS / "demo_baselines", accelerator="cpu")
    if fit:
        engine.fit(model, datamodule=datamodule)
    (metrics,) = engine.test(model, datamodule=datamodule, verbose=False)
    return float(metrics["mean_pixel_AP"])


def draw_sheet(images: Path, names: Iterable[str], target: Path, *, height: int = 256) -> Path:
    """Stack pictures that anomalib drew: image, mask, anomaly map, predicted mask."""
    from PIL import Image

    pictures = [Image.open(images / name).convert("RGB") for name in names]
    rows = [picture.resize((height * picture.width // picture.height, height)) for picture in pictures]
    sheet = Image.new("RGB", (max(row.width for row in rows), height * len(rows)))
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * height))
    sheet.save(target)
    return target


if __name__ == "__main__":
    main()

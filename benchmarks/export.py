# SPDX-License-Identifier: Apache-2.0
"""Exported UniAS beside PyTorch: equality, accuracy on real images, and speed, in float32, FP16, bfloat16 and INT8.

``accuracy`` exports a trained checkpoint with anomalib's engine and runs every test image, at its native size and at
those asked for, through PyTorch and through OpenVINO; metrics are those of this package, on the outputs as they are
deployed (normalised). A map's correlation is that with PyTorch's of the same image, at the same size.
``speed`` times the model of that checkpoint and UniAS at full size (random weights, both recipes), the variants taking
turns.
INT8 is ``INT8_PTQ``, calibrated on the training images of every category.

python benchmarks/export.py accuracy DATA CHECKPOINT --name inspection --sizes native 256 1024
python benchmarks/export.py speed DATA CHECKPOINT --name inspection

DATA is in MVTec AD layout. Results: ``results/export.json`` and ``export.md``.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from speed import SETTLE_SECONDS
from speed_report import machine, table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.deploy.validation import Predict, checkpoint_model, exported_model
from anomalib_uniass.metrics import CategoryMetrics
from anomalib_uniass.models.unias.detector.recipes import RecipeName

VARIANTS: dict[str, tuple[CompressionType | None, str]] = {
    "OpenVINO float32": (None, "f32"),
    "OpenVINO FP16 weights": (CompressionType.FP16, "f32"),
    "OpenVINO bfloat16": (None, "bf16"),
    "OpenVINO INT8": (CompressionType.INT8_PTQ, "f32"),
}
"""Compression of the export, and precision that the runtime is asked for."""

PYTORCH, FLOAT32, BFLOAT16, INT8 = "PyTorch float32", "OpenVINO float32", "OpenVINO bfloat16", "OpenVINO INT8"
NATIVE = "native"
METRICS = ("pixel_AP", "DSC", "pixel_AUROC", "image_AUROC")
THREADS, ROUNDS, WARM_UP = os.cpu_count() or 1, 30, 3


def main() -> None:
    """Measure accuracy or speed and add it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("accuracy", "speed"))
    parser.add_argument("data", type=Path, help="dataset in MVTec AD layout that the checkpoint was trained on")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--name", required=True, help="what to call this dataset in the results")
    parser.add_argument("--sizes", nargs="+", default=["native"], help="accuracy: 'native', or heights to resize to")
    parser.add_argument("--every", type=int, default=1, help="accuracy: take every n-th test image")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "export")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    model = UniAS.load_from_checkpoint(args.checkpoint, evaluator=False, visualizer=False).eval()
    datamodule = Unified(root=args.data, train_batch_size=8, eval_batch_size=1, num_workers=0)
    with tempfile.TemporaryDirectory() as folder:
        if args.section == "accuracy":
            rows = accuracy(model, datamodule, Path(folder), sizes=args.sizes, every=args.every)
        else:
            models = {
                f"{args.name} model": model,
                "full size": full_size("paper"),
                "full size, best": full_size("best"),
            }
            rows = speed(models, datamodule, Path(folder))
    write(args.output, args.section, args.name, rows)


def full_size(recipe: RecipeName) -> UniAS:
    """Return UniAS of full size with random weights, layer norms included, for an untrained one is not exported."""
    model = UniAS(pre_trained=False, recipe=recipe, seed=0, evaluator=False, visualizer=False).eval()
    nn.init.uniform_(model.model.norm.weight, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("fitted"):
            buffer.fill_(True)  # all that a training leaves is computed with, whatever its values
    return model


def predictors(model: UniAS, datamodule: Unified, folder: Path) -> dict[str, Predict]:
    """Return inference of every variant."""
    predicts = {PYTORCH: checkpoint_model(model)}
    for name, (compression, precision) in VARIANTS.items():
        root = folder / (compression.value if compression else "float32")
        path = root / "weights" / "openvino" / "model.xml"
        if not path.exists():
            engine = Engine(default_root_dir=root)
            engine.export(
                model, ExportType.OPENVINO, export_root=root, compression_type=compression, datamodule=datamodule
            )
        predicts[name] = exported_model(path, precision, "CPU")
    return predicts


def accuracy(
    model: UniAS, datamodule: Unified, folder: Path, *, sizes: Sequence[str] = (NATIVE,), every: int = 1
) -> list[dict[str, Any]]:
    """Score all variants on every n-th test image at all sizes, and compare their outputs with PyTorch's."""
    predicts = predictors(model, datamodule, folder)
    datamodule.setup()
    datamodule.test_data.subsample(list(range(0, len(datamodule.test_data), every)), inplace=True)
    samples = datamodule.test_data.samples
    category = dict(zip(samples["image_path"], samples["category"], strict=True))
    rows = []
    for size in sizes:
        metrics = {name: CategoryMetrics(sorted(set(category.values()))) for name in predicts}
        difference = dict.fromkeys(predicts, 0.0)
        correlations: dict[str, list[float]] = {name: [] for name in predicts}
        for batch in datamodule.test_dataloader():
            image = enlarged(batch.image, size)[0]
            reference = predicts[PYTORCH](image)
            mask = F.interpolate(batch.gt_mask[:, None].float(), reference.anomaly_map.shape, mode="nearest")
            for name, predict in predicts.items():
                output = reference if name == PYTORCH else predict(image)
                difference[name] = max(
                    difference[name],
                    float(np.abs(output.anomaly_map - reference.anomaly_map).max()),
                    abs(output.score - reference.score),
                )
                flat = [one.anomaly_map.flatten() for one in (output, reference)]
                correlations[name].append(float(np.corrcoef(flat)[0, 1]))
                maps, scores = torch.from_numpy(output.anomaly_map)[None], torch.tensor([output.score])
                metrics[name].update(maps, mask, scores, batch.gt_label, [category[path] for path in batch.image_path])
        for name, metric in metrics.items():
            mean = metric.compute()["mean"]
            row: dict[str, Any] = {"size": size, "variant": name}
            row |= {key: round(100 * mean[key], 3) for key in METRICS}
            row |= {"largest_difference": difference[name], "images": len(samples)}
            row |= {
                "median_correlation": round(float(np.median(correlations[name])), 5),
                "least_correlation": round(min(correlations[name]), 5),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def enlarged(image: Tensor, size: str) -> Tensor:
    """Return images ``(1, 3, H, W)`` resized to a height, or as they are."""
    if size == NATIVE:
        return image
    height, width = int(size), round(int(size) * image.shape[-1] / image.shape[-2])
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def speed(models: dict[str, UniAS], datamodule: Unified, folder: Path) -> list[dict[str, Any]]:
    """Time all variants at batch 1 on one image; PyTorch over the variant, and OpenVINO float32 over the variant."""
    rows = []
    datamodule.setup()
    image = next(iter(datamodule.test_dataloader())).image[0]
    for model_name, model in models.items():
        predicts = predictors(model, datamodule, folder / model_name)
        seconds: dict[str, list[float]] = {name: [] for name in predicts}
        for number in range(WARM_UP + ROUNDS):
            for name, predict in predicts.items():
                time.sleep(SETTLE_SECONDS)
                start = time.perf_counter()
                predict(image)
                if number >= WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
        median = {name: float(np.median(values)) for name, values in seconds.items()}
        for name, values in seconds.items():
            low, high = np.percentile(values, (25, 75))
            row = {"model": model_name, "variant": name, "ms": 1000 * median[name], "iqr_ms": 1000 * (high - low)}
            row |= {"over_pytorch": median[PYTORCH] / median[name], "over_float32": median[FLOAT32] / median[name]}
            rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
            print(rows[-1], flush=True)
    return rows


def write(path: Path, section: str, name: str, rows: list[dict[str, Any]]) -> None:
    """Add a section to the results and write JSON and Markdown."""
    file = path.with_suffix(".json")
    results = json.loads(file.read_text()) if file.exists() else {"accuracy": {}, "speed": {}}
    results[section][name] = {"machine": machine(torch.device("cpu"), THREADS), "rows": rows}
    results["summary"] = summary(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    path.with_suffix(".md").write_text(markdown(results))


def summary(results: dict[str, Any]) -> dict[str, float | None]:
    """Return the worst of all datasets and sizes, and the speed at full size; None: not measured."""
    tables = [
        {row["variant"]: row for row in part["rows"] if row.get("size", NATIVE) == size}
        for part in results["accuracy"].values()
        for size in dict.fromkeys(row.get("size", NATIVE) for row in part["rows"])
    ]

    def drop(variant: str, metric: str) -> float | None:
        return max((round(t[FLOAT32][metric] - t[variant][metric], 3) for t in tables), default=None)

    speeds = [row for part in results["speed"].values() for row in part["rows"]]
    full = [row["over_float32"] for row in speeds if row["model"] == "full size" and row["variant"] == INT8]
    return {
        "openvino_f32_max_abs_diff": max((t[FLOAT32]["largest_difference"] for t in tables), default=None),
        "int8_pixel_ap_drop": drop(INT8, "pixel_AP"),
        "int8_image_auroc_drop": drop(INT8, "image_AUROC"),
        "bfloat16_pixel_ap_drop": drop(BFLOAT16, "pixel_AP"),
        "bfloat16_image_auroc_drop": drop(BFLOAT16, "image_AUROC"),
        "int8_over_f32_speed": min(full, default=None),
    }


def markdown(results: dict[str, Any]) -> str:
    """Return all results as Markdown."""
    text = [
        "# Export",
        "Largest difference: of map and score from PyTorch's, both in [0, 1]. Metrics in percent, on deployed outputs. "
        "Size: height that the images were resized to. Correlations: of an image's map with PyTorch's.",
        table([{"key": key, "value": value} for key, value in results["summary"].items()], ("key", "value")),
    ]
    for section, parts in results.items():
        if section == "summary":
            continue
        for name, part in parts.items():
            host = part["machine"]
            versions = ", ".join(f"{package} {number}" for package, number in host["versions"].items())
            text += [
                f"## {section.capitalize()}: {name}",
                table(part["rows"], tuple(part["rows"][0])),
                f"{host['cpu']} ({', '.join(host['cpu_extensions'])}), {host['threads']} threads; commit "
                f"{host['commit']}, {host['date']}; {versions}",
            ]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    main()

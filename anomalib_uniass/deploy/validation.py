# SPDX-License-Identifier: Apache-2.0
"""Does an exported model say what its checkpoint says, on this machine and these images, and how fast?"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.categories import CategoryNames
from anomalib_uniass.deploy.export import THRESHOLDS, exported_thresholds
from anomalib_uniass.deploy.precision import DEFAULT_PRECISION, Computed, compile_openvino, computed
from anomalib_uniass.files import replace_text
from anomalib_uniass.metrics import CategoryMetrics
from anomalib_uniass.metrics.category_metrics import MEAN
from anomalib_uniass.metrics.functional import METRICS
from anomalib_uniass.report.charts import bar_chart
from anomalib_uniass.report.page import versions, write_page
from anomalib_uniass.thresholds.checks import read_thresholds

if TYPE_CHECKING:
    import openvino as ov

CHECKPOINT = "checkpoint (PyTorch)"

WARM_UP = 3
"""Images whose times do not count."""

MOST_NAMED = 100
"""Images of another decision that the page names."""


class Outputs(NamedTuple):
    """What a deployed model gives: a map ``(h, w)`` and a score, both normalised to [0, 1]."""

    anomaly_map: npt.NDArray[np.float32]
    score: float


Predict = Callable[[Tensor], Outputs]
"""From an image ``(3, H, W)`` in [0, 1]."""


class Tolerance(NamedTuple):
    """What an exported model may differ by from its checkpoint.

    Attributes:
        metric_drop: Points that the mean of a metric may be lower by.
        decisions: Share of the images that may be decided otherwise.
        difference: Largest difference of a score or a map's pixel, None for any.
    """

    metric_drop: float = 1.0
    decisions: float = 0.01
    difference: float | None = None


class Decision(NamedTuple):
    """An image that an exported model decides otherwise than the checkpoint."""

    path: str
    is_defective: bool
    checkpoint: float
    exported: float
    threshold: float


@dataclass
class Findings:
    """What is measured of a model.

    Attributes:
        table: Metrics by category, and their mean.
        seconds: Time of each image.
        largest_difference: Of a score or a map's pixel from the checkpoint's; infinite where a value is not finite.
        decisions: Images decided otherwise than by the checkpoint; None without thresholds.
        computed: What OpenVINO computed in; None of the checkpoint.
        asked: Precisions that were asked for and are computed so.
        decides: Whether the tolerances hold for it; else it is measured for information.
        not_finite: Images whose score or map is not finite.
    """

    table: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    largest_difference: float = 0.0
    decisions: list[Decision] | None = None
    computed: Computed | None = None
    asked: tuple[str, ...] = ()
    decides: bool = True
    not_finite: list[str] = field(default_factory=list)

    def milliseconds(self, percentile: float) -> float:
        """Return a percentile of the times, those of the first images aside."""
        return 1000 * float(np.percentile(self.seconds[WARM_UP:] or self.seconds, percentile))

    def problems(self, reference: "Findings", tolerance: Tolerance) -> list[str]:
        """Say what exceeds a tolerance."""
        found = []
        for key in METRICS:
            expected, own = (100 * findings.table[MEAN][key] for findings in (reference, self))
            drop = expected - own
            if math.isnan(own) and not math.isnan(expected):
                found.append(f"{key} is not a number, of the checkpoint it is {expected:.2f} %")
            elif drop > tolerance.metric_drop:
                found.append(f"{key} is lower by {drop:.2f} points, allowed are {tolerance.metric_drop:g}")
        others, images = len(self.decisions or ()), len(self.seconds)
        if others / images > tolerance.decisions:
            found.append(f"{others} of {images} decisions differ, allowed are {100 * tolerance.decisions:g} %")
        if self.not_finite:
            found.append(
                f"scores or maps of {len(self.not_finite)} of {images} images are not finite (NaN or infinite), the "
                f"first of {self.not_finite[0]}"
            )
        elif tolerance.difference is not None and self.largest_difference > tolerance.difference:
            found.append(f"outputs differ by {self.largest_difference:.2g}, allowed are {tolerance.difference:g}")
        return found


def exported_model(path: Path, precision: str, device: str) -> Predict:
    """Return inference by an exported model; arguments as of :func:`compile_openvino`."""
    return compiled_model(path, compile_openvino(path, precision, device))


def compiled_model(path: Path, compiled: "ov.CompiledModel") -> Predict:
    """Return inference by a compiled model.

    Args:
        path: Its file, for messages.
        compiled: The model.

    Raises:
        ValueError: If it gives no map and score; the inference does if it takes images of another size.
    """
    outputs = {name for output in compiled.outputs for name in output.names}
    if missing := {"anomaly_map", "pred_score"} - outputs:
        msg = f"{path} gives no {' and no '.join(sorted(missing))}: it is no model that `anomalib export` wrote."
        raise ValueError(msg)

    def predict(image: Tensor) -> Outputs:
        try:
            outputs = compiled(image[None].numpy())
        except RuntimeError as error:
            shape = compiled.input(0).partial_shape
            msg = f"{path} takes images {shape}, got one of {tuple(image[None].shape)}; export it for any size."
            raise ValueError(msg) from error
        anomaly_map = outputs["anomaly_map"]
        return Outputs(anomaly_map.reshape(anomaly_map.shape[-2:]).copy(), float(outputs["pred_score"].item()))

    return predict


class Compiled(NamedTuple):
    """An exported model as it runs here.

    Attributes:
        path: Its file.
        predict: Inference by it.
        computed: What it computes in.
        asked: Precisions that were asked for and are computed so, :data:`DEFAULT_PRECISION` among them.
        decides: Whether one of them will be deployed.
    """

    path: Path
    predict: Predict
    computed: Computed
    asked: tuple[str, ...]
    decides: bool

    @property
    def name(self) -> str:
        """File and precision, and who wanted it if it has another name."""
        words = [self.computed.precision]
        if DEFAULT_PRECISION in self.asked:
            words.append("the default here")
        others = [one for one in self.asked if one not in (DEFAULT_PRECISION, *self.computed.precision.split(", "))]
        if others:
            words.append(f"asked for {' and '.join(others)}")
        return f"{self.path.as_posix()} ({', '.join(words)})"


def compile_exports(
    exported: Sequence[Path], *, precisions: Sequence[str], information: Sequence[str] = (), device: str = "CPU"
) -> list[Compiled]:
    """Compile exported models in each precision, and once where the device computes two of them alike.

    Args:
        exported: Files ``model.xml`` and ``model.onnx``.
        precisions: Precisions that will be deployed: ``f32``, ``bf16``, ``f16``, or :data:`DEFAULT_PRECISION`.
        information: Precisions to measure beside them.
        device: Device of OpenVINO.

    Raises:
        ValueError: If a file cannot be read, or the device computes nothing.
    """
    found = []
    for path in exported:
        alike: dict[Computed, tuple[Predict, list[str]]] = {}
        for precision in dict.fromkeys([*precisions, *information]):
            compiled = compile_openvino(path, precision, device)
            alike.setdefault(computed(compiled), (compiled_model(path, compiled), []))[1].append(precision)
        for one, (predict, asked) in alike.items():
            decides = not set(asked).isdisjoint(precisions)
            found.append(Compiled(path, predict, one, tuple(asked), decides))
    return found


def checkpoint_model(model: AnomalibModule) -> Predict:
    """Return inference by the trained model itself, pre-processing and post-processing included."""
    model.eval()

    @torch.no_grad()
    def predict(image: Tensor) -> Outputs:
        outputs = model(image[None].to(model.device))
        anomaly_map = outputs.anomaly_map.reshape(outputs.anomaly_map.shape[-2:])
        return Outputs(anomaly_map.float().cpu().numpy(), float(outputs.pred_score))

    return predict


def compare(
    model: AnomalibModule,
    datamodule: AnomalibDataModule,
    exported: Sequence[Path],
    *,
    precisions: Sequence[str],
    information: Sequence[str] = (),
    device: str = "CPU",
) -> dict[str, Findings]:
    """Run every test image through a checkpoint and its exports, in turns.

    Args:
        model: The trained model.
        datamodule: Data whose test images keep their own size.
        exported: Files ``model.xml`` and ``model.onnx``.
        precisions: Precisions to run each in, which will be deployed.
        information: Precisions to measure beside them.
        device: Device of OpenVINO.

    Returns:
        Findings by model and by the precision it was computed in, those of the checkpoint first, under
        :data:`CHECKPOINT`.

    Raises:
        ValueError: If a file cannot be read or takes images of another size, or thresholds beside it are missing or not
            finite.
    """
    predicts = {CHECKPOINT: checkpoint_model(model)}
    own = exported_thresholds(model.post_processor)
    thresholds: dict[str, Any] = {CHECKPOINT: None if own is None else json.loads(own)}
    runs = {
        run.name: run
        for run in compile_exports(exported, precisions=precisions, information=information, device=device)
    }
    for name, run in runs.items():
        predicts[name] = run.predict
        file = run.path.with_name(f"{THRESHOLDS}.json")
        thresholds[name] = read_thresholds(file) if file.is_file() else None
    datamodule.setup("test")
    samples = datamodule.test_data.samples
    found = {name: Findings(decisions=None if thresholds[CHECKPOINT] is None else []) for name in predicts}
    for name, run in runs.items():
        found[name].computed, found[name].asked, found[name].decides = run.computed, run.asked, run.decides
    metrics = {name: CategoryMetrics(sorted(set(samples["category"]))) for name in predicts}
    for index, category in enumerate(samples["category"]):
        item: Any = datamodule.test_data[index]
        outputs: dict[str, Outputs] = {}
        for name, predict in predicts.items():
            start = time.perf_counter()
            outputs[name] = predict(cast("Tensor", item.image))
            found[name].seconds.append(time.perf_counter() - start)
            metrics[name].update(*_scored(outputs[name], item), [category])
        reference = outputs[CHECKPOINT]
        for name, output in outputs.items():
            if not _is_finite(output):
                found[name].not_finite.append(str(item.image_path))
            found[name].largest_difference = max(
                found[name].largest_difference,
                _difference(output.anomaly_map, reference.anomaly_map),
                _difference(output.score, reference.score),
            )
            limits = [_threshold(thresholds[one], category) for one in (CHECKPOINT, name)]
            decisions = found[name].decisions
            if decisions is not None and _is_good(reference.score, limits[0]) != _is_good(output.score, limits[1]):
                label = bool(item.gt_label)
                decisions.append(Decision(str(item.image_path), label, reference.score, output.score, limits[1]))
    for name, metric in metrics.items():
        found[name].table = metric.compute()
    return found


def _scored(output: Outputs, item: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return map, mask, score and label of an image as batches of one."""
    highest = 1.0  # of normalised outputs: what is not finite is never good
    anomaly_map = torch.from_numpy(output.anomaly_map)[None].nan_to_num(highest, highest, highest)
    score = output.score if math.isfinite(output.score) else highest
    mask = item.gt_mask
    if mask is not None:
        mask = F.interpolate(mask.reshape(1, 1, *mask.shape[-2:]).float(), anomaly_map.shape[-2:], mode="nearest")[0]
    return anomaly_map, mask, torch.tensor([score]), torch.as_tensor(item.gt_label).reshape(1)


def _is_finite(output: Outputs) -> bool:
    """Tell whether score and map are numbers."""
    return math.isfinite(output.score) and bool(np.isfinite(output.anomaly_map).all())


def _difference(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Return the largest absolute difference; infinite if any value is not finite, even if both agree in that."""
    one, other = np.asarray(one), np.asarray(other)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return math.inf
    return float(np.abs(one - other).max())


def _is_good(score: float, threshold: float) -> bool:
    """Tell whether an image is good; what is not finite never is."""
    return math.isfinite(score) and score <= threshold


def _threshold(thresholds: Mapping[str, Any] | None, category: str) -> float:
    """Return the threshold of scores of a category; without one of its own the graph's, which is 0.5."""
    own = None if thresholds is None else CategoryNames(thresholds["image"]).match(category)
    return 0.5 if thresholds is None or own is None else float(thresholds["image"][own])


def _number(value: float) -> float | None:
    """Return a number as JSON has it: None where it is not finite."""
    return value if math.isfinite(value) else None


def write(
    folder: Path, found: Mapping[str, Findings], tolerance: Tolerance, facts: Mapping[str, str]
) -> dict[str, list[str]]:
    """Write ``validation.json`` and ``report.html``.

    Args:
        folder: Folder of both, which exists.
        found: Results of :func:`compare`.
        tolerance: What may differ.
        facts: What the page says of machine and files.

    Returns:
        What exceeds the tolerance by model, of those for information too.

    Raises:
        OSError: If a file cannot be written.
    """
    reference = found[CHECKPOINT]
    problems = {name: findings.problems(reference, tolerance) for name, findings in found.items()}
    rows: dict[str, dict[str, Any]] = {
        name: {
            "decides": findings.decides,
            "precision": None if findings.computed is None else findings.computed.precision,
            "devices": None if findings.computed is None else findings.computed.devices,
            "asked": findings.asked,
            "metrics": {key: _number(value) for key, value in findings.table[MEAN].items()},
            "largest_difference": _number(findings.largest_difference),
            "other_decisions": None if findings.decisions is None else len(findings.decisions),
            "median_ms": findings.milliseconds(50),
            "p95_ms": findings.milliseconds(95),
            "problems": problems[name],
        }
        for name, findings in found.items()
    }
    facts = dict(facts) | versions()
    content = {"images": len(reference.seconds), "tolerance": tolerance._asdict(), "models": rows, "facts": facts}
    replace_text(folder / "validation.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    pixel_ap: dict[str, dict[str, float]] = defaultdict(dict)
    for name, findings in found.items():
        for category, row in findings.table.items():
            pixel_ap[name][category] = 100 * row["pixel_AP"]
    write_page(
        folder / "report.html",
        "validation",
        title="Exported model beside its checkpoint",
        subtitle=f"{len(reference.seconds)} test images, one at a time",
        metrics=METRICS,
        rows=rows,
        chart=bar_chart(pixel_ap, label="pixel AP [%]"),
        decisions={name: (findings.decisions or [])[:MOST_NAMED] for name, findings in found.items()},
        facts=facts,
    )
    return problems

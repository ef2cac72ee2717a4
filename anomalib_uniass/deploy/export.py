# SPDX-License-Identifier: Apache-2.0
"""Export as anomalib does it, with checks before, thresholds beside, and INT8 calibrated on every category."""

import json
import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, ImageItem, InferenceBatch
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from torch import Tensor, nn
from torchmetrics import Metric

from anomalib_uniass.categories import row_categories
from anomalib_uniass.files import replace_text
from anomalib_uniass.logs import CONVERTERS, from_here, quiet, warn
from anomalib_uniass.text import some
from anomalib_uniass.thresholds.decisions import never_good
from anomalib_uniass.thresholds.post_processor import (
    CategoryThresholdPostProcessor,
    check_decisions,
    has_thresholds,
    missing_thresholds,
)

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 300
"""Images that anomalib advises to calibrate INT8 with, and the most that NNCF takes by default."""

THRESHOLDS = "category_thresholds"
"""Name of the thresholds of an exported model: the JSON file beside it, and OpenVINO's runtime information."""

INT8 = (CompressionType.INT8, CompressionType.INT8_PTQ, CompressionType.INT8_ACQ)
CALIBRATED = (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ)
WEIGHTS = {
    None: "float32",
    CompressionType.FP16: "float16",
    CompressionType.INT8: "8 bits",
    CompressionType.INT8_PTQ: "8 bits where INT8 computes",
    CompressionType.INT8_ACQ: "8 bits where INT8 computes",
}
"""Weights of an OpenVINO model by compression, in words."""

_is_exporting: ContextVar[bool] = ContextVar("is_exporting", default=False)
"""Whether an export runs: OpenVINO's exports to ONNX on its way."""

if TYPE_CHECKING:
    import openvino as ov

    Base = AnomalibModule
else:
    Base = object  # a plain mixin at run time: anomalib lists direct subclasses of AnomalibModule only


class ExportMixin(Base):
    """anomalib's export, with the resize inside the graph: the exported model takes images in [0, 1] of any size.

    A fixed ``input_size`` need not be the size the model works at: it is the size of the images that will come, and
    they are resized as in training. Batches of any size are taken. Beside the model lie the thresholds of all
    categories (``category_thresholds.json``), if its post-processor has some; without any thresholds the exported model
    gives scores and maps alone, and a warning says so. Scores and maps of an image that holds NaN or infinity are
    infinite, and its label is defective. An earlier export is replaced when the new one is complete.
    Expects ``self.model`` of the class it is mixed into, with the frozen part under ``backbone``.
    """

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> InferenceBatch:
        """Predict images ``(B, 3, H, W)`` in [0, 1] as exported; one that holds NaN or infinity is never good.

        Inside the network this goes unseen: OpenVINO's first ReLU makes 0 of NaN. So does the overflow of values that
        are beyond all pixels.
        """
        finite = (batch.flatten(1).abs() <= torch.finfo(torch.float16).max).all(dim=1)  # no comparison holds for NaN
        return never_good(super().forward(batch, *args, **kwargs), finite)

    def check_exportable(self) -> None:
        """Refuse a model that is not trained, or whose weights are not finite.

        Raises:
            ValueError: If the model is as its constructor made it, or a weight is NaN or infinite.
        """
        check_trained(self.model)
        check_finite_weights(self.model)

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export to a pickled PyTorch model; arguments as for :meth:`anomalib.models.AnomalibModule.to_torch`.

        Raises:
            OSError: If nothing can be written below `export_root`.
            ValueError: If the model is not trained, or a weight or a threshold is not finite.
        """
        self.check_exportable()
        with complete_export(self.post_processor, export_root) as export:
            export.path = super().to_torch(export.root, model_file_name)
        self._say_exported(export.path, "float32")
        return export.path

    def to_onnx(  # type: ignore[override]  # anomalib's signature, not Lightning's
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, at the opset PyTorch's exporter is made for (anomalib's default of 14 fails noisily).

        Arguments as for :meth:`anomalib.models.AnomalibModule.to_onnx`.

        Raises:
            OSError: If nothing can be written below `export_root`.
            ValueError: If the model is not trained, or a weight or a threshold is not finite.
        """
        self.check_exportable()
        kwargs.setdefault("opset_version", 18)
        kwargs.setdefault("verbose", False)  # a line of every step
        with (
            complete_export(self.post_processor, export_root) as export,
            self.exported_network(input_size),
            quiet(*CONVERTERS),
        ):
            export.path = super().to_onnx(export.root, model_file_name, input_size, **kwargs)
        self._say_exported(export.path, "float32")
        return export.path

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO; arguments as for :meth:`anomalib.models.AnomalibModule.to_openvino`.

        ``INT8_PTQ`` is calibrated with training images of every category, see :meth:`quantize`.

        Raises:
            ModuleNotFoundError: If INT8 is asked for and NNCF is not installed.
            OSError: If nothing can be written below `export_root`.
            ValueError: If the model is not trained, a weight or a threshold is not finite, or the images cannot
                calibrate INT8.
        """
        self.check_exportable()
        if compression_type in INT8:
            check_nncf(compression_type)
        else:  # OpenVINO optimises by itself, in far less time; NNCF fails at the scalars that are left
            onnx_kwargs = {"optimize": False} | (onnx_kwargs or {})
        if compression_type in CALIBRATED:
            check_calibration(datamodule, compression_type=compression_type, input_size=input_size)
        with complete_export(self.post_processor, export_root) as export, self.exported_network(input_size):
            export.path = super().to_openvino(
                export.root,
                model_file_name,
                input_size,
                compression_type,
                datamodule,
                metric,
                task,
                max_drop,
                ov_kwargs,
                onnx_kwargs,
            )
            thresholds = exported_thresholds(self.post_processor)
            if thresholds is not None:
                _set_openvino_info(export.path, THRESHOLDS, thresholds)
        self._say_exported(export.path, WEIGHTS[compression_type])
        return export.path

    def _say_exported(self, path: Path, weights: str) -> None:
        """Print what was written and what comes next; nothing of ONNX on the way to OpenVINO.

        Args:
            path: The exported model.
            weights: Its weights, in words.
        """
        if _is_exporting.get():
            return
        files = [path, path.with_suffix(".bin"), path.with_name(f"{path.name}.data")]
        megabytes = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
        lines = [f"Exported:   {from_here(path)} ({megabytes:.1f} MB, weights in {weights})"]
        thresholds = path.with_name(f"{THRESHOLDS}.json")
        if thresholds.is_file():
            lines.append(f"Thresholds: {from_here(thresholds)}")
        else:
            lines.append("Thresholds: none of categories")
        if path.suffix != ".pt":  # what OpenVINO reads
            of_model = "" if type(self).__name__ == "UniAS" else f" --model {type(self).__name__}"
            command = f"anomalib-uniass validate-export CKPT {shlex.quote(from_here(path))} --data DIR{of_model}"
            lines.append(f"Next:       {command}")
        print("\n".join(lines))

    def exported_network(self, input_size: tuple[int, int] | None) -> AbstractContextManager[None]:
        """Return a context in which the network is the one to export for images of some size, None for any."""
        del input_size
        return nullcontext()

    def calibration_inputs(self, graph: "ov.Model", images: list[np.ndarray]) -> list[np.ndarray]:
        """Return what a graph is calibrated with: images ``(1, 3, H, W)`` as they are."""
        del graph
        return images

    def _post_training_quantization_ov(  # type: ignore[override]  # static in anomalib
        self, model: "ov.Model", datamodule: AnomalibDataModule
    ) -> "ov.Model":
        """Calibrate with training images: anomalib takes the validation images, which are few of each category."""
        return self.quantize(model, self.calibration_inputs(model, calibration_images(datamodule)))

    @staticmethod
    def quantize(model: "ov.Model", images: Sequence[np.ndarray]) -> "ov.Model":
        """Quantise an exported model to INT8 after training, as NNCF does by default.

        Args:
            model: Model in float32.
            images: Images to calibrate with, ``(1, 3, H, W)`` in [0, 1] each.
        """
        import nncf

        return nncf.quantize(model, nncf.Dataset(images), subset_size=len(images))


@dataclass
class Export:
    """An export under way."""

    root: Path
    """Folder to export to for now."""
    path: Path
    """The exported model: below `root` first, in its place in the end."""


@contextmanager
def complete_export(post_processor: nn.Module | None, export_root: Path | str) -> Iterator[Export]:
    """Let an export be written beside its place, add the thresholds, and move all files when all are written.

    Whatever fails, an earlier export stays as it was. Without thresholds a warning says so, and the exported model
    decides nothing.

    Args:
        post_processor: Post-processor of the model.
        export_root: Folder to export to, as in anomalib.

    Raises:
        OSError: If nothing can be written there; the message names the folder.
        ValueError: If a threshold is not finite.
    """
    check_decisions(post_processor)
    root = Path(export_root).resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        staging = TemporaryDirectory(prefix=".export-", dir=root)
    except OSError as error:
        msg = f"Cannot write the exported model to {root}: {error.strerror}. Give a folder that can be written to."
        raise OSError(error.errno, msg) from error
    with staging as folder, _outermost() as is_outermost, _decisions_need_thresholds(post_processor, is_outermost):
        export = Export(Path(folder), Path(folder))
        yield export
        write_thresholds(post_processor, export.path.parent)
        export.path = _move_export(export, root)


@contextmanager
def _outermost() -> Iterator[bool]:
    """Tell whether this export is not a part of another one."""
    is_outermost = not _is_exporting.get()
    token = _is_exporting.set(True)
    try:
        yield is_outermost
    finally:
        _is_exporting.reset(token)


@contextmanager
def _decisions_need_thresholds(post_processor: nn.Module | None, is_outermost: bool) -> Iterator[None]:
    """Export no labels and masks where there are no thresholds: anomalib would compare raw values with 0.5."""
    if not is_outermost or not isinstance(post_processor, PostProcessor) or not post_processor.enable_thresholding:
        yield
        return
    warn(missing_thresholds(post_processor))
    post_processor.enable_thresholding = has_thresholds(post_processor)
    try:
        yield
    finally:
        post_processor.enable_thresholding = True


def _move_export(export: Export, root: Path) -> Path:
    """Move the files of a complete export to their folder, the model last, and return its new path."""
    folder = root / export.path.parent.relative_to(export.root)
    files = sorted(export.path.parent.iterdir(), key=lambda file: file == export.path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.replace(folder / file.name)
        if f"{THRESHOLDS}.json" not in {file.name for file in files}:
            (folder / f"{THRESHOLDS}.json").unlink(missing_ok=True)  # of an earlier export
    except OSError as error:
        msg = f"Cannot write the exported model to {folder}: {error.strerror}. Give a folder that can be written to."
        raise OSError(error.errno, msg) from error
    return folder / export.path.name


def exported_thresholds(post_processor: nn.Module | None) -> str | None:
    """Return the thresholds of an exported model as JSON, or None if it has none."""
    if not isinstance(post_processor, CategoryThresholdPostProcessor):
        return None
    thresholds = post_processor.exported_thresholds()
    return None if thresholds is None else json.dumps(thresholds)


def write_thresholds(post_processor: nn.Module | None, folder: Path) -> None:
    """Write the thresholds of an exported model beside it, if there are any."""
    thresholds = exported_thresholds(post_processor)
    if thresholds is not None:
        replace_text(folder / f"{THRESHOLDS}.json", thresholds + "\n")


def calibration_images(datamodule: AnomalibDataModule) -> list[np.ndarray]:
    """Return training images to calibrate with, evenly over the categories: ``(1, 3, H, W)`` in [0, 1] each.

    Args:
        datamodule: Data that is set up; images keep the size they have on disk unless its augmentations resize.
    """
    images = datamodule.train_data
    categories = row_categories(images.samples).reset_index(drop=True)
    turn = categories.groupby(categories).cumcount()
    chosen = turn.sort_values(kind="stable").index[:CALIBRATION_IMAGES]
    return [cast("Tensor", images[int(row)].image)[None].numpy() for row in sorted(chosen)]


def check_trained(model: nn.Module) -> None:
    """Refuse a model as its constructor made it.

    No optimizer step and no checkpoint leaves every layer norm at its initial ones and zeros. Unlike a flag this needs
    no hook, and it holds for whatever loop trained the model or loaded its weights.

    Args:
        model: Network with layer norms outside of its ``backbone``, which comes with trained ones.

    Raises:
        ValueError: If all those layer norms are in their initial state.
    """
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and not name.startswith("backbone.")
    ]
    if all(bool((norm.weight == 1).all()) and not norm.bias.any() for norm in norms):
        msg = (
            f"Expected a trained {type(model).__name__} to export, got one with its initial weights: it would find no "
            "defect. Give the checkpoint of a training (--ckpt_path, or ckpt_path of Engine.export), or train first."
        )
        raise ValueError(msg)


def check_finite_weights(model: nn.Module) -> None:
    """Refuse a model that computes with NaN or infinity.

    Much of it would go unseen: OpenVINO takes the maximum of NaN and 0 for 0, so that a defect scores nothing.

    Args:
        model: Network.

    Raises:
        ValueError: If a parameter, or a buffer that checkpoints keep, is not finite; names up to five.
    """
    broken = [
        f"{name} ({int((~values.isfinite()).sum())} of {values.numel()})"
        for name, values in model.state_dict().items()
        if isinstance(values, Tensor) and values.is_floating_point() and not values.isfinite().all()
    ]
    if broken:
        msg = (
            f"Expected finite weights to export, got NaN or infinity in {some(broken)}: the "
            "training has diverged. Give an earlier checkpoint, or train with a lower learning rate."
        )
        raise ValueError(msg)


def check_nncf(compression_type: CompressionType | None) -> None:
    """Refuse INT8 where the package that makes it is missing.

    Raises:
        ModuleNotFoundError: If NNCF is not installed.
    """
    if find_spec("nncf") is None:
        msg = (
            f"Compression {CompressionType(compression_type).name} needs the package nncf, which is not installed. "
            "`pip install nncf`, or export with FP16 or without compression."
        )
        raise ModuleNotFoundError(msg, name="nncf")


def check_calibration(
    datamodule: AnomalibDataModule | None,
    *,
    compression_type: CompressionType | None,
    input_size: tuple[int, int] | None,
) -> None:
    """Refuse data that cannot calibrate INT8.

    Args:
        datamodule: Data to calibrate with; set up here, as anomalib does.
        compression_type: ``INT8_PTQ``, which takes training images, or ``INT8_ACQ``, which takes the validation images
            and tests on the test images.
        input_size: Fixed height and width of the exported model, or None if it takes any.

    Raises:
        ValueError: If there is no datamodule or no image to calibrate with (of some category), if the images have
            another size than the exported model takes, or if a batch of ``INT8_ACQ`` has a single image.
    """
    kind = CompressionType(compression_type).name
    if datamodule is None:
        msg = f"{kind} needs images to calibrate with, got no datamodule. Give --data (datamodule of Engine.export)."
        raise ValueError(msg)
    datamodule.setup("fit")
    if compression_type == CompressionType.INT8_PTQ:
        images = datamodule.train_data
    else:
        images = _validation_images(datamodule, kind)
        _check_test_batches(datamodule)
    if len(images) < CALIBRATION_IMAGES:
        fewest = row_categories(images.samples).value_counts().min()
        logger.warning(
            "%s calibrates with %d images, %d of the category with the fewest; anomalib advises %d. Compare the "
            "metrics of the exported model.",
            *(kind, len(images), fewest, CALIBRATION_IMAGES),
        )
    if input_size is not None:
        _check_calibration_sizes(images, kind, tuple(input_size))


def _validation_images(datamodule: AnomalibDataModule, kind: str) -> AnomalibDataset:
    """Return the validation images; refuse to calibrate a unified model with none of some category."""
    images = getattr(datamodule, "val_data", None)  # absent with val_split_mode="none"
    advice = "Raise val_split_ratio of the datamodule, or set its val_split_mode."
    if images is None or not len(images):
        msg = f"{kind} calibrates with the validation images; {datamodule.name} has none. {advice}"
        raise ValueError(msg)
    wanted = set(row_categories(datamodule.train_data.samples))
    if missing := sorted(wanted - set(row_categories(images.samples))):
        msg = (
            f"{kind} must calibrate a unified model with images of every category; {len(missing)} of {len(wanted)} "
            f"have no validation image: {', '.join(missing)}. {advice}"
        )
        raise ValueError(msg)
    return images


def _check_calibration_sizes(images: AnomalibDataset, kind: str, input_size: tuple[int, ...]) -> None:
    """Refuse images that a model of fixed size does not take: they keep their native size in an export."""
    for index in range(len(images)):
        item = cast("ImageItem", images[index])
        if (size := tuple(cast("Tensor", item.image).shape[-2:])) != input_size:
            msg = (
                f"{kind} with input_size {input_size} needs images of that size to calibrate with, but "
                f"{item.image_path} has {size}. Leave input_size out: the model then takes any size and resizes "
                "inside. Or give the datamodule's `augmentations` a Resize to input_size."
            )
            raise ValueError(msg)


def _check_test_batches(datamodule: AnomalibDataModule) -> None:
    """Refuse a test batch of one image, over which anomalib 2.7 fails after minutes: it squeezes its label away."""
    count, batch = len(datamodule.test_data), datamodule.eval_batch_size
    if 1 in (batch, count % batch):
        msg = (
            f"INT8_ACQ cannot test a batch of one image, which {count} test images in batches of {batch} give. "
            "Set another eval_batch_size."
        )
        raise ValueError(msg)


def _set_openvino_info(path: Path, key: str, value: str) -> None:
    """Add an entry to the runtime information of a saved OpenVINO model."""
    import openvino as ov

    model = ov.Core().read_model(path)
    model.set_rt_info(value, [key])
    with TemporaryDirectory(dir=path.parent) as folder:  # the weights are mapped from the file that is replaced
        copy = Path(folder) / path.name
        ov.save_model(model, copy, compress_to_fp16=False)  # leaves compressed weights compressed
        copy.replace(path)
        copy.with_suffix(".bin").replace(path.with_suffix(".bin"))

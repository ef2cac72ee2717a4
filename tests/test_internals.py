# SPDX-License-Identifier: Apache-2.0
"""What the package uses of other packages beyond their documented interface: an upgrade fails here, not in a run.

`PRIVATE` is complete: another test finds every leading underscore in the sources and every private method that one of
our classes overrides, and both must agree. `UNDOCUMENTED` is kept by hand: names without an underscore that no manual
promises.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import anomalib.data
import anomalib.models
import pytest
import timm
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.datasets.image import mvtecad, visa
from anomalib.deploy import CompressionType
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.models import Patchcore
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from timm.layers.conv2d_same import Conv2dSame
from timm.models.efficientnet import EfficientNetFeatures
from torch import nn

import anomalib_uniass

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, AUTOLOAD = ROOT / "anomalib_uniass", ROOT / "autoload"
AUTOLOAD_MODULE = "_anomalib_uniass_autoload"
BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "get_buffer"}
BY_METACLASS = {"_abc_impl", "_backward_cls", "_is_protocol", "_is_runtime_protocol"}
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # documented by Python


class Internal(NamedTuple):
    """Where something is found, and the parameters of a function or the type of a value."""

    find: Callable[[], object]
    expected: str | type


def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, barebones=True)


def pyramid() -> nn.Module:
    return timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(0, 1, 2, 3))


def patchcore() -> Patchcore:
    return Patchcore(backbone="resnet18", layers=["layer1"], pre_trained=False)


PRIVATE = {
    # anomalib: hooks of the datamodule that we override
    "_setup": Internal(lambda: AnomalibDataModule._setup, "self, _stage"),
    "_create_test_split": Internal(lambda: AnomalibDataModule._create_test_split, "self"),
    "_create_val_split": Internal(lambda: AnomalibDataModule._create_val_split, "self"),
    "_update_augmentations": Internal(lambda: AnomalibDataModule._update_augmentations, "self"),
    # anomalib: thresholds, their normalisation and what of them a checkpoint keeps
    "_image_threshold": Internal(lambda: PostProcessor()._image_threshold, torch.Tensor),
    "_pixel_threshold": Internal(lambda: PostProcessor()._pixel_threshold, torch.Tensor),
    "_checkpoint_config_keys": Internal(lambda: PostProcessor()._checkpoint_config_keys, tuple),
    "_normalize": Internal(lambda: PostProcessor._normalize, "preds, norm_min, norm_max, threshold"),
    # anomalib: calibration of INT8
    "_post_training_quantization_ov": Internal(
        lambda: AnomalibModule._post_training_quantization_ov, "model, datamodule"
    ),
    # Lightning: the loaders of a trainer without datamodule, before it counts them
    "_data_source": Internal(lambda: trainer().fit_loop._data_source, object),
    # Lightning: the step that a checkpoint callback saved last, and does not save again
    "_last_global_step_saved": Internal(lambda: ModelCheckpoint()._last_global_step_saved, int),
    # Lightning: the folder of a trainer, which can be given to its constructor alone
    "_default_root_dir": Internal(lambda: trainer()._default_root_dir, str),
    # Lightning: what is averaged, and how
    "_use_buffers": Internal(lambda: WeightAveraging()._use_buffers, bool),
    "_kwargs": Internal(lambda: WeightAveraging()._kwargs, dict),
    # timm: the stages behind the taps
    "_stage_out_idx": Internal(lambda: pyramid()._stage_out_idx, dict),
    # Lightning: the trainer of a model, which may have none yet
    "_trainer": Internal(lambda: LightningModule()._trainer, type(None)),
    # torch: a module's move to another device or precision, its state, and what a distributed one need not send
    "_apply": Internal(lambda: nn.Module._apply, "self, fn, recurse"),
    "_buffers": Internal(lambda: nn.Module()._buffers, dict),
    "_non_persistent_buffers_set": Internal(lambda: nn.Module()._non_persistent_buffers_set, set),
    "_save_to_state_dict": Internal(lambda: nn.Module._save_to_state_dict, "self, destination, prefix, keep_vars"),
    "_load_from_state_dict": Internal(
        lambda: nn.Module._load_from_state_dict,
        "self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs",
    ),
    "_set_params_and_buffers_to_ignore_for_model": Internal(
        lambda: nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model,
        "module, params_and_buffers_to_ignore",
    ),
}

UNDOCUMENTED = {
    # anomalib
    "ALLOWED_MODULES": Internal(lambda: anomalib.models.ALLOWED_MODULES, set),
    "CATEGORIES of MVTec AD": Internal(lambda: mvtecad.CATEGORIES, tuple),
    "CATEGORIES of VisA": Internal(lambda: visa.CATEGORIES, tuple),
    "normalize_batch": Internal(lambda: PostProcessor.normalize_batch, "self, batch"),
    "load_checkpoint_config": Internal(lambda: PostProcessor.load_checkpoint_config, "self, config"),
    "transform": Internal(lambda: PreProcessor(nn.Identity()).transform, nn.Module),  # type: ignore[arg-type]
    "setup": Internal(lambda: AnomalibDataModule.setup, "self, stage"),
    "samples": Internal(lambda: AnomalibDataset.samples, property),
    "subsample": Internal(lambda: AnomalibDataset.subsample, "self, indices, inplace"),
    "complete to_torch": Internal(lambda: AnomalibModule.to_torch, "self, export_root, model_file_name"),
    "complete to_onnx": Internal(
        lambda: AnomalibModule.to_onnx, "self, export_root, model_file_name, input_size, kwargs"
    ),
    "complete to_openvino": Internal(
        lambda: AnomalibModule.to_openvino,
        "self, export_root, model_file_name, input_size, compression_type, datamodule, metric, task, max_drop, "
        "ov_kwargs, onnx_kwargs",
    ),
    "INT8_ACQ": Internal(lambda: CompressionType.INT8_ACQ, CompressionType),
    "Patchcore.fit": Internal(lambda: Patchcore.fit, "self"),
    "embedding_store": Internal(lambda: patchcore().model.embedding_store, list),
    "memory_bank": Internal(lambda: patchcore().model.memory_bank, torch.Tensor),
    "feature_extractor": Internal(lambda: patchcore().model.feature_extractor, nn.Module),
    # Lightning
    "callbacks": Internal(lambda: trainer().callbacks, list),
    "estimated_stepping_batches": Internal(lambda: Trainer.estimated_stepping_batches, property),
    "on_validation_batch_end": Internal(
        lambda: Callback.on_validation_batch_end,
        "self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx",
    ),
    "total_batch_idx": Internal(lambda: trainer().fit_loop.total_batch_idx, int),
    "is_resuming": Internal(lambda: trainer().fit_loop.is_resuming, bool),
    "val_loop": Internal(lambda: trainer().fit_loop.epoch_loop.val_loop.run, "args, kwargs"),
    "val_loop.skip": Internal(lambda: trainer().fit_loop.epoch_loop.val_loop.skip, bool),
    "is_last_batch": Internal(lambda: trainer().is_last_batch, bool),
    "enable_validation": Internal(lambda: trainer().enable_validation, bool),
    "checkpoint_callbacks": Internal(lambda: trainer().checkpoint_callbacks, list),
    "epoch_progress": Internal(lambda: trainer().fit_loop.epoch_progress.current.completed, int),
    "epoch_loop.max_steps": Internal(lambda: trainer().fit_loop.epoch_loop.max_steps, int),
    "val_loop.restarting": Internal(lambda: trainer().fit_loop.epoch_loop.val_loop.restarting, bool),
    "received_sigterm": Internal(lambda: trainer().received_sigterm, bool),
    "SIGTERMException": Internal(lambda: SIGTERMException().code, type(None)),
    "configuration of a command": Internal(
        lambda: SaveConfigCallback, "parser, config, config_filename, overwrite, multifile, save_to_log_dir"
    ),
    "strategy.reduce_boolean_decision": Internal(lambda: trainer().strategy.reduce_boolean_decision, "decision, all"),
    "strategy.checkpoint_io": Internal(lambda: trainer().strategy.checkpoint_io, CheckpointIO),
    "predict_loop.return_predictions": Internal(lambda: trainer().predict_loop.return_predictions, bool),
    "strategy.broadcast": Internal(lambda: trainer().strategy.broadcast, "obj, src"),
    "strategy.reduce": Internal(lambda: trainer().strategy.reduce, "tensor, args, kwargs"),
    # anomalib's writer of checkpoints
    "extra_safe_globals": Internal(lambda: AnomalibCheckpointIO().extra_safe_globals, object),
    # timm
    "EfficientNetFeatures": Internal(pyramid, EfficientNetFeatures),
    "blocks": Internal(lambda: pyramid().blocks, nn.Sequential),
    "feature_info": Internal(lambda: pyramid().feature_info.reduction(), list),
    "pretrained_cfg": Internal(lambda: pyramid().pretrained_cfg, dict),
    "Conv2dSame": Internal(lambda: Conv2dSame(1, 1, 3), nn.Conv2d),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("internal", [*PRIVATE.values(), *UNDOCUMENTED.values()], ids=[*PRIVATE, *UNDOCUMENTED])
def test_internal_is_what_we_take_it_for(internal: Internal) -> None:
    found = internal.find()
    if isinstance(internal.expected, str):
        assert callable(found)
        assert ", ".join(inspect.signature(found).parameters) == internal.expected
    else:
        assert isinstance(found, internal.expected)


@pytest.mark.parametrize("loop", ["fit_loop", "predict_loop"])
def test_loaders_of_a_trainer_without_datamodule_lie_in_its_source(loop: str) -> None:
    model = torch.nn.Linear(1, 1)
    loaders = getattr(trainer(), loop)._data_source
    loaders.instance = model
    assert loaders.instance is model


def test_table_names_every_private_attribute_that_is_used() -> None:
    used = dict(private_attributes(PACKAGE)) | dict(private_overrides(package_modules()))
    unknown = {name: where for name, where in used.items() if name not in PRIVATE}
    assert unknown == {}, "do without, or add what is expected of it to PRIVATE"
    assert set(PRIVATE) - set(used) == set(), "no longer used: take it out of PRIVATE"


@pytest.mark.parametrize("folder", ["autoload", "benchmarks", "examples"])
def test_only_the_package_uses_private_attributes(folder: str) -> None:
    assert dict(private_attributes(ROOT / folder)) == {}


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "import torch._dynamo\n"
        "from lightning._hidden import thing\n"
        "from timm import _pm\n"
        "from __future__ import annotations\n"
        "class Own:\n"
        "    _own = 1\n"
        "    def __init__(self, other):\n"
        "        self._mine = other._theirs\n"
        "        other._set_by_us = self._own + self._mine + self._inherited\n"
        "        getattr(other, '_named'), other.get_buffer('_buffer'), getattr(other, 'public')\n"
        "        other.__dict__, other._asdict()\n"
    )
    found = {name for name, _ in private_attributes(tmp_path)}
    assert found == {"_dynamo", "_hidden", "_pm", "_theirs", "_set_by_us", "_inherited", "_named", "_buffer"}


def test_declared_anomalib_is_bounded_to_the_version_that_was_checked() -> None:
    installed = version("anomalib").split(".")
    bounds = re.search(r'"anomalib\[openvino\]>=(\d+)\.(\d+),<(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert bounds is not None
    low, high = tuple(map(int, bounds.groups()[:2])), tuple(map(int, bounds.groups()[2:]))
    assert low <= (int(installed[0]), int(installed[1])) < high
    assert high == (low[0], low[1] + 1), "one minor version at a time"


# --- How they are found ----------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


def private_attributes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the private names of other packages that the files of a folder read, write or import, and where."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}
    ours = [ast.parse(path.read_text()) for path in (*PACKAGE.rglob("*.py"), *AUTOLOAD.glob("*.py"))]
    own = {AUTOLOAD_MODULE, *(name for tree in (*trees.values(), *ours) for name in own_names(tree))}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.Call) and called(node) in BY_NAME:
                names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            for name in names:
                if is_private(name) and name not in own:
                    yield name, f"{path.name}:{node.lineno}"


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def own_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a file defines: functions, names of module and classes, and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def private_overrides(modules: list[ModuleType]) -> Iterator[tuple[str, str]]:
    """Yield the private names of our classes that another package's class behind them in the MRO has too."""
    for cls in (value for module in modules for value in vars(module).values() if inspect.isclass(value)):
        if is_ours(cls):
            for i, owner in enumerate(cls.__mro__):
                behind = [base for base in cls.__mro__[i + 1 :] if not is_ours(base)]
                names = [
                    name for name in vars(owner) if is_ours(owner) and is_private(name) and name not in BY_METACLASS
                ]
                yield from ((n, owner.__qualname__) for n in names if any(n in vars(base) for base in behind))


def is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "anomalib_uniass"


def package_modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(anomalib_uniass.__path__, "anomalib_uniass.")
    return [importlib.import_module(module.name) for module in found if not module.name.endswith("__main__")]

# SPDX-License-Identifier: Apache-2.0
"""Runs for test_distributed.py: a script, for Lightning starts further processes with the command line of the first."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import ReverseDistillation
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import Resize

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.metrics import CategoryMetricsCallback
from anomalib_uniass.models.unias.detector import segmentation_head

SMALL: dict[str, Any] = {
    "backbone": "resnet18",
    "pre_trained": False,
    "image_size": (128, 128),
    "hidden_dim": 32,
    "feedforward_dim": 32,
}


def engine(processes: int, folder: Path, *callbacks: Callback) -> Engine:
    return Engine(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        default_root_dir=folder,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def unified(root: Path, folder: Path) -> Unified:
    return Unified(
        root=root,
        num_workers=0,
        train_batch_size=2,
        eval_batch_size=3,
        val_split_ratio=0.4,
        comparison=folder / "comparison",
    )


def tested(runner: Engine, model: AnomalibModule, datamodule: LightningDataModule) -> dict[str, dict[str, float]]:
    runner.test(model, datamodule=datamodule)
    callbacks: list[Callback] = runner.trainer.callbacks  # type: ignore[attr-defined]
    table = next(callback.table for callback in callbacks if isinstance(callback, CategoryMetricsCallback))
    assert table is not None
    return table


def evaluate(processes: int, root: Path, folder: Path) -> dict[str, Any]:
    """Validate and test models with the same weights whatever the number of processes."""
    model, runner = UniAS(**SMALL, seed=0, visualizer=False), engine(processes, folder)
    runner.validate(model, datamodule=unified(root, folder))
    tables = {"UniAS": tested(runner, model, unified(root, folder))}
    by_tiles = UniAS(**SMALL, seed=0, tile_size=48, visualizer=False)
    tables["UniAS by tiles"] = tested(engine(processes, folder), by_tiles, unified(root, folder))

    torch.manual_seed(0)
    other = ReverseDistillation(
        "resnet18",
        ["layer1", "layer2", "layer3"],
        pre_trained=False,
        pre_processor=PreProcessor(Resize((64, 64))),
        visualizer=False,
    )
    tables["ReverseDistillation"] = tested(engine(processes, folder), other, unified(root, folder))

    parts = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/square"}
    unmasked = Folder(
        "bare", root=root / "brick", **parts, eval_batch_size=3, num_workers=0, val_split_mode="same_as_test"
    )
    tables["without masks"] = tested(engine(processes, folder), model, unmasked)
    return {"calibration": model.post_processor.calibration, "tables": tables, "processes": runner.trainer.world_size}


class Sent(Callback):
    """Keeps what each step sends to other processes besides gradients: bytes by name of the buffer."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: Trainer, *_args: object) -> None:
        wrapper = trainer.strategy.model
        assert isinstance(wrapper, DistributedDataParallel)
        self.steps.append({name: buffer.nbytes for name, buffer in wrapper.named_module_buffers.items()})


def train(processes: int, root: Path, folder: Path) -> dict[str, Any]:
    """Train and test a model whose weights differ between the processes at first, the frozen ones included."""
    segmentation_head.BATCHES = 3
    model, sent = UniAS(**SMALL, seed=None, recipe="best"), Sent()
    runner = engine(processes, folder, sent)
    start = float(model.model.backbone.network.conv1.weight.sum())
    runner.fit(model, datamodule=unified(root, folder))
    model.eval()
    result = {
        "start": start,
        "sent": sent.steps,
        "weights": {name: float(parameter.sum()) for name, parameter in model.named_parameters()},
        "buffers": {name: float(buffer.sum()) for name, buffer in model.named_buffers()},
        "checkpoint": runner.trainer.checkpoint_callback.best_model_path,  # type: ignore[union-attr]
        "folder": str(runner.trainer.default_root_dir),
    }
    by_tiles = UniAS(**SMALL, seed=0, recipe="best", tile_size=48, visualizer=False)
    engine(processes, folder).fit(by_tiles, datamodule=unified(root, folder))
    state = {name: float(value.double().sum()) for name, value in by_tiles.state_dict().items()}
    return result | {"table": tested(runner, model, unified(root, folder)), "state by tiles": state}


def main(job: str, processes: int, root: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    result = {"evaluate": evaluate, "train": train}[job](processes, root, folder)
    rank = torch.distributed.get_rank() if processes > 1 else 0
    (folder / f"{job}-{processes}-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))

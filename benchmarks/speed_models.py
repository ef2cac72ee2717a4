# SPDX-License-Identifier: Apache-2.0
"""What ``speed.py`` times: UniAS in all its forms, and other models. All weights but INT8's are random."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from speed_report import ACCELERATED, BFLOAT16, FORMS, SUMMARY, TRAINED
from torch import Tensor, nn

from anomalib_uniass import UniAD, UniAS, Unified
from anomalib_uniass.acceleration import accelerate

Predict = Callable[[Tensor], Tensor]
"""RGB images (B, 3, H, W) in [0, 1] -> raw anomaly maps (B, 1, H, W)."""

BANK_PATCHES = 20_000


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run measures.

    Args:
        device: Device of PyTorch's models.
        threads: Threads of PyTorch and of OpenVINO.
        repeats: Rounds of timings.
        sizes: Image sizes to compare, in pixels.
        use_compile: Time ``torch.compile`` too.
        others: Time other models too.
        deadline: Time of the monotonic clock after which no more is measured than must be.
        backbone: Backbone of UniAS and UniAD.
        hidden_dim: Width of UniAS.
        feedforward_dim: Width of its feed-forward layers.
        image_size: Height and width of the images.
        train_steps: Training steps to compare.
        trained: Checkpoint and dataset (MVTec AD layout) whose INT8 is timed; None leaves INT8 out.
    """

    device: torch.device
    threads: int
    repeats: int
    sizes: tuple[int, ...]
    use_compile: bool = False
    others: bool = True
    deadline: float = float("inf")
    backbone: str = "tf_efficientnet_b4.aa_in1k"
    hidden_dim: int = 256
    feedforward_dim: int = 2048
    image_size: int = 224
    train_steps: int = 20
    trained: tuple[Path, Path] | None = None

    def late(self) -> bool:
        """Tell whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def images(self, batch: int, size: int | None = None) -> Tensor:
        """Return random images in [0, 1]: ``(batch, 3, size, size)``."""
        side = size or self.image_size
        return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(self.device)


def unias(setup: Setup, form: str = ACCELERATED, *, size: int | None = None) -> UniAS:
    """Build UniAS in one of the float32 forms of `FORMS`, always with the same weights."""
    model = UniAS(
        setup.backbone,
        pre_trained=False,
        image_size=(size or setup.image_size,) * 2,
        hidden_dim=setup.hidden_dim,
        feedforward_dim=setup.feedforward_dim,
        accelerate=False,
        seed=0,
        post_processor=False,
        evaluator=False,
        visualizer=False,
    )
    nn.init.constant_(model.model.norm.bias, 1e-3)  # an initial one is refused by the export, for want of training
    accelerate(model.model, FORMS[form])
    return model.to(setup.device).eval()


def predictor(model: AnomalibModule, autocast: torch.dtype | None = None) -> Predict:
    """Return inference with a PyTorch model."""

    @torch.no_grad()
    def predict(image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, autocast, enabled=autocast is not None):
            return model(image).anomaly_map

    return predict


def of_form(setup: Setup, form: str) -> Predict:
    """Return inference with UniAS in one of its forms."""
    return predictor(unias(setup, form))


def compiled(setup: Setup) -> Predict:
    """Return inference with the compiled model, compiled anew for every batch size."""
    if not setup.use_compile:
        msg = "takes minutes to compile; pass --compile"
        raise RuntimeError(msg)
    model = unias(setup)
    model.model.compile(dynamic=False)
    return predictor(model)


def openvino(setup: Setup, folder: Path, precision: str, *, fixed: bool = False) -> Predict:
    """Return inference with the model as anomalib exports it by default, for any batch and image size.

    With `fixed` it is compiled for the shape of the images instead, anew for every batch size.
    """
    path = folder / "weights" / "openvino" / "model.xml"
    if not path.exists():
        unias(setup).to_openvino(folder)
    return runtime(setup, path, precision, fixed=fixed)


def trained(setup: Setup) -> UniAS:
    """Load the plain form of the trained model.

    Raises:
        RuntimeError: If there is none.
    """
    if setup.trained is None:
        msg = "needs a trained model: --trained CHECKPOINT DATA"
        raise RuntimeError(msg)
    checkpoint, _ = setup.trained
    model = UniAS.load_from_checkpoint(checkpoint, accelerate=False, evaluator=False, visualizer=False)
    return model.to(setup.device).eval()


def trained_int8(setup: Setup, folder: Path) -> Predict:
    """Return inference with the INT8 export of the trained model, calibrated on its training images."""
    model = trained(setup)
    data = Unified(root=setup.trained[1], train_batch_size=8, eval_batch_size=1, num_workers=0)  # type: ignore[index]
    Engine(default_root_dir=folder).export(
        model, ExportType.OPENVINO, export_root=folder, compression_type=CompressionType.INT8_PTQ, datamodule=data
    )
    return runtime(setup, folder / "weights" / "openvino" / "model.xml", "f32")


def runtime(setup: Setup, path: Path, precision: str, *, fixed: bool = False) -> Predict:
    """Return inference with an exported model by OpenVINO.

    Raises:
        RuntimeError: If PyTorch's models run on a GPU.
    """
    import openvino as ov

    if setup.device.type != "cpu":
        msg = "runs on the CPU, PyTorch here does not: no ratio"
        raise RuntimeError(msg)
    core = ov.Core()
    graph = core.read_model(path)
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": setup.threads}

    @cache
    def network(batch: int | None) -> Any:
        if batch is not None:
            graph.reshape([batch, 3, setup.image_size, setup.image_size])
        return core.compile_model(graph, "CPU", options)

    def predict(image: Tensor) -> Tensor:
        return torch.from_numpy(network(len(image) if fixed else None)(image.numpy())["anomaly_map"])

    return predict


def uniad(setup: Setup) -> Predict:
    """Return inference with UniAD on the same backbone."""
    size = (setup.image_size,) * 2
    model = UniAD(
        setup.backbone, pre_trained=False, image_size=size, post_processor=False, evaluator=False, visualizer=False
    )
    return predictor(model.to(setup.device).eval())


def patchcore(setup: Setup) -> Predict:
    """Return inference with anomalib's Patchcore on a bank of random patches of the right width."""
    from anomalib.models import Patchcore

    model = Patchcore(
        pre_trained=False,
        pre_processor=Patchcore.configure_pre_processor((setup.image_size,) * 2),
        post_processor=False,
        evaluator=False,
        visualizer=False,
    )
    width = sum(model.model.feature_extractor.out_dims)
    model.model.memory_bank = torch.randn(BANK_PATCHES, width, generator=torch.Generator().manual_seed(0))
    return predictor(model.to(setup.device).eval())


def efficient_ad(setup: Setup) -> Predict:
    """Return inference with anomalib's EfficientAd-S; its constructor loads no weights."""
    from anomalib.models import EfficientAd

    model = EfficientAd(post_processor=False, evaluator=False, visualizer=False)
    return predictor(model.to(setup.device).eval())


def dinomaly() -> Predict:
    """Refuse.

    Raises:
        RuntimeError: Always.
    """
    msg = "anomalib's constructor downloads DINOv2 weights"
    raise RuntimeError(msg)


def variants(setup: Setup, folder: Path) -> dict[str, tuple[Callable[[], Predict], int]]:
    """Return how to build each variant, and its image size; the export goes to `folder`."""
    float32 = SUMMARY["openvino_f32"]
    ours: dict[str, Callable[[], Predict]] = {
        **{form: partial(of_form, setup, form) for form in FORMS},
        BFLOAT16: lambda: predictor(unias(setup), torch.bfloat16),
        "UniAS accelerated, torch.compile": partial(compiled, setup),
        float32: partial(openvino, setup, folder, "f32"),
        f"{float32}, fixed shape": partial(openvino, setup, folder, "f32", fixed=True),
        SUMMARY["openvino_bf16"]: partial(openvino, setup, folder, "bf16"),
        TRAINED: lambda: predictor(trained(setup)),
        SUMMARY["openvino_int8"]: partial(trained_int8, setup, folder / "int8"),
    }
    result = {name: (build, setup.image_size) for name, build in ours.items()}
    if setup.others:
        result["UniAD, float32"] = partial(uniad, setup), setup.image_size
        result[f"Patchcore, {BANK_PATCHES:,} random patches"] = partial(patchcore, setup), setup.image_size
        result["EfficientAd-S, 256 px"] = partial(efficient_ad, setup), 256
        result["Dinomaly"] = dinomaly, setup.image_size
    return result

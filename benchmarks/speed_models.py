# SPDX-License-Identifier: Apache-2.0
"""What ``speed.py`` times: UniAS in all its forms, and other models for comparison. All weights are random."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components import AnomalibModule
from speed_report import BFLOAT16, FOLDED, PLAIN, SUMMARY, UNFOLDED
from torch import Tensor, nn

from anomalib_uniass import UniAD, UniAS
from anomalib_uniass.layers.feature_jitter import FeatureJitter
from anomalib_uniass.layers.transformer import AttentionLayer, FeedForwardLayer

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
        calibration_images: Random images that INT8 is calibrated on.
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
    calibration_images: int = 8

    def late(self) -> bool:
        """Tell whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def images(self, batch: int, size: int | None = None) -> Tensor:
        """Return random images in [0, 1]: ``(batch, 3, size, size)``."""
        side = size or self.image_size
        return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(self.device)


def unias(setup: Setup, form: str = FOLDED, *, size: int | None = None) -> UniAS:
    """Build UniAS in one of the three float32 forms of ``speed_report.FORMS_MEAN``, always with the same weights."""
    model = UniAS(
        setup.backbone,
        pre_trained=False,
        image_size=(size or setup.image_size,) * 2,
        hidden_dim=setup.hidden_dim,
        feedforward_dim=setup.feedforward_dim,
        seed=0,
        post_processor=False,
        evaluator=False,
        visualizer=False,
    )
    nn.init.constant_(model.model.norm.bias, 1e-3)  # an initial one is refused by the export, for want of training
    if form in (PLAIN, UNFOLDED):
        for part in (*model.model.heads, model.model.source_embedding):
            part.forward = part.plain  # type: ignore[assignment]
        model.model.pixel_decoder.folded = lambda _: {}  # type: ignore[method-assign]
        model.model.backbone.folds_ahead = False
    if form == PLAIN:
        use_pytorch_layers(model.model)
    return model.to(setup.device).eval()


def use_pytorch_layers(model: nn.Module) -> None:
    """Give a model PyTorch's own layers and layout."""
    model.to(memory_format=torch.contiguous_format)
    model.backbone.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())  # type: ignore[operator, union-attr]
    for module in model.modules():
        if isinstance(module, AttentionLayer):
            module._attend = partial(attend, module.attention)  # type: ignore[method-assign]
            module.dropout = nn.Dropout(module.dropout.p)  # type: ignore[assignment]
        elif isinstance(module, FeedForwardLayer):
            module.dropout = nn.Dropout(module.dropout.p)  # type: ignore[assignment]
            layers = (module.linear1, module.activation, module.dropout, module.linear2)
            module._transform = nn.Sequential(*layers)  # type: ignore[assignment]
        elif isinstance(module, FeatureJitter):
            module.noise = torch.randn_like  # type: ignore[method-assign]


def attend(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return attended values ``(B, N, D)``."""
    return attention(query, key, value, attn_mask=mask, need_weights=False)[0]


def predictor(model: AnomalibModule, autocast: torch.dtype | None = None) -> Predict:
    """Return inference with a PyTorch model."""

    @torch.no_grad()
    def predict(image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, autocast, enabled=autocast is not None):
            return model(image).anomaly_map

    return predict


def compiled(setup: Setup) -> Predict:
    """Return inference with the compiled model, compiled anew for every batch size."""
    if not setup.use_compile:
        msg = "takes minutes to compile; pass --compile"
        raise RuntimeError(msg)
    model = unias(setup)
    model.model.compile(dynamic=False)
    return predictor(model)


def openvino(setup: Setup, folder: Path, precision: str, *, int8: bool = False, fixed: bool = False) -> Predict:
    """Return inference with the model as anomalib exports it by default, for any batch and image size.

    With `fixed` it is compiled for the shape of the images instead, anew for every batch size.
    INT8 is calibrated on random images: good for the time alone.
    """
    import openvino as ov

    if setup.device.type != "cpu":
        msg = "runs on the CPU, PyTorch here does not: no ratio"
        raise RuntimeError(msg)
    path = folder / "weights" / "openvino" / "model.xml"
    if not path.exists():
        unias(setup).to_openvino(folder)
    core = ov.Core()
    graph = core.read_model(path)
    if int8:
        graph = UniAS.quantize(graph, [setup.images(1).numpy()] * setup.calibration_images)
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
        PLAIN: lambda: predictor(unias(setup, PLAIN)),
        UNFOLDED: lambda: predictor(unias(setup, UNFOLDED)),
        FOLDED: lambda: predictor(unias(setup)),
        BFLOAT16: lambda: predictor(unias(setup), torch.bfloat16),
        "UniAS folded, torch.compile": partial(compiled, setup),
        float32: partial(openvino, setup, folder, "f32"),
        f"{float32}, fixed shape": partial(openvino, setup, folder, "f32", fixed=True),
        SUMMARY["openvino_bf16"]: partial(openvino, setup, folder, "bf16"),
        SUMMARY["openvino_int8"]: partial(openvino, setup, folder, "f32", int8=True),
    }
    result = {name: (build, setup.image_size) for name, build in ours.items()}
    if setup.others:
        result["UniAD, float32"] = partial(uniad, setup), setup.image_size
        result[f"Patchcore, {BANK_PATCHES:,} random patches"] = partial(patchcore, setup), setup.image_size
        result["EfficientAd-S, 256 px"] = partial(efficient_ad, setup), 256
        result["Dinomaly"] = dinomaly, setup.image_size
    return result

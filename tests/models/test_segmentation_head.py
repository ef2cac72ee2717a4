# SPDX-License-Identifier: Apache-2.0
"""Segmentation head: pseudo-defects, loss, what it learns, and its place in a run."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.engine import Engine
from kornia.losses import binary_focal_loss_with_logits
from lightning.pytorch import Callback
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.models.unias.detector import segmentation_head
from anomalib_uniass.models.unias.detector.pseudo_defects import SMALLEST, add_pseudo_defects
from anomalib_uniass.models.unias.detector.residual import Residual
from anomalib_uniass.models.unias.detector.segmentation_head import SegmentationHead, segmentation_loss
from tests.helpers.datasets import make_mvtec_layout

CHANNELS = (12, 6)
TINY: dict[str, Any] = {
    "backbone": "resnet18", "pre_trained": False, "image_size": (128, 32), "hidden_dim": 32, "feedforward_dim": 32,
    "channel_branch": False, "seed": 0, "visualizer": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def surfaces(images: int, height: int = 64, width: int = 96) -> Tensor:
    return F.interpolate(torch.randn(images, 3, 8, 8), size=(height, width), mode="bicubic")


# --- Pseudo-defects ---


@pytest.mark.parametrize("batch", [1, 40])
def test_images_change_within_their_masks_alone(batch: int) -> None:
    images = surfaces(batch)
    before = images.clone()
    defective, masks = add_pseudo_defects(images)
    assert torch.equal(images, before)
    assert masks.shape == (batch, 1, 64, 96) and set(masks.unique().tolist()) <= {0.0, 1.0}
    border = F.max_pool2d(masks, 3, stride=1, padding=1).bool()  # defects have soft borders
    changed = (defective != images).any(dim=1, keepdim=True)
    assert not (changed & ~border).any()
    assert defective.isfinite().all()


def test_shares_and_sizes() -> None:
    _, masks = add_pseudo_defects(surfaces(200))
    sizes = masks.sum(dim=(1, 2, 3))
    assert ((sizes == 0) | (sizes >= SMALLEST)).all()
    assert 0.15 < (sizes == 0).float().mean() < 0.45
    areas = sizes[sizes > 0] / masks[0].numel()
    assert areas.quantile(0.1) < 0.01 and areas.quantile(0.9) > 0.03 and areas.max() < 0.6


def test_pseudo_defects_repeat_with_their_seed() -> None:
    images = surfaces(4)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(add_pseudo_defects(images)[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


# --- Loss ---


def test_loss_is_kornias_focal_loss_and_the_dice_loss_of_the_defective() -> None:
    logits, masks = torch.randn(3, 1, 16, 16), (torch.rand(3, 1, 16, 16) > 0.8).float()
    masks[1] = 0
    focal = binary_focal_loss_with_logits(logits, masks, alpha=None, gamma=2, reduction="mean")
    probabilities = logits.sigmoid()
    dice = [
        1 - (2 * (probabilities[i] * masks[i]).sum() + 1) / (probabilities[i].sum() + masks[i].sum() + 1)
        for i in (0, 2)
    ]
    torch.testing.assert_close(segmentation_loss(logits, masks), 10 * focal + sum(dice) / 2)


def test_loss_of_good_images_is_finite() -> None:
    assert segmentation_loss(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)).isfinite()


# --- Head ---


def residual(images: Tensor, good: Tensor) -> Residual:
    """Features of two levels by fixed projections, and those of the good image as if it had been reconstructed."""
    generator = torch.Generator().manual_seed(0)
    kernels = [torch.randn(c, 3, 1, 1, generator=generator) for c in CHANNELS]
    levels = [
        [F.conv2d(F.avg_pool2d(x, stride), kernel) for stride, kernel in zip((8, 4), kernels, strict=True)]
        for x in (good.expand_as(images), images)
    ]
    return Residual(images, *levels)


@dataclass
class Seen:
    """A training set of one good image."""

    good: Tensor
    steps: int

    def random_images(self, batches: int, *, size: int, what: str) -> Iterator[Tensor]:
        del what
        return (self.good.expand(size, -1, -1, -1) for _ in range(batches))

    def residual(self, images: Tensor) -> Residual:
        return residual(images, self.good)


def test_head_learns_what_a_defect_is() -> None:
    good = surfaces(1, 64, 64)
    head = SegmentationHead(CHANNELS, image_size=(64, 64))
    defective, masks = add_pseudo_defects(good.expand(40, -1, -1, -1))
    with torch.no_grad():
        before = head.logits(*residual(defective, good)[1:3])
    torch.testing.assert_close(before, before[:1, :, :1, :1].expand_as(before))
    seen = Seen(good, steps=50)
    head.learn(seen.random_images(50, size=8, what=""), seen, count=50)
    with torch.no_grad():
        after = head.logits(*residual(defective, good)[1:3])
    assert head.fitted and not any(p.requires_grad for p in head.parameters())
    ap = average_precision_score(masks.flatten().numpy(), after.flatten().numpy())
    assert ap > 0.35 > 4 * masks.mean()


def test_untrained_head_keeps_the_order_of_the_map() -> None:
    head = SegmentationHead(CHANNELS, image_size=(64, 64))
    anomaly_map = torch.rand(2, 1, 64, 64)
    levels = [torch.randn(2, c, s, s) for c, s in zip(CHANNELS, (8, 16), strict=True)]
    refined = head(anomaly_map, Residual(anomaly_map, levels, [torch.randn_like(level) for level in levels]))
    assert (refined.flatten()[anomaly_map.flatten().argsort()].diff() >= 0).all()


def test_autocast_leaves_the_head_in_float32() -> None:
    head = SegmentationHead(CHANNELS, image_size=(64, 64))
    torch.nn.init.normal_(head.classifier.weight)
    levels = [torch.randn(2, c, s, s).bfloat16() for c, s in zip(CHANNELS, (8, 16), strict=True)]
    others = [torch.randn_like(level) for level in levels]
    expected = head.logits([level.float() for level in levels], [level.float() for level in others])
    with torch.autocast("cpu", torch.bfloat16):
        actual = head.logits(levels, others)
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)


# --- Runs ---


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation_head, "BATCHES", 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mvtec_layout(tmp_path_factory.mktemp("head") / "parts", ["bolt", "cap"], train=4)


def run(root: Path, folder: Path, *callbacks: Callback, head: bool = True) -> tuple[UniAS, Engine]:
    model = UniAS(**TINY, recipe="best")
    if not head:
        del model.model.detector.parts["segmentation_head"]
    engine = Engine(
        default_root_dir=folder, accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
        callbacks=list(callbacks),
    )  # fmt: skip
    torch.manual_seed(0)
    engine.fit(model, datamodule=Unified(root=root, train_batch_size=4, eval_batch_size=4, num_workers=0))
    return model, engine


@pytest.mark.usefixtures("few_steps")
def test_the_head_comes_last_and_changes_nothing_before(root: Path, tmp_path: Path) -> None:
    model, engine = run(root, tmp_path / "with")
    plain, _ = run(root, tmp_path / "without", head=False)
    head = model.model.detector.parts["segmentation_head"]
    assert head.fitted and head.classifier.weight.any()
    states = [{k: v for k, v in m.model.state_dict().items() if "segmentation_head" not in k} for m in (model, plain)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    loaded = UniAS.load_from_checkpoint(engine.best_model_path).eval()
    images = torch.rand(2, 3, 128, 32)
    outputs = [m.eval()(images) for m in (model, loaded)]
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    image, pixel = ([m.post_processor.calibration[kind] for m in (loaded, plain)] for kind in ("image", "pixel"))
    assert image[0] == image[1]  # scores are of the coarse levels
    assert pixel[0].keys() == pixel[1].keys() >= {"bolt", "cap"}
    assert all(pixel[0][name] != pixel[1][name] for name in ("bolt", "cap"))  # of the refined maps


@pytest.mark.usefixtures("few_steps")
def test_the_same_seed_gives_the_same_head(root: Path, tmp_path: Path) -> None:
    states = [run(root, tmp_path / name)[0].model.detector.parts["segmentation_head"] for name in "ab"]
    for a, b in zip(states[0].parameters(), states[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("few_steps")
def test_an_unfinished_run_says_that_its_head_is_not_trained(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(Callback):
        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            if trainer.state.fn == "fit" and not trainer.sanity_checking:
                raise InterruptedError

    model = UniAS(**TINY, recipe="best")
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", max_epochs=3, logger=False, callbacks=[Stop()])
    data = Unified(root=root, train_batch_size=4, eval_batch_size=4, num_workers=0)
    with pytest.raises(InterruptedError):
        engine.fit(model, datamodule=data)
    Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False).test(copy.deepcopy(model), datamodule=data)
    assert "segmentation head is not trained" in caplog.text


@pytest.mark.usefixtures("few_steps")
def test_a_run_that_goes_on_forgets_what_was_fitted_to_its_old_weights(root: Path, tmp_path: Path) -> None:
    """Else a finished run that goes on and stops early would keep statistics and head of other weights."""
    _, engine = run(root, tmp_path)
    lacks: list[list[str]] = []

    class Stop(Callback):
        def on_train_batch_start(self, _trainer: Any, model: Any, *_: Any) -> None:
            lacks.append(model.model.detector.lacks())

        def on_validation_end(self, trainer: Any, model: Any, *_: Any) -> None:
            lacks.append(model.model.detector.lacks())
            raise InterruptedError

    longer = Engine(default_root_dir=tmp_path, accelerator="cpu", max_epochs=4, logger=False, callbacks=[Stop()])
    data = Unified(root=root, train_batch_size=4, eval_batch_size=4, num_workers=0)
    with pytest.raises(InterruptedError):
        longer.fit(UniAS(**TINY, recipe="best"), datamodule=data, ckpt_path=engine.best_model_path)
    assert lacks[0] == []  # not yet: it has learned nothing
    assert [len(lack) for lack in lacks[1:]] == [2] * len(lacks[1:]) and len(lacks) > 2

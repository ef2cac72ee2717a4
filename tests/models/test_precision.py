# SPDX-License-Identifier: Apache-2.0
"""Map and score in float32 whatever computes the network, and what precisions of the trainer are taken."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.engine import Engine
from torch import Tensor, nn

from anomalib_uniass import UniAD, UniAS, Unified
from anomalib_uniass.models.unias.detector.clusters import Clusters
from anomalib_uniass.models.unias.detector.distances import CosineDistances, cosine_distance
from anomalib_uniass.models.unias.detector.residual import Residual
from anomalib_uniass.models.unias.detector.whitening import Whitening
from anomalib_uniass.models.unias.loss import ReconstructionLoss
from anomalib_uniass.models.unias.torch_model import Reconstruction, UniASModel
from tests.helpers.datasets import make_mvtec_layout
from tests.models.test_whitening import Seen

SIZE = (128, 64)
TINY: dict[str, Any] = {
    "backbone": "resnet18", "pre_trained": False, "image_size": SIZE, "hidden_dim": 32, "feedforward_dim": 32,
    "seed": 0, "visualizer": False,
}  # fmt: skip
HALVES = [torch.bfloat16, torch.float16]


def tiny(kind: str) -> UniAS | UniAD:
    if kind == "UniAD":
        return UniAD(**TINY)
    return UniAS(**TINY, recipe="best" if kind == "UniAS, best" else "paper")


MODELS = ["UniAS", "UniAS, best", "UniAD"]


def photo_like(images: int) -> Tensor:
    noise = torch.randn(images, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(noise, size=SIZE, mode="bicubic")


# --- Autocast ---


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_maps_are_those_of_float32_from_the_same_features(kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind).model.eval()
    image = photo_like(2)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        reconstruction, target, *_ = model.reconstruct(image)
        output = model(image)
        actual = _map(model, reconstruction, target, image)
    lowest = reconstruction if kind == "UniAD" else reconstruction[0]
    assert kind == "UniAS, best" or lowest.dtype == dtype  # standardisation restores in float32
    with torch.no_grad():
        wide = [
            x.float() if isinstance(x, Tensor) else [level.float() for level in x] for x in (reconstruction, target)
        ]
        expected = _map(model, *wide, image)
    assert actual.dtype == output.anomaly_map.dtype == output.pred_score.dtype == torch.float32
    assert torch.equal(actual, expected) and torch.equal(output.anomaly_map, expected)
    assert len(expected.unique()) > 0.9 * expected.numel()
    assert torch.equal(output.pred_score, _score(model, expected, wide))


def _map(model: nn.Module, reconstruction: Any, target: Any, image: Tensor) -> Tensor:
    if isinstance(model, UniASModel):
        return model.detect(Reconstruction(reconstruction, target), image).anomaly_map
    return model.anomaly_map(reconstruction, target)


def _score(model: nn.Module, anomaly_map: Tensor, wide: list[Any]) -> Tensor:
    """Return the papers' scores of the releases, and the mean of the highest pixels of the coarse levels."""
    if isinstance(model, UniASModel):
        if not model.detector.parts:
            return anomaly_map.flatten(1).std(dim=1)
        coarse, finer, *_ = model.detector.distances(model.detector.residual(anomaly_map, *wide))
        pixels = (coarse * finer).square().flatten(1)
        return pixels.topk(round(0.003 * pixels.shape[1]), dim=1).values.mean(dim=1)
    return nn.functional.avg_pool2d(anomaly_map, 16, stride=1).amax(dim=(1, 2, 3))


@pytest.mark.parametrize("dtype", HALVES)
def test_product_of_four_small_distances(dtype: torch.dtype) -> None:
    """Vectors of two channels at angles of distance 0.01, up to the rounding of their type."""
    distances = CosineDistances((32, 32))
    targets = [torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2 * 2**i, 2 * 2**i).to(dtype) for i in range(4)]
    angle = torch.tensor(0.99).acos()
    vector = torch.stack([angle.cos(), angle.sin()]).to(dtype)
    reconstructions = [vector.view(1, 2, 1, 1).expand_as(t) for t in targets]
    distance = 1 - vector[0].double() / vector.double().norm()
    with torch.autocast("cpu", dtype):
        residual = Residual(targets[0], reconstructions, targets)
        anomaly_map = distances.fuse(distances(residual), residual)
    assert float(distance) == pytest.approx(0.01, rel=0.1)
    expected = torch.full((1, 1, 32, 32), float(distance**4))
    torch.testing.assert_close(anomaly_map, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_clusters_and_whitening_ignore_autocast(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds, whitening = Clusters(64, clusters=2), Whitening((64, 8), clusters=2)
    # Clusters nearer to each other than bfloat16 tells apart at this distance from the origin.
    descriptors = 100 + 0.1 * torch.randn(8, 64, 1, 1, generator=generator)
    kinds.fit(Seen([([], [part]) for part in descriptors.split(4)], kinds))
    features = descriptors.expand(8, 64, 2, 3) + torch.zeros(8, 64, 2, 3)
    clusters = kinds(features)
    assert len(clusters.unique()) == 2
    expected = whitening(0, features, clusters)
    with torch.autocast("cpu", dtype):
        assert torch.equal(kinds(features), clusters)
        assert torch.equal(whitening(0, features, clusters), expected)
        low = whitening(0, features.to(dtype), clusters)
    assert torch.equal(low, whitening(0, features.to(dtype).float(), clusters))


@pytest.mark.parametrize("dtype", HALVES)
def test_loss_ignores_autocast(dtype: torch.dtype) -> None:
    """Squares of 300 do not exist in float16."""
    target = 300 * torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    reconstruction = (target * 1.25).requires_grad_()
    loss = ReconstructionLoss()
    expected = loss([reconstruction.float()], [target.float()])
    with torch.autocast("cpu", dtype):
        actual = loss([reconstruction], [target])
    assert actual.dtype == torch.float32 and torch.equal(actual, expected) and actual.isfinite()


@pytest.mark.parametrize("kind", MODELS)
def test_double_precision_stays(kind: str) -> None:
    """And agrees with single precision."""
    model = tiny(kind).model.eval()
    image = photo_like(1)
    single = model(image)
    output = model.double()(image.double())
    assert output.anomaly_map.dtype == output.pred_score.dtype == torch.float64
    torch.testing.assert_close(output.anomaly_map.float(), single.anomaly_map, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_model_of_bfloat16_has_a_map_of_float32(kind: str) -> None:
    model = tiny(kind).model.eval().bfloat16()
    output = model(photo_like(1).bfloat16())
    assert output.anomaly_map.dtype == output.pred_score.dtype == torch.float32
    assert output.anomaly_map.isfinite().all() and len(output.anomaly_map.unique()) > 1000


def test_compiled_model_under_autocast() -> None:
    model = tiny("UniAS").model.eval()
    image = photo_like(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(image)
        output = torch.compile(model, backend="aot_eager", dynamic=False)(image)
    assert output.anomaly_map.dtype == torch.float32
    assert len(output.anomaly_map.unique()) > 1000
    torch.testing.assert_close(output.anomaly_map, expected.anomaly_map, rtol=0.1, atol=0.01)


def test_cosine_distance_keeps_its_digits() -> None:
    """Of directions that nearly agree, in single precision and where OpenVINO computes in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 8, 8, generator=generator, dtype=torch.float64)
    for scale in (1e-3, 1e-1, 1.0, 10.0):
        y = x + scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        expected = 1 - nn.functional.cosine_similarity(x, y, dim=1)[:, None]
        torch.testing.assert_close(cosine_distance(x, y), expected, rtol=1e-9, atol=1e-15)
        single = cosine_distance(x.float(), y.float()).double()
        torch.testing.assert_close(single, expected, rtol=3e-4, atol=0)


# --- The trainer's precision ---


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mvtec_layout(tmp_path_factory.mktemp("precision") / "parts", ["a", "b"], SIZE, train=5)


def photos(root: Path) -> Unified:
    return Unified(root=root, train_batch_size=4, eval_batch_size=4, num_workers=0)


def engine(folder: Path, precision: str) -> Engine:
    return Engine(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False, max_epochs=1,
        precision=precision,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("UniAS", "bf16-mixed"), ("UniAS, best", "16-mixed"), ("UniAD", "16-mixed")],
)
def test_mixed_precision_trains_tests_predicts_and_is_loaded(
    kind: str, precision: str, root: Path, tmp_path: Path
) -> None:
    """Lightning takes bfloat16 for both on a CPU."""
    model = tiny(kind)
    run = engine(tmp_path, precision)
    run.fit(model, datamodule=photos(root))
    (mixed,) = run.test(model, datamodule=photos(root), verbose=False)
    (table,) = tmp_path.rglob("per_category.json")
    assert table.is_file() and 0 <= mixed["mean_pixel_AP"] <= 1
    calibration = model.post_processor.calibration
    assert calibration is not None and all(0 < calibration["image"][c] < float("inf") for c in "ab")

    (checkpoint,) = tmp_path.rglob("*.ckpt")
    loaded = type(model).load_from_checkpoint(checkpoint)
    assert loaded.post_processor.calibration == calibration
    predictions = {}
    for name in (precision, "32-true"):
        (batch,) = engine(tmp_path / name, name).predict(loaded, data_path=root / "a/test/square/000.png") or []
        assert batch.anomaly_map.dtype == batch.pred_score.dtype == torch.float32
        assert len(batch.anomaly_map.unique()) > 0.9 * batch.anomaly_map.numel()
        predictions[name] = batch
    maps = torch.stack([batch.anomaly_map.flatten() for batch in predictions.values()])
    assert float(torch.corrcoef(maps)[0, 1]) > 0.99
    scores = [float(batch.pred_score) for batch in predictions.values()]
    assert scores[0] == pytest.approx(scores[1], rel=0.05)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("kind", ["UniAS", "UniAD"])
def test_other_precisions_are_refused(kind: str, stage: str, precision: str, root: Path, tmp_path: Path) -> None:
    model = tiny(kind)
    with pytest.raises(ValueError, match=rf"{kind} takes .*bf16-mixed.*got {precision}.*--trainer.precision bf16-m"):
        getattr(engine(tmp_path, precision), stage)(model, datamodule=photos(root))
    assert next(model.parameters()).dtype == torch.float32  # untouched

# SPDX-License-Identifier: Apache-2.0
"""The bounded memory bank: its sample, its coreset, and what the model does with them."""

from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from anomalib.models import Patchcore
from anomalib.models.components import KCenterGreedy
from torch import Tensor

from anomalib_uniass import BoundedPatchcore, Unified
from anomalib_uniass.models.patchcore.coreset import PatchSample, k_center_greedy
from tests.helpers.datasets import make_mvtec_layout


def bank(**arguments: object) -> BoundedPatchcore:
    small = {"backbone": "resnet18", "pre_trained": False, "image_size": (64, 64), "visualizer": False}
    return BoundedPatchcore(**(small | arguments))


def sample_of(batches: list[Tensor], *, size: int, seed: int = 0) -> PatchSample:
    sample = PatchSample(size, seed=seed)
    for batch in batches:
        sample.add(batch)
        assert sample.patches is not None
        assert len(sample.patches) <= size
    return sample


def test_sample_is_spread_evenly_over_all_batches() -> None:
    # 200 samples of 20 from 100 patches: each is drawn 40 times on average, with a standard deviation of 5.7.
    patches = torch.arange(100.0).unsqueeze(1)
    batches = [*patches[:60].split(30), *patches[60:].split(7)]
    counts = torch.zeros(100)
    for seed in range(200):
        kept = sample_of(batches, size=20, seed=seed).patches
        assert kept is not None
        assert len(kept.unique()) == 20
        counts[kept.flatten().long()] += 1
    assert 15 < counts.min() <= counts.max() < 65
    assert abs(counts[:60].mean() - 40) < 3


def test_sample_keeps_everything_below_its_size_and_repeats_with_its_seed() -> None:
    batches = list(torch.rand(10, 4, generator=torch.Generator().manual_seed(0)).split(3))
    kept = sample_of(batches, size=50).patches
    assert kept is not None
    torch.testing.assert_close(kept.sort(0).values, torch.cat(batches).sort(0).values)
    first, again, other = (sample_of(batches, size=5, seed=seed).patches for seed in (1, 1, 2))
    assert torch.equal(first, again)  # type: ignore[arg-type]
    assert not torch.equal(first, other)  # type: ignore[arg-type]


def test_coreset_equals_anomalibs(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    # anomalib leaves out its random projection for inputs of another rank, and starts at random.
    monkeypatch.setattr(torch, "randint", lambda **_arguments: torch.zeros(1, dtype=torch.long))
    reference = KCenterGreedy(patches.unsqueeze(2), sampling_ratio=0.2).select_coreset_idxs()
    assert k_center_greedy(patches, 40).tolist() == reference


def test_coreset_takes_no_patch_twice() -> None:
    patches = torch.ones(8, 3) * 1000.1  # equal patches: rounding alone would decide
    assert sorted(k_center_greedy(patches, 8).tolist()) == list(range(8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Unified:
    root = make_mvtec_layout(tmp_path_factory.mktemp("data") / "parts", ["bolt", "cap"], defective=1, good=1)
    return Unified(root=root, train_batch_size=2, num_workers=0)


def test_bank_never_exceeds_its_bounds(data: Unified, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, kept = 0, []
    add = PatchSample.add

    def watch(self: PatchSample, patches: Tensor) -> None:
        nonlocal seen
        add(self, patches)
        assert self.patches is not None
        seen += len(patches)
        kept.append(len(self.patches))

    monkeypatch.setattr(PatchSample, "add", watch)
    model = bank(max_patches=150, coreset_size=12)
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False)
    engine.fit(model, datamodule=data)
    assert seen == 6 * (64 // 8) ** 2  # six of eight images train, two validate
    assert kept == [128, 150, 150]
    assert model.model.memory_bank.shape == (12, 128 + 256)
    assert model.model.embedding_store == []

    # Plain hyper-parameters and the bank come back from the checkpoint.
    checkpoint = next(tmp_path.rglob("model.ckpt"))
    loaded = BoundedPatchcore.load_from_checkpoint(checkpoint)
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded.eval()(image).anomaly_map, model.cpu().eval()(image).anomaly_map)


def test_same_maps_as_patchcore_with_the_same_bank() -> None:
    """With all patches in the bank nothing differs from anomalib's model but the road to it."""
    image = torch.randn(2, 3, 64, 64)
    ours = bank(max_patches=1000, coreset_size=1000)
    theirs = Patchcore(backbone="resnet18", pre_trained=False)
    weights = ours.model.feature_extractor.pyramid.network.state_dict()
    theirs.model.feature_extractor.feature_extractor.load_state_dict(weights, strict=False)

    theirs.model.train()(image)
    theirs.model.memory_bank = theirs.model.embedding_store.pop()
    ours.on_fit_start()
    ours.model.train()(image)
    ours.on_train_batch_end(None, None, 0)
    ours.fit()
    assert len(ours.model.memory_bank) == 2 * 64

    test = image + 0.5 * torch.randn(2, 3, 64, 64)
    expected, actual = theirs.model.eval()(test), ours.model.eval()(test)
    torch.testing.assert_close(actual.anomaly_map, expected.anomaly_map)
    torch.testing.assert_close(actual.pred_score, expected.pred_score)


def test_pre_processor_takes_the_backbones_normalisation() -> None:
    resize, normalize = bank(backbone="tf_efficientnet_lite0").pre_processor.transform.transforms
    assert list(resize.size) == [64, 64]
    # Not ImageNet's usual 0.485, 0.229 and so on.
    assert tuple(normalize.mean) == tuple(normalize.std) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_patches": 10, "coreset_size": 11}, "between 1 and max_patches=10, got 11"),
        ({"coreset_size": 0}, "coreset_size must be a whole number, at least 1"),
        ({"image_size": "64"}, "image_size must be"),
        ({"backbone": "resnet19"}, "resnet18"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bank(**arguments)


def test_validation_without_a_bank_says_so() -> None:
    with pytest.raises(RuntimeError, match="saw no training images"):
        bank().on_validation_start()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-true"])
def test_distances_are_float32_whatever_the_precision(precision: str, tmp_path: Path) -> None:
    root = make_mvtec_layout(tmp_path / "parts", ["bolt"])
    data = Unified(root=root, train_batch_size=4, eval_batch_size=4, num_workers=0)
    model = bank(coreset_size=50, max_patches=100, post_processor=False)
    maps = []
    for trainer in (precision, "32-true"):
        run = Engine(default_root_dir=tmp_path, accelerator="cpu", precision=trainer, logger=False)
        if not maps:
            run.fit(model, datamodule=data)
        maps.append(torch.cat([batch.anomaly_map for batch in run.predict(model, datamodule=data)]))
    assert model.model.memory_bank.dtype == torch.float32
    torch.testing.assert_close(*maps, rtol=0, atol=0)

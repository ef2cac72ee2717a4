# SPDX-License-Identifier: Apache-2.0
"""The torch model and its Lightning wrapper: shapes, choices, errors, checkpoints, training through the engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch._inductor import config as inductor_config
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms.v2 import Resize

from anomalib_uniass import UniAS, Unified, acceleration, load_official_checkpoint
from anomalib_uniass.acceleration import memory
from anomalib_uniass.models.unias import official
from anomalib_uniass.models.unias.detector.evenness import Evenness
from anomalib_uniass.models.unias.detector.image_score import standard_deviation, top, top_of_coarse_levels
from anomalib_uniass.models.unias.detector.residual import Residual
from anomalib_uniass.models.unias.loss import ReconstructionLoss
from anomalib_uniass.models.unias.torch_model import UniASModel
from tests.helpers.datasets import make_mvtec_layout
from tests.helpers.models import SMALL, loss_on_unseen
from tests.models.test_unias_parity import official_state_dict

TINY: dict[str, Any] = SMALL | {
    "seed": 0,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "parts"
    make_mvtec_layout(folder, ["bolt", "cap"], train=6, good=2, defective=2)
    return folder


def datamodule(root: Path, **kwargs: Any) -> Unified:
    return Unified(root=root, train_batch_size=4, eval_batch_size=4, num_workers=0, **kwargs)


def engine(folder: Path, **kwargs: Any) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, **kwargs)


@pytest.mark.parametrize("image_size", [(128, 128), (128, 192), (96, 160)])
@pytest.mark.parametrize("channel_branch", [True, False])
def test_map_and_score_have_the_size_of_the_input(image_size: tuple[int, int], channel_branch: bool) -> None:
    model = UniASModel(**{**TINY, "image_size": image_size, "channel_branch": channel_branch}).eval()
    output = model(torch.randn(2, 3, *image_size))
    assert output.anomaly_map.shape == (2, 1, *image_size)
    assert output.pred_score.shape == (2,)
    torch.testing.assert_close(output.pred_score, output.anomaly_map.std(dim=(1, 2, 3)))
    assert not output.anomaly_map.requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model_gives_the_same_map(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager map is made image by image, with summands convolved apart."""
    monkeypatch.setattr(memory, "PART_BYTES", 1)
    monkeypatch.setattr(acceleration, "LARGE_MAP", 0)
    model = UniASModel(**{**TINY, "backbone": "tf_efficientnet_lite0", "hidden_dim": 256}).eval()
    acceleration.accelerate(model)
    image = torch.randn(2, 3, 128, 128)
    expected = model(image)
    model.compile(backend=backend, dynamic=False)
    with torch.no_grad(), inductor_config.patch(freezing=True):
        output = model(image)
    assert (output.anomaly_map - expected.anomaly_map).abs().max() / expected.anomaly_map.max() < 1e-4
    torch.testing.assert_close(output.pred_score, expected.pred_score, rtol=1e-4, atol=0)


def test_image_scores_by_hand() -> None:
    ramp = torch.arange(100.0).view(1, 1, 10, 10)
    assert top(ramp).item() == 99  # 0.3 % of 100 pixels is one
    assert top(torch.arange(1000.0).view(1, 1, 20, 50)).item() == 998  # the mean of three
    assert standard_deviation(ramp, []).item() == pytest.approx(ramp.std().item())
    assert top_of_coarse_levels(ramp, [ramp, ramp, 0 * ramp, 0 * ramp]).item() == pytest.approx(99.0**4)


def test_even_maps_by_hand() -> None:
    """Products of a root mean square of 1 stay; with one of 1 / 4096 they become 8 times as large."""
    maps = torch.tensor([[0.0, 1.0], [1.0, 2.0**0.5]]).view(1, 1, 2, 2)
    maps = torch.cat([maps, maps / 4096]) ** (1 / 4)
    even = even_out(maps) ** 4
    torch.testing.assert_close(even[0], maps[0] ** 4)
    torch.testing.assert_close(even[1], maps[0] ** 4 / 4096 * 8)
    assert torch.equal(even_out(torch.zeros(1, 1, 2, 2)), torch.zeros(1, 1, 2, 2))
    assert even_out(torch.full((1, 1, 2, 2), 1e-30)).isfinite().all()
    torch.testing.assert_close(even_out(maps.half()).float(), even_out(maps), rtol=2e-3, atol=0)


def even_out(distance: torch.Tensor) -> torch.Tensor:
    return Evenness(levels=4)(distance, Residual(distance, [], []))


def test_loss_terms_by_hand() -> None:
    r, t = [torch.tensor([[[[1.0]], [[0.0]]]])], [torch.tensor([[[[0.0]], [[2.0]]]])]  # orthogonal, MSE 2.5
    assert ReconstructionLoss(weight=1)(r, t).item() == pytest.approx(3.5)
    assert ReconstructionLoss(weight=1, cosine_term="release")(r, t).item() == pytest.approx(2.5)
    deviations = [torch.tensor([[[[1.0]], [[2.0]]]])]  # the second channel's error counts a quarter: MSE 1
    assert ReconstructionLoss(weight=1)(r, t, deviations).item() == pytest.approx(2)
    same = ReconstructionLoss(weight=1)(t, t).item()
    assert same == pytest.approx(0, abs=1e-6)  # the paper's sign: equal features cost nothing


def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = UniASModel(**TINY).state_dict(), UniASModel(**TINY).state_dict()
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    other = UniASModel(**{**TINY, "seed": 1}).state_dict()
    assert not torch.equal(first["query_generator.bank.weight"], other["query_generator.bank.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (225, 224)}, r"image_size must hold multiples of 16, got \(225, 224\)"),
        ({"image_size": (240, 240)}, r"15x15 = 225 tokens over 4 heads"),
        ({"image_size": (112, 112), "channel_branch": False}, "a side of the image must be larger than 112 pixels"),
        ({"hidden_dim": 100}, "hidden_dim must be a multiple of 32"),
        ({"backbone": "resnet1888"}, "backbone must be a timm model name"),
        ({"image_size": (224,)}, r"image_size must be \(height, width\)"),
        ({"recipe": "all"}, "recipe must be one of paper, best, got 'all'"),
        ({"cosine_term": "paper"}, "cosine_term must be one of distance, release"),
        ({"lr_schedule": "cosine"}, "lr_schedule must be one of step, onecycle"),
        ({"jitter_probability": 2.0}, r"jitter_probability must be a number at least 0 and at most 1"),
        ({"pre_processor": PreProcessor(Resize((64, 64)))}, r"makes images of size \(64, 64\)"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniAS(**{**TINY, **changes})


def test_best_recipe_standardises_and_compares_features_as_they_are() -> None:
    images = torch.randn(4, 3, 128, 128)
    model = UniASModel(**TINY, recipe="best").eval()
    features = model.backbone(images)
    model.standardization.fit([features])
    reconstruction = model.reconstruct(images)
    torch.testing.assert_close(reconstruction.targets[::-1], features, rtol=0, atol=0)
    for std, feature in zip(reconstruction.stds[::-1], features, strict=True):
        torch.testing.assert_close(std.flatten(), feature.std(dim=(0, 2, 3), correction=0))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected images of size \(128, 128\), got \(64, 64\)"):
        UniASModel(**TINY)(torch.zeros(1, 3, 64, 64))


def test_240_pixels_work_without_the_channel_branch() -> None:
    model = UniASModel(**{**TINY, "image_size": (240, 240), "channel_branch": False}).eval()
    assert model(torch.zeros(1, 3, 240, 240)).anomaly_map.isfinite().all()


def test_trainer_arguments_leave_the_length_to_the_command_line() -> None:
    assert "max_epochs" not in UniAS(**TINY).trainer_arguments
    assert UniAS(**TINY, max_epochs=7).trainer_arguments["max_epochs"] == 7


def test_training_moves_everything_but_the_backbone_and_learns(root: Path, tmp_path: Path) -> None:
    model = UniAS(**TINY, learning_rate=1e-3, visualizer=False)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    untrained = loss_on_unseen(model, datamodule(root))
    run = engine(tmp_path, max_epochs=8)
    run.fit(model, datamodule=datamodule(root))
    after = model.model.state_dict()
    frozen = [name for name in before if name.startswith("backbone.")]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    still = [name for name, p in model.model.named_parameters() if p.requires_grad and torch.equal(before[name], p)]
    assert not still, "parameters without a gradient"
    assert loss_on_unseen(model, datamodule(root)) < untrained / 4  # it was a twelfth when this was written


def test_checkpoint_round_trip_and_resume(root: Path, tmp_path: Path) -> None:
    data = datamodule(root)
    model = UniAS(**TINY, recipe="best", visualizer=False)
    run = engine(tmp_path, max_epochs=2)
    run.fit(model, datamodule=data)
    path = Path(run.best_model_path or "")
    loaded = UniAS.load_from_checkpoint(path)
    assert loaded.hparams.image_size == (128, 128)
    assert loaded.model.standardization is not None and loaded.model.standardization.fitted
    whitening = loaded.model.detector.distances.whitening
    assert whitening is not None and whitening.fitted
    images = torch.rand(2, 3, 96, 80)
    for a, b in zip(model.eval()(images), loaded.eval()(images), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)

    # A run that stopped goes on from its last checkpoint with the same statistics.
    again = UniAS(**{**TINY, "seed": 1}, recipe="best", visualizer=False)
    longer = engine(tmp_path, max_epochs=3)
    longer.fit(again, datamodule=data, ckpt_path=path)
    assert longer.trainer.global_step == 3 * len(data.train_dataloader())
    torch.testing.assert_close(again.model.standardization.std_2, model.model.standardization.std_2, rtol=0, atol=0)
    assert not torch.equal(
        again.model.detector.distances.whitening.whitening_0, whitening.whitening_0
    )  # of the last weights


class Stream(IterableDataset[Any]):
    """Images without numbers."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Any]:
        return iter(self.images)


@pytest.mark.parametrize("kind", ["Stream", "list", "CombinedLoader"])
def test_statistics_of_every_image_need_images_by_number(kind: str, root: Path, tmp_path: Path) -> None:
    data = datamodule(root)
    data.setup()
    loader = data.train_dataloader()
    loaders = {
        "Stream": DataLoader(Stream(loader.dataset), batch_size=4, collate_fn=loader.collate_fn),
        "list": [loader, loader],
        "CombinedLoader": CombinedLoader([loader], "sequential"),
    }
    model = UniAS(**TINY, recipe="best", visualizer=False)
    with pytest.raises(TypeError, match=f"needs one torch DataLoader of a dataset with a length, got {kind}"):
        engine(tmp_path, max_epochs=1).fit(model, train_dataloaders=loaders[kind])


def test_a_loader_of_the_user_will_do(root: Path, tmp_path: Path) -> None:
    data = datamodule(root)
    data.setup()
    model = UniAS(**TINY, recipe="best", visualizer=False)
    engine(tmp_path, max_epochs=1).fit(model, train_dataloaders=data.train_dataloader())
    assert model.model.detector.distances.whitening.fitted


def test_checkpoint_of_another_configuration_is_refused(root: Path, tmp_path: Path) -> None:
    run = engine(tmp_path, max_epochs=1)
    run.fit(UniAS(**TINY, visualizer=False), datamodule=datamodule(root))
    other = UniAS(**{**TINY, "hidden_dim": 64}, visualizer=False)
    with pytest.raises(ValueError, match=r"hidden_dim: checkpoint 32, model 64"):
        engine(tmp_path).test(other, datamodule=datamodule(root), ckpt_path=run.best_model_path)


def test_stock_single_category_datamodule_reports_pixel_ap_and_dsc(root: Path, tmp_path: Path) -> None:
    data = MVTecAD(root=root, category="bolt", train_batch_size=4, eval_batch_size=4, num_workers=0)
    run = engine(tmp_path, max_epochs=1)
    run.fit(UniAS(**TINY, visualizer=False), datamodule=data)
    (results,) = run.test(datamodule=data)
    assert {"mean_pixel_AP", "mean_DSC"} <= results.keys()


def test_official_checkpoint_file_becomes_an_anomalib_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "official.pth", tmp_path / "ours.ckpt"
    torch.save({"state_dict": official_state_dict("unias_head_h32")}, source)
    monkeypatch.setattr("sys.argv", ["official", str(source), str(target)])
    official.main()
    converted, direct = UniAS.load_from_checkpoint(target), load_official_checkpoint(source)
    torch.testing.assert_close(converted.model.state_dict(), direct.model.state_dict(), rtol=0, atol=0)
    assert converted.hparams.hidden_dim == 32

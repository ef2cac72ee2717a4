# SPDX-License-Identifier: Apache-2.0
"""What gets lost when images are resized: sizes of defects by hand, and the words before a training."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from PIL import ExifTags, Image

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.data.defect_sizes import MOST_MASKS, check_sizes, defect_sizes, say_what_gets_lost, what_gets_lost
from tests.helpers.datasets import make_mvtec_layout


def write_mask(path: Path, shape: tuple[int, int], *squares: int) -> str:
    """Write a mask with squares of these sides, side by side."""
    mask, left = np.zeros(shape, np.uint8), 0
    for side in squares:
        mask[:side, left : left + side] = 255
        left += side + 2
    Image.fromarray(mask).save(path)
    return str(path)


def frame(**masks: list[object]) -> pd.DataFrame:
    rows = [(category, path) for category, paths in masks.items() for path in paths]
    return pd.DataFrame({"category": [c for c, _ in rows], "mask_path": [p for _, p in rows], "label_index": 1})


def test_sizes_by_hand(tmp_path: Path) -> None:
    """Of images of several sizes, with several defects, several masks or none."""
    large = write_mask(tmp_path / "large.png", (1000, 2000), 100, 10)
    small = write_mask(tmp_path / "small.png", (100, 100), 50)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"x")
    samples = frame(a=[large, [small, small]], b=["", None, str(broken)], c=[write_mask(tmp_path / "c.png", (9, 9))])
    good = pd.DataFrame({"category": ["a"], "mask_path": [""], "label_index": [0]})
    sizes = defect_sizes(pd.concat([samples, good]), (100, 200))
    assert list(sizes) == ["a"]  # the others have no defect to measure
    # The large image shrinks to a tenth; the small one gets twice as wide: by the square root of two.
    np.testing.assert_allclose(sorted(sizes["a"].sides * sizes["a"].scales), [1, 10, 50 * 2**0.5, 50 * 2**0.5])
    assert sizes["a"].smaller_than(16) == 0.5 and sizes["a"].smaller_than(1) == 0
    assert sizes["a"].native == (1000, 2000)


def test_advised_size_keeps_nine_of_ten(tmp_path: Path) -> None:
    masks = [write_mask(tmp_path / f"{side}.png", (896, 896), side) for side in (20, *range(32, 42))]
    (sizes,) = defect_sizes(frame(a=list(masks)), (224, 224)).values()
    advised = sizes.advised_size((224, 224))
    assert advised is not None and advised[0] % 32 == 0
    (larger,) = defect_sizes(frame(a=list(masks)), advised).values()
    assert larger.smaller_than(16) <= 0.1 < sizes.smaller_than(16)
    (smaller,) = defect_sizes(frame(a=list(masks)), (advised[0] - 32, advised[1] - 32)).values()
    assert smaller.smaller_than(16) > 0.1
    assert larger.advised_size(advised) is None  # it is large enough
    (tiny,) = defect_sizes(frame(a=[write_mask(tmp_path / "tiny.png", (100, 100), 2)]), (224, 224)).values()
    assert tiny.advised_size((224, 224)) is None  # the image itself is too small


def test_only_some_masks_are_read(tmp_path: Path) -> None:
    masks: list[object] = [write_mask(tmp_path / f"{n}.png", (32, 32), 4) for n in range(MOST_MASKS + 1)]
    (sizes,) = defect_sizes(frame(a=masks).drop(columns="category"), (32, 32)).values()
    assert len(sizes.sides) == (MOST_MASKS + 2) // 2


def test_lost_defects_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    samples = frame(
        dust=[write_mask(tmp_path / "dust.png", (2240, 2240), 5, 200)],
        holes=[write_mask(tmp_path / "holes.png", (448, 448), 20)],
        plates=[write_mask(tmp_path / "plates.png", (224, 224), 60)],
    )
    say_what_gets_lost(samples, (224, 224))
    dust, holes = caplog.records
    assert dust.levelname == "WARNING" and holes.levelname == "INFO"
    assert "dust: at 224 x 224 pixels 50 % of 2 defects" in dust.getMessage()
    assert "50 % smaller than a pixel" in dust.getMessage()
    assert "holes: at 224 x 224 pixels 100 % of 1 defects" in holes.getMessage()
    assert "image_size [384, 384] would keep nine of ten" in holes.getMessage()


@pytest.mark.parametrize("tile_size", [None, (64, 64)])
@pytest.mark.parametrize(
    ("shape", "squares", "says"),
    [
        # One of eleven is small, whatever the tiles; then all are, in images without a pixel to spare; then the tenth.
        ((224, 224), (3, *[60] * 10), "About nine of ten stay above a token"),
        ((224, 224), (3, *[60] * 8), "About nine of ten stay above a token"),
        (
            (100, 100),
            (2, 2),
            "up to 100 x 100 pixels, fill would keep nine of ten above a token: nine of ten are at least 2",
        ),
        ((224, 300), (2,), "Photograph the parts from closer"),
    ],
)
def test_a_share_comes_with_an_advice_or_a_reason(
    shape: tuple[int, int], squares: tuple[int, ...], says: str, tile_size: tuple[int, int] | None, tmp_path: Path
) -> None:
    masks = [write_mask(tmp_path / f"{number}.png", shape, side) for number, side in enumerate(squares)]
    (loss,) = what_gets_lost(frame(a=list(masks)), (224, 224), tile_size=tile_size).values()
    assert says in loss.text
    assert "which the model reconstructs as one" in loss.text
    assert " would keep nine of ten above a token." not in loss.text


@pytest.mark.parametrize("single", [False, True])
def test_a_training_says_it_once(single: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With our datamodule and with anomalib's own of a single category."""
    root = make_mvtec_layout(tmp_path / "parts", ["bolt"], (2048, 2048), train=4, good=1, defective=1)
    for mask in root.glob("bolt/ground_truth/*/*.png"):
        write_mask(mask, (2048, 2048), 3)
    loaders = {"train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0}
    data = MVTecAD(root=root, category="bolt", **loaders) if single else Unified(root=root, **loaders)
    model = UniAS(
        backbone="resnet18", pre_trained=False, image_size=(128, 32), hidden_dim=32, feedforward_dim=32,
        channel_branch=False, visualizer=False,
    )  # fmt: skip
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, logger=False)
    engine.fit(model, datamodule=data)
    engine.test(model, datamodule=data, verbose=False)
    said = [record.getMessage() for record in caplog.records if "smaller than a token" in record.getMessage()]
    assert len(said) == 1
    assert "at 128 x 32 pixels 100 % of 1 defects" in said[0] and "100 % smaller than a pixel" in said[0]


def test_sizes_are_those_of_upright_images(tmp_path: Path) -> None:
    """Turned by EXIF, of two frames, and of a file that is none, which whoever reads it tells."""
    image = Image.new("L", (40, 30))
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "upright.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    seen: list[tuple[int, int]] = []
    paths = [str(tmp_path / name) for name in ("turned.jpg", "upright.png", "broken.png")]
    check_sizes([pd.DataFrame({"image_path": paths})], seen.append)
    assert seen == [(40, 30), (30, 40)]


def test_advised_tiles_keep_nine_of_ten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    masks = [write_mask(tmp_path / f"{side}.png", (2000, 3000), side) for side in (20, *range(32, 42))]
    (sizes,) = defect_sizes(frame(a=list(masks)), (224, 224)).values()
    tile = sizes.advised_tile((224, 224))
    assert tile == 448  # 32 pixels become 16
    (by_tiles,) = defect_sizes(frame(a=list(masks)), (224, 224), tile_size=(tile, tile)).values()
    assert by_tiles.smaller_than(16) <= 0.1
    say_what_gets_lost(frame(a=list(masks)), (224, 224))
    say_what_gets_lost(frame(a=list(masks)), (224, 224), tile_size=(tile, tile))
    whole, tiled = (record.getMessage() for record in caplog.records)
    assert "or tile_size 448 would keep nine of ten" in whole
    assert "9 % of 11 defects" in tiled and "image_size" not in tiled

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomalib_uniass.data.checks import check_samples, images_without_mask
from tests.helpers.datasets import make_mvtec_layout


def save(path: Path, height: int = 48, width: int = 32) -> str:
    noise = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
    Image.fromarray(noise).save(path)
    return str(path)


def frame(image: str, mask: object = None, *, label: int = 0, copies: int = 1) -> pd.DataFrame:
    return pd.DataFrame([{"image_path": image, "label_index": label, "mask_path": mask}] * copies)


def cut(path: str, keep: float) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(keep * len(data))])


def test_good_samples_pass(tmp_path: Path) -> None:
    png, jpg, mask = save(tmp_path / "a.png"), save(tmp_path / "b.jpg"), save(tmp_path / "m.png")
    for masks in (mask, [mask, mask]):
        samples = pd.concat([frame(png), frame(jpg, "", label=0), frame(png, masks, label=1)])
        check_samples(samples, needs_masks=True)
    check_samples(frame(png, label=1), needs_masks=False)


def test_masks_named_for_normal_images_are_not_read(tmp_path: Path) -> None:
    check_samples(frame(save(tmp_path / "a.png"), "nowhere.png", label=0), needs_masks=True)  # as BTech has them


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp"])
@pytest.mark.parametrize("keep", [0.6, 0.0])
def test_truncated_image(tmp_path: Path, name: str, keep: float) -> None:
    image = save(tmp_path / name)
    cut(image, keep)
    with pytest.raises(ValueError, match=rf"(?s)1 of 1 images cannot be used.*{name}: unreadable"):
        check_samples(frame(image), needs_masks=True)


def test_damaged_png(tmp_path: Path) -> None:
    image = Path(save(tmp_path / "a.png"))
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 255
    image.write_bytes(data)
    with pytest.raises(ValueError, match="unreadable"):
        check_samples(frame(str(image)), needs_masks=True)


def test_jpeg_with_bytes_after_its_end_passes(tmp_path: Path) -> None:
    image = Path(save(tmp_path / "a.jpg"))
    image.write_bytes(image.read_bytes() + b"\0" * 10000)
    check_samples(frame(str(image)), needs_masks=True)


@pytest.mark.parametrize("mask", [None, "", float("nan"), []])
def test_anomalous_image_without_mask(tmp_path: Path, mask: object) -> None:
    image = save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="anomalous, but has no mask"):
        check_samples(frame(image, mask, label=1), needs_masks=True)


def test_missing_files(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"m.png: missing \(mask of .*a.png\)"):
        check_samples(frame(image, str(tmp_path / "m.png"), label=1), needs_masks=True)
    with pytest.raises(ValueError, match=r"b\.png: missing"):
        check_samples(frame(str(tmp_path / "b.png")), needs_masks=True)


def test_mask_of_another_size(tmp_path: Path) -> None:
    image, mask, small = save(tmp_path / "a.png"), save(tmp_path / "m.png"), save(tmp_path / "s.png", 32, 48)
    with pytest.raises(ValueError, match=r"s.png: mask of 48x32 pixels, its image .*a.png has 32x48"):
        check_samples(frame(image, [mask, small], label=1), needs_masks=True)


def test_five_problems_are_named(tmp_path: Path) -> None:
    samples = frame(str(tmp_path / "b.png"), copies=7)
    with pytest.raises(ValueError, match=r"(?s)7 of 7 .*and 2 more") as error:
        check_samples(samples, needs_masks=True)
    assert str(error.value).count("b.png: missing") == 5


def test_images_without_mask(tmp_path: Path) -> None:
    folder = make_mvtec_layout(tmp_path, ["nut"], 16, defects=("crack", "dent")) / "nut"
    assert images_without_mask(folder) == []
    (folder / "ground_truth/dent/001_mask.png").rename(folder / "ground_truth/dent/01_mask.png")
    assert images_without_mask(folder) == [folder / "test/dent/001.png"]
    (folder / "ground_truth/dent/001").mkdir()  # MVTec LOCO has folders of masks
    assert images_without_mask(folder) == []
    assert images_without_mask(tmp_path) == []

# SPDX-License-Identifier: Apache-2.0
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.sample_data import canvases, write

SAMPLE_CATEGORIES = write.SAMPLE_CATEGORIES
write_sample_dataset = write.write_sample_dataset
SMALL = {"image_size": 64, "train": 2, "good": 1, "per_defect": 1}


def _contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("elpv_dataset")
    pytest.importorskip("skimage")
    root = tmp_path_factory.mktemp("sample") / "set"
    write_sample_dataset(root, **SMALL)
    return root


def test_layout_is_that_of_mvtec_ad(root: Path) -> None:
    assert sorted(path.name for path in root.iterdir()) == sorted([*SAMPLE_CATEGORIES, "dataset.json"])
    for category in (root / name for name in SAMPLE_CATEGORIES):
        assert sorted(path.name for path in category.iterdir()) == ["ground_truth", "test", "train"]
        assert [path.name for path in (category / "train").iterdir()] == ["good"]
        assert len(list((category / "train/good").iterdir())) == SMALL["train"]
        defects = {path.name for path in (category / "ground_truth").iterdir()}
        assert {path.name for path in (category / "test").iterdir()} == defects | {"good"}
        assert len(defects) >= 3
        for defect in defects:
            assert [path.name for path in (category / "test" / defect).iterdir()] == ["000.png"]
            assert [path.name for path in (category / "ground_truth" / defect).iterdir()] == ["000_mask.png"]


def test_masks_are_binary_neither_empty_nor_large_and_of_the_size_of_the_image(root: Path) -> None:
    masks = list(root.glob("*/ground_truth/*/*.png"))
    assert masks
    for path in masks:
        mask = _read(path)
        assert mask.shape == (64, 64)
        assert set(np.unique(mask)) == {0, 255}
        assert 0.001 <= (mask > 0).mean() <= 0.12
    assert all(_read(path).shape == (64, 64) for path in root.glob("*/t*/*/*.png"))


@pytest.mark.parametrize("name", SAMPLE_CATEGORIES)
def test_masks_cover_what_a_defect_changed_and_little_else(root: Path, name: str) -> None:
    category = write._CATEGORIES[name]
    rng = np.random.default_rng(1)
    for defect in category.defects.values():
        canvas = next(category.canvases("test", 128, rng))
        image, mask = write._draw_defect(canvas, defect, rng)
        change = np.abs(image.astype(float) - np.clip(np.rint(canvas.image), 0, 255))
        assert change[mask].mean() > 5 * change[~mask].mean()
        assert (change[~mask] >= write._VISIBLE).mean() < 0.01


def test_visible_change_closes_gaps_fills_holes_and_drops_specks() -> None:
    before = np.full((100, 100), 100, np.uint8)
    after = before.copy()
    after[20:41, 20:41] = 150
    after[25:35, 25:35] = 100  # a hole
    after[23, 21:40] = 100  # a gap
    after[80, 80] = 200  # a speck
    after[60:70, 60:70] = 105  # not visible
    expected = np.zeros((100, 100), bool)
    expected[20:41, 20:41] = True
    np.testing.assert_array_equal(write._visible_change(before, after), expected)


def test_a_defect_that_never_shows_is_an_error(root: Path) -> None:
    canvas = canvases.Canvas(np.full((64, 64), 100.0), np.ones((64, 64), bool), 1.0, {"source": "plain"})
    with pytest.raises(RuntimeError, match="No visible defect"):
        write._draw_defect(canvas, lambda canvas, rng: canvas.image, np.random.default_rng(0))


def test_train_and_test_share_no_source_pixels(root: Path) -> None:
    origins = json.loads((root / "dataset.json").read_text())["origins"]
    assert set(origins) == {path.relative_to(root).as_posix() for path in root.glob("*/t*/*/*.png")}
    pixels: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for path, origin in origins.items():
        category, split = path.split("/")[:2]
        key = next(key for key in ("rows", "columns", "cell") if key in origin)
        value = range(*origin[key]) if key != "cell" else [origin[key]]
        pixels.setdefault((category, split), set()).update((key, index) for index in value)
    for category in SAMPLE_CATEGORIES:
        assert pixels[category, "train"]
        assert not pixels[category, "train"] & pixels[category, "test"]


def test_canvases_read_only_their_own_part_of_a_photograph(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blanking the pixels of one split must not change the images of the other."""
    photo = canvases.photograph("gravel")
    expected = next(canvases.texture_canvases("gravel", "train", 64, np.random.default_rng(0))).image
    blanked = photo.copy()
    blanked[:, canvases._TEXTURE_SPLIT_COLUMN :] = 0
    monkeypatch.setattr(canvases, "photograph", lambda name: blanked)
    actual = next(canvases.texture_canvases("gravel", "train", 64, np.random.default_rng(0))).image
    np.testing.assert_array_equal(actual, expected)


def test_solar_cells_are_defect_free_and_modules_do_not_overlap(root: Path) -> None:
    from elpv_dataset.utils import load_dataset

    _, probabilities, _ = load_dataset()
    assert all(probabilities[index] == 0 for index in canvases._good_cells())
    indices = [index for module in canvases._MODULES.values() for index in range(*module)]
    assert len(indices) == len(set(indices))


def test_same_seed_same_bytes_and_other_seed_other_images(root: Path, tmp_path: Path) -> None:
    write_sample_dataset(tmp_path / "again", **SMALL)
    assert _contents(tmp_path / "again") == _contents(root)
    write_sample_dataset(tmp_path / "other", **SMALL, seed=1)
    assert _contents(tmp_path / "other") != _contents(root)


def test_a_complete_set_is_kept_and_another_one_is_not_overwritten(root: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    write_sample_dataset(root, **SMALL)
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(FileExistsError, match="delete it or choose another folder"):
        write_sample_dataset(root, **SMALL, seed=7)


def test_other_files_are_not_taken_for_a_set(tmp_path: Path) -> None:
    (tmp_path / "brick").mkdir()
    with pytest.raises(FileExistsError, match=r"without a readable dataset\.json"):
        write_sample_dataset(tmp_path, **SMALL)


def test_an_interrupted_write_leaves_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = write._save, []

    def interrupted(image: np.ndarray, path: Path) -> None:
        if len(saved) == 10:
            raise KeyboardInterrupt
        saved.append(path)
        save(image, path)

    monkeypatch.setattr(write, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_sample_dataset(tmp_path / "set", **SMALL)
    assert len(saved) == 10
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(write, "_save", save)
    (tmp_path / "set").mkdir()  # an empty folder is fine
    write_sample_dataset(tmp_path / "set", **SMALL)
    assert _contents(tmp_path / "set") == _contents(root)


@pytest.mark.parametrize("package", ["elpv_dataset", "skimage"])
def test_a_missing_package_is_named_before_anything_is_written(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'anomalib-uniass\[demo\]'"):
        write_sample_dataset(tmp_path / "new" / "set", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["image_size", "train", "good", "per_defect", "seed"])
def test_too_small_a_number_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        write_sample_dataset(tmp_path / "set", **{**SMALL, name: -1})


def run_command(patch: pytest.MonkeyPatch, *arguments: str) -> None:
    patch.setattr(sys, "argv", ["write.py", *arguments])
    write.main()


def test_command_writes_what_the_function_does(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    run_command(monkeypatch, str(tmp_path / "set"), *options)
    assert _contents(tmp_path / "set") == _contents(root)
    assert capsys.readouterr().out == f"{tmp_path / 'set'} holds brick, coins, gravel, solar_mono, solar_poly\n"
    run_command(monkeypatch, str(tmp_path / "set"), *options, "--seed", "0")  # the same, so it is kept


def test_command_ends_with_a_message_and_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brick").mkdir()
    with pytest.raises(SystemExit, match=r"without a readable dataset\.json: delete it or choose another folder"):
        run_command(monkeypatch, str(tmp_path))
    with pytest.raises(SystemExit, match="train must be at least 1, got 0"):
        run_command(monkeypatch, str(tmp_path / "new"), "--train", "0")
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(SystemExit, match=r"pip install 'anomalib-uniass\[demo\]'"):
        run_command(monkeypatch, str(tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["brick"]

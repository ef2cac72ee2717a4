# SPDX-License-Identifier: Apache-2.0
"""Which images are held out to validate: of which files it depends, and what a resumed training makes of it."""

import logging
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from PIL import Image

from anomalib_uniass.data import Unified
from anomalib_uniass.data.splits import file_names, held_out, places, resumed, split_state
from tests.helpers.datasets import make_mvtec_layout
from tests.helpers.models import tiny_padim


def test_counts_follow_the_ratio() -> None:
    categories = ["a"] * 100 + ["b"] * 2 + ["c"] * 30
    names = [f"{category}/{i}.png" for i, category in enumerate(categories)]
    for ratio, expected in (
        (0.05, {"a": 5, "b": 1, "c": 2}),
        (0.5, {"a": 50, "b": 1, "c": 15}),
        (0.99, {"a": 99, "b": 1, "c": 29}),
    ):
        rows = held_out(categories, names, ratio=ratio, seed=1)
        assert Counter(categories[row] for row in rows) == expected
        assert rows == sorted(set(rows))
    assert held_out(categories, names, ratio=0.2, seed=1) != held_out(categories, names, ratio=0.2, seed=2)
    with pytest.raises(ValueError, match="'d' has a single training image"):
        held_out(["a", "a", "d"], names[:3], ratio=0.1, seed=0)


def test_split_is_this_one_on_every_machine() -> None:
    """The values are written down: another version, system or order of files must not change them."""
    names = [f"bolt/train/good/{i:03}" for i in range(40)]
    rows = held_out(["bolt"] * 40, names, ratio=0.2, seed=0)
    assert rows == [0, 4, 6, 7, 16, 17, 31, 32]
    # printf '0\\0bolt/train/good/000' | sha256sum
    assert places(["bolt/train/good/000"], 0).tolist() == [0x2B7C0AB9C3EDFDCF]


def test_names_are_equal_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "parts"
    (root / "Größe").mkdir(parents=True)
    (tmp_path / "link").symlink_to(root)
    composed, decomposed = (unicodedata.normalize(form, "Größe/ä") for form in ("NFC", "NFD"))
    monkeypatch.chdir(tmp_path)
    for home, path in (
        (root, root / f"{composed}.png"),
        (root, root / f"{decomposed}.tif"),
        (Path("parts"), f"parts/{decomposed}.PNG"),
        (Path("parts"), root / f"{decomposed}.tif"),
        (tmp_path / "link", root / f"{composed}.png"),
        (tmp_path / "link", tmp_path / "link" / f"{composed}.png"),
    ):
        assert file_names([path], home) == [composed]
    assert file_names(["/elsewhere/deep/good/1.b.png"], root) == ["good/1.b"]
    places(["caf\udce9.png"], 0)  # a name of another encoding


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_mvtec_layout(tmp_path / "parts", ["bolt", "nut"], 32, train=20, good=1, defective=1)


def unified(root: Path, **arguments: object) -> Unified:
    datamodule = Unified(root=root, num_workers=0, val_split_ratio=0.3, **arguments)  # type: ignore[arg-type]
    datamodule.setup()
    return datamodule


def sets(datamodule: Unified) -> tuple[set[str], set[str]]:
    return set(datamodule.train_data.samples["image_path"]), set(datamodule.val_data.samples["image_path"])


def more(root: Path, count: int) -> list[Path]:
    """Add images of a category, which differ from all others."""
    new = [root / f"nut/train/good/new{i:03}.png" for i in range(count)]
    make_mvtec_layout(root.parent / "more", ["screw"], 32, train=count)
    for path, source in zip(new, sorted((root.parent / "more/screw/train/good").iterdir()), strict=True):
        shutil.copy(source, path)
    return new


def test_one_image_more_or_less_moves_one_other_at_most(root: Path) -> None:
    train, val = sets(unified(root))
    (new,) = more(root, 1)
    after_train, after_val = sets(unified(root))
    assert len(after_val & train) + len(after_train & val) <= 1
    new.unlink()
    for path in sorted((root / "nut/train/good").iterdir()):
        moved = root / path.name
        path.rename(moved)
        after_train, after_val = sets(unified(root))
        assert len(after_val & train) + len(after_train & val) <= 1
        moved.rename(path)


def test_split_does_not_depend_on_where_the_root_lies(root: Path, tmp_path: Path) -> None:
    before = {Path(path).relative_to(root) for path in sets(unified(root))[1]}
    shutil.copytree(root, tmp_path / "else/where")
    (tmp_path / "link").symlink_to(tmp_path / "else/where")
    for other in (tmp_path / "else/where", tmp_path / "link"):
        names = file_names(sorted(sets(unified(other))[1]), other)
        assert names == sorted(path.with_suffix("").as_posix() for path in before)


def test_split_is_the_same_in_another_format_and_keeps_formats_together(root: Path) -> None:
    before = file_names(sorted(sets(unified(root))[1]), root)
    images = sorted(root.glob("*/train/good/*.png"))
    for path in images:
        Image.open(path).save(path.with_suffix(".bmp"))
    datamodule = unified(root)
    assert sorted(file_names(list(sets(datamodule)[1]), root)) == sorted(2 * before)
    for path in images:
        path.unlink()
    assert file_names(sorted(sets(unified(root))[1]), root) == before


def test_split_without_a_seed_differs_each_time(root: Path) -> None:
    torch.manual_seed(0)
    assert sets(unified(root, seed=None)) != sets(unified(root, seed=None))


# --- going on from a checkpoint ---


def engine(folder: Path, **arguments: object) -> Engine:
    quiet = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "devices": 1}
    return Engine(default_root_dir=folder, **quiet, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def checkpoint(root: Path, tmp_path: Path) -> Path:
    run = engine(tmp_path / "run", max_epochs=1)
    run.fit(tiny_padim(visualizer=False), datamodule=unified(root))
    path = tmp_path / "model.ckpt"
    run.trainer.save_checkpoint(path)
    return path


def resume(root: Path, checkpoint: Path, folder: Path, **arguments: object) -> Unified:
    datamodule = Unified(root=root, num_workers=0, **({"val_split_ratio": 0.3} | arguments))  # type: ignore[arg-type]
    engine(folder, max_epochs=2).fit(tiny_padim(visualizer=False), datamodule=datamodule, ckpt_path=checkpoint)
    return datamodule


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("anomalib_uniass.data")]


def test_resumed_training_validates_on_nothing_that_it_learned(
    root: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = sets(unified(root))
    more(root, 15)
    sorted((root / "nut/train/good").iterdir())[0].unlink()
    unrestored = sets(unified(root, seed=5))
    assert unrestored[1] & train, "without the checkpoint learned images would validate"
    with caplog.at_level(logging.WARNING):
        datamodule = resume(root, checkpoint, tmp_path / "again", seed=5, val_split_ratio=0.4)
    after_train, after_val = sets(datamodule)
    assert not after_val & train and not after_train & val
    assert after_val - val, "of the new images some validate"
    (message,) = told(caplog)
    assert "15 images are new, of which" in message and "1 are gone" in message
    assert "would change sides by today's images, seed and val_split_ratio" in message
    assert len(datamodule.train_dataloader().dataset) == len(after_train)
    assert datamodule.val_data.augmentations is not None, "of the model"


def test_resumed_training_on_the_same_images_says_nothing(
    root: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(root, tmp_path / "moved/parts")
    with caplog.at_level(logging.WARNING):
        datamodule = resume(tmp_path / "moved/parts", checkpoint, tmp_path / "again")
    assert told(caplog) == []
    assert file_names(sorted(sets(datamodule)[1]), tmp_path / "moved/parts") == file_names(
        sorted(sets(unified(root))[1]), root
    )


def test_checkpoint_that_does_not_tell_its_split_is_named(
    root: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As those of version 0.2.0."""
    content = torch.load(checkpoint, weights_only=True)
    del content["Unified"]
    torch.save(content, checkpoint)
    with caplog.at_level(logging.WARNING):
        resume(root, checkpoint, tmp_path / "again")
    (message,) = told(caplog)
    assert f"{checkpoint} does not tell which images its run learned" in message


def test_checkpoint_holds_no_names_and_few_bytes(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)["Unified"]
    assert {name: (part.dtype, len(part)) for name, part in state.items()} == {
        "training": (torch.int64, 28),
        "validation": (torch.int64, 12),
    }


def test_test_takes_no_notice_of_the_checkpoints_split(
    root: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(root / "nut")
    shutil.copytree(root / "bolt", root / "other")
    datamodule = Unified(root=root, num_workers=0, val_split_ratio=0.3)
    with caplog.at_level(logging.WARNING):
        engine(tmp_path / "again").test(tiny_padim(visualizer=False), datamodule=datamodule, ckpt_path=checkpoint)
    assert not [message for message in told(caplog) if "checkpoint" in message]


NAMES = [f"{i}.png" for i in range(6)]


@pytest.mark.parametrize(
    ("training", "validation", "copies", "expected", "said"),
    [
        ("0123", "45", [], [4, 5], ""),
        ("0123", "4", [], [4, 5], "1 images are new, of which 1 validate"),
        ("012", "4", [], [4, 5], "2 images are new, of which 1 validate"),
        ("012345", "78", [], None, "were learned"),
        ("789", "012345", [], None, "were held out"),
        ("0123789", "45", [], [4, 5], "3 are gone"),
        ("789", "ab", [], [4, 5], "knew none of the training images"),
        ("012", "4", [[3, 4]], [3, 4, 5], "1 images are new, of which 1 validate; 1 would change sides"),
        ("0123", "4", [[0, 5]], [4], "1 would change sides"),
    ],
)
def test_what_a_resumed_run_makes_of_the_split(
    training: str, validation: str, copies: list[list[int]], expected: list[int] | None, said: str
) -> None:
    state = split_state([f"{i}.png" for i in training], [f"{i}.png" for i in validation])
    if expected is None:
        with pytest.raises(ValueError, match=f"All 6 training images of category 'a' {said} by the checkpoint's run"):
            resumed(["a"] * 6, NAMES, copies, [4, 5], state)
        return
    rows, changes = resumed(["a"] * 6, NAMES, copies, [4, 5], state)
    assert rows == expected
    assert said in changes and bool(changes) == bool(said)

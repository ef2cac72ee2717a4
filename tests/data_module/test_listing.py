# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are images."""

import os
import socket
import time
from pathlib import Path

import pytest

from anomalib_uniass.data import listing
from anomalib_uniass.data.listing import by_ending, holds_files, list_images
from anomalib_uniass.text import some, some_lines

IMAGES = ("a.PNG", "b.jp2", "c.gif", "deep/er/d.Tga", "deep/e.jpeg", "folder.png/f.bmp", "öäü/ß.tif")
OTHERS = ("a.dcm", "b", "deep/c.npy", "d.png.txt")
HIDDEN = (
    "._a.png",
    ".hidden/a.png",
    "@eaDir/a.png",
    "__MACOSX/a.png",
    "deep/Thumbs.db",
    "DESKTOP.INI",
    "$RECYCLE.BIN/a.png",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*IMAGES, *OTHERS, *HIDDEN):
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "home/empty").mkdir()
    return tmp_path / "home"


def below(folder: Path, paths: list[Path]) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_visible_files_are_images_by_their_ending_or_left_out(folder: Path) -> None:
    found = list_images(folder)
    assert below(folder, found.images) == sorted(IMAGES)
    assert below(folder, found.left_out) == sorted(OTHERS)
    assert found.closed == []
    assert below(folder, list_images(folder, deep=False).images) == ["a.PNG", "b.jp2", "c.gif"]


def test_pipes_and_sockets_are_left_out_and_never_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)  # names of sockets are short
        server.bind("socket.png")
        found = list_images(folder)
    assert below(folder, found.images) == sorted(IMAGES)
    assert {"pipe.png", "link.png", "socket.png"} <= set(below(folder, found.left_out))
    assert "3 no files but pipes or the like (link.png, ...)" in by_ending(found.left_out, below=folder)


def test_each_real_folder_is_visited_once_under_its_own_name(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    (outside / "o.png").touch()
    (outside / "sub/up").symlink_to(outside)
    for name, target in {
        "0": "deep",  # sorted before its folder
        "deep/loop": ".",
        "deep/er/up": "../..",
        "deep/er/above": "../../..",
        "out": outside,
        "out again": outside,
        "broken folder": "nowhere",
    }.items():
        (folder / name).symlink_to(target)
    (folder / "self.png").symlink_to("self.png")
    (folder / "broken.jpg").symlink_to("nowhere.jpg")
    found = list_images(folder)
    assert below(folder, found.images) == sorted((*IMAGES, "broken.jpg", "self.png", "out/o.png"))
    assert set(below(folder, found.left_out)) == {*OTHERS, "broken folder"}


def test_forty_levels_of_two_links_are_two_to_the_forty_paths(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}").mkdir()
        for name in ("a", "b"):
            (tmp_path / f"{i}" / name).symlink_to(tmp_path / f"{(i + 1) % 40}")
    (tmp_path / "39/x.png").touch()
    start = time.monotonic()
    assert below(tmp_path, list_images(tmp_path / "0").images) != []
    assert holds_files(tmp_path / "0")
    assert time.monotonic() - start < 1


def test_folders_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests as root may read everything."""
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name in ("deep", "locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (folder / "locked").mkdir()
    monkeypatch.setattr(listing.os, "scandir", refuse)
    found = list_images(folder)
    assert below(folder, found.closed) == ["deep", "locked"]
    assert "a.PNG" in below(folder, found.images)
    with pytest.raises(PermissionError, match="locked"):
        list_images(folder / "locked")
    assert not holds_files(folder / "locked")


def test_folder_that_is_none(tmp_path: Path) -> None:
    assert list_images(tmp_path) == ([], [], [])
    assert not holds_files(tmp_path) and not holds_files(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="none"):
        list_images(tmp_path / "none")


def test_endings_are_counted_the_most_frequent_first() -> None:
    files = [Path("/d/a/1.dcm"), Path("/d/b/2.DCM"), Path("/d/README"), Path("/d/x.npy")]
    assert by_ending(files, below=Path("/d")) == "2 .dcm (a/1.dcm, ...), 1 .npy (x.npy), 1 without ending (README)"
    assert by_ending([Path("/e/1.x")], below=Path("/d")) == by_ending([Path("/e/1.x")]) == "1 .x (/e/1.x)"
    assert by_ending([]) == ""
    many = by_ending([Path(f"1.{i:03}") for i in range(100)])
    assert many.count("(") == 20 and many.endswith(" and 80 more")


def test_some_of_many() -> None:
    assert some([]) == ""
    assert some(range(5)) == "0, 1, 2, 3, 4"
    assert some(range(7)) == "0, 1, 2, 3, 4 and 2 more"
    assert some_lines(["a", "b", "c"], most=2) == "  - a\n  - b\n  and 1 more"
    assert some(["caf\udce9.png"]) == "caf\\udce9.png", "a name that is not UTF-8 can be shown"


@pytest.mark.slow
def test_150_000_files_are_listed_in_seconds(tmp_path: Path) -> None:
    for i in range(150):
        (tmp_path / f"{i}").mkdir()
        for j in range(1000):
            (tmp_path / f"{i}/{j}.png").touch()
    start = time.monotonic()
    assert len(list_images(tmp_path).images) == 150_000
    assert time.monotonic() - start < 20

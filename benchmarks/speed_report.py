# SPDX-License-Identifier: Apache-2.0
"""Results of ``speed.py``: the machine, the summary of ratios, and the two files they are written to."""

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from anomalib_uniass.acceleration import REWRITES

Row = dict[str, Any]

PLAIN, ACCELERATED = "UniAS plain, float32", "UniAS accelerated, float32"
FORMS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    **{f"UniAS with {name} alone, float32": (name,) for name in REWRITES},
    ACCELERATED: tuple(REWRITES),
}
"""The forms of UniAS, and the rewrites that make each."""

FORMS_MEAN = (
    f"`{PLAIN}` is the model as the paper writes it, in PyTorch's own layers and layout, every activation kept for the "
    f"backward pass. `{ACCELERATED}` is the model as the package runs it, by all rewrites of `acceleration/`: "
    f"{', '.join(REWRITES)}. In between lies each rewrite alone, on the plain model."
)
BFLOAT16 = "UniAS accelerated, bfloat16 autocast"
TRAINED = "trained UniAS plain, float32"
SUMMARY = {
    "torch_folded": ACCELERATED,
    "openvino_f32": "UniAS accelerated, OpenVINO float32",
    "openvino_bf16": "UniAS accelerated, OpenVINO bfloat16",
    "openvino_int8": "trained UniAS, OpenVINO INT8",
}
"""Key of each ratio of inference, and its variant."""

FAST_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
PACKAGES = ("anomalib", "torch", "timm", "openvino", "nncf")
TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "inference": (
        "Inference (`speedup`: plain PyTorch float32 over the variant, of the same weights; `map_difference`: largest, "
        "over the plain map's largest value; INT8 is the export of a trained model, calibrated on its training images)",
        ("variant", "batch", "ms_per_image", "iqr_ms", "rounds", "speedup", "map_difference"),
    ),
    "training": (
        "Training step (forward, loss, backward, clipping, AdamW; `speedup`: plain float32 over the variant)",
        ("variant", "batch", "ms_per_image", "iqr_ms", "rounds", "speedup"),
    ),
    "train_memory": (
        "Peak memory of training, MiB, each form in a process of its own (`need`: on a CPU what the steps add to the "
        "resident memory of the process with its model; on a GPU all that is allocated)",
        ("variant", "batch", "before_mib", "peak_mib", "need_mib"),
    ),
    "image_size": ("Image size, batch 1", ("variant", "size", "ms_per_image", "iqr_ms", "rounds")),
    "operations": (
        "Operations (2 per multiply-add) and time, batch 1",
        ("variant", "part", "gflop", "ms"),
    ),
    "categories": (
        "Number of categories: the forward pass knows none; metrics of 120 maps of 56 x 56, per image",
        ("categories", "ms_per_image", "iqr_ms", "rounds"),
    ),
}


@dataclass
class Report:
    """Results so far.

    Args:
        path: Where they are written, without the suffix.
        results: The results by section.
        host: The machine and call of the sections to come.
    """

    path: Path
    results: Row
    host: Row = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Go on with the results of an earlier call, if there are any."""
        file = path.with_suffix(".json")
        return cls(path, json.loads(file.read_text()) if file.exists() else {"skipped": {}})

    def add(self, section: str, result: Any) -> None:
        """Take the result of a section and write both files."""
        self.results[section] = result
        self.results.setdefault("machines", {})[section] = self.host
        self.results["skipped"].pop(section, None)
        self.results["summary"] = summary(self.results)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".json").write_text(json.dumps(self.results, indent=2, allow_nan=False) + "\n")
        self.path.with_suffix(".md").write_text(markdown(self.results))

    def skip(self, what: str, reason: str | Exception) -> None:
        """Note what was not measured and why."""
        if isinstance(reason, Exception):
            reason = without_folders(f"{type(reason).__name__}: {' '.join(str(reason).split())}")
        print(f"  skipped {what}: {reason}", flush=True)
        self.results["skipped"][what] = reason


def machine(device: torch.device, threads: int) -> Row:
    """Return what the numbers depend on besides the code."""
    cpu: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        fields = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        cpu = {name.strip(): value.strip() for name, _, value in fields}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": [without_folders(argument) for argument in sys.argv[1:]],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "cpu": cpu.get("model name", platform.machine()),
        "cpu_extensions": [flag for flag in FAST_CPU_FLAGS if flag in cpu.get("flags", "").split()],
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": threads,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def without_folders(text: str) -> str:
    """Leave the name alone of every absolute path in a text: its folders say something of a machine, not of results."""
    return re.sub(r"(?<![\w.~/])/(?:[^\s/:'\"]+/)+(?=[^\s/:'\"])", ".../", text)


def summary(results: Row) -> dict[str, float | None]:
    """Return the ratios: plain PyTorch float32 over the variant, memory over the plain one; None: not measured."""
    speedup = {row["variant"]: row["speedup"] for row in results.get("inference", []) if row["batch"] == 1}
    ratios: dict[str, float | None] = {key: speedup.get(variant) for key, variant in SUMMARY.items()}
    ratios |= {"train_step_folded": None, "train_memory": None}
    if "training" in results:
        steps = {row["variant"]: row.get("speedup") for row in results["training"]["rows"]}  # of an older file: none
        ratios["train_step_folded"] = steps[ACCELERATED]
    if "train_memory" in results:
        need = {row["variant"]: row["need_mib"] for row in results["train_memory"]}
        ratios["train_memory"] = round(need[ACCELERATED] / need[PLAIN], 3)
    return ratios


def markdown(results: Row) -> str:
    """Return all results as Markdown."""
    calls: dict[str, list[str]] = {}
    for section, host in results["machines"].items():
        calls.setdefault(describe_call(host), []).append(section)
    text = [
        "# Speed",
        "\n".join(f"- {', '.join(sections)}: {host}" for host, sections in calls.items()),
        table([{"ratio": key, "value": value} for key, value in results["summary"].items()], ("ratio", "value")),
        FORMS_MEAN,
    ]
    for section, (title, columns) in TABLES.items():
        result = results.get(section)
        if result is not None:
            text += [f"## {title}", table(result if isinstance(result, list) else result["rows"], columns)]
        if result is not None and section == "training":
            differences = result["largest_relative_loss_difference"]
            text.append(
                f"Losses of the first {result['steps']} steps, without dropout and jitter, differ from those of "
                f"`{PLAIN}` by at most (relative): "
                + ", ".join(f"{difference:.1e} (`{name}`)" for name, difference in differences.items())
                + "."
            )
        if result is not None and section == "operations":
            text.append(bounds(result))
    if results["skipped"]:
        text += ["## Not measured", "\n".join(f"- {what}: {why}" for what, why in results["skipped"].items())]
    return "\n\n".join(text) + "\n"


def describe_call(host: Row) -> str:
    """Return a machine, versions and command in a line."""
    return (
        f"{host['device']}, {host['cpu']} ({', '.join(host['cpu_extensions'])}), {host['threads']} threads of "
        f"{host['cores']} cores, load {host['load']:.1f} at the start; commit {host['commit']}, {host['date']}; "
        + ", ".join(f"{name} {number}" for name, number in host["versions"].items())
        + f"; `{' '.join(['python benchmarks/speed.py', *host['arguments']])}`"
    )


def table(rows: list[Row], columns: tuple[str, ...]) -> str:
    """Return rows as a Markdown table."""
    lines = [columns, ("---",) * len(columns), *(tuple(cell(row.get(name)) for name in columns) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """Return a value as it stands in a table."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def bounds(result: Row) -> str:
    """Say in a paragraph how far operations over the matrix product's rate explain the time."""
    rate = max(result["gflops"].values())
    text = [
        f"What bounds the rest: in float32 a product of 1024 x 1024 matrices runs at {result['gflops']['matmul']:.0f} "
        f"GFLOP/s here, a 3x3 convolution of 256 channels at {result['gflops']['conv']:.0f}. The higher rate counts:"
    ]
    for variant in (PLAIN, ACCELERATED):
        parts = [row for row in result["rows"] if row["variant"] == variant]
        total = next(row for row in parts if row["part"] == "all")
        ideal = 1000 * total["gflop"] / rate
        text.append(
            f"at it, the {total['gflop']:.1f} GFLOP of {variant} take {ideal:.1f} ms, "
            f"{100 * ideal / total['ms']:.0f} % of the measured {total['ms']:.1f} ms;"
        )
    slowest = sorted((row for row in parts if row["part"] != "all"), key=lambda row: -row["ms"])[:4]
    shares = (
        f"{row['part']} ({row['ms']:.1f} ms, at {100 * 1000 * row['gflop'] / rate / row['ms']:.0f} % of the rate)"
        for row in slowest
    )
    text.append(f"most of the accelerated form's time goes to {', '.join(shares)}.")
    text.append(
        "What runs far below the rate is bound by something else than arithmetic: memory traffic, or the overhead of "
        "many small operators."
    )
    return " ".join(text)

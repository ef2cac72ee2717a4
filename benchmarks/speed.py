# SPDX-License-Identifier: Apache-2.0
"""Speed of UniAS beside anomalib's models: inference, training, memory, image size and operations, in one run.

The variants take turns, one timing each per round, so that whatever disturbs the machine hits all alike. Weights are
random, for they do not change the time. Every variant gets RGB images in [0, 1] of its own input size and runs with
resize and normalisation as anomalib's inferencers run it, up to the raw map. Results go to ``speed.json`` and
``speed.md`` (``speed_cuda.*`` on a GPU) after every section, so that a stop loses nothing.

Run on an otherwise idle machine: python benchmarks/speed.py [--device cuda] [--time-limit MINUTES]
"""

import argparse
import math
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_models import Predict, Setup, predictor, unias, variants
from speed_report import ACCELERATED, BFLOAT16, FORMS, PLAIN, TRAINED, Report, Row, machine
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anomalib_uniass.acceleration import accelerate
from anomalib_uniass.acceleration.dropout import Dropout
from anomalib_uniass.layers.feature_jitter import FeatureJitter
from anomalib_uniass.metrics import CategoryMetrics
from anomalib_uniass.training.steps import GRADIENT_CLIP

BATCHES = (1, 8)
TRAIN_BATCH = 8
MEMORY_STEPS = 3  # the first one makes the optimizer's state
WARM_UP, MIN_ROUNDS = 2, 3
SETTLE_SECONDS = 0.02  # idle threads of the last variant spin for some milliseconds and would slow the next one


def main() -> None:
    """Run all sections, each in turn."""
    start = time.monotonic()
    setup, report, sections = configure()
    torch.set_num_threads(setup.threads)
    report.host = machine(setup.device, setup.threads)
    for name in sections:
        if setup.late():
            report.skip(name, "the time limit had passed")
            continue
        print(f"{name} ...", flush=True)
        try:
            report.add(name, SECTIONS[name](setup, report))
        except Exception as error:  # one section must not stop the run
            report.skip(name, error)
    print(f"{time.monotonic() - start:.0f} s in all")
    print(report.path.with_suffix(".md").read_text())


def configure() -> tuple[Setup, Report, list[str]]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and of OpenVINO")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of timings")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 320, 448], help="image sizes, multiples of 32")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="these alone; the file's others are kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="a tiny UniAS alone, to try the benchmark out")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes minutes on a CPU")
    parser.add_argument("--trained", type=Path, nargs=2, metavar=("CHECKPOINT", "DATA"), help="to time INT8 of")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="MINUTES")
    args = parser.parse_args()
    setup = Setup(
        device=torch.device(args.device),
        threads=args.threads,
        repeats=args.repeats,
        sizes=tuple(args.sizes),
        use_compile=args.compile,
        trained=args.trained and tuple(args.trained),
        deadline=time.monotonic() + 60 * args.time_limit,
    )
    if args.quick:
        setup = replace(setup, backbone="resnet18", hidden_dim=64, feedforward_dim=32, image_size=128, sizes=(128,))
        setup = replace(setup, repeats=min(args.repeats, 2), train_steps=3, others=False)
    path = args.output / ("speed" if args.device == "cpu" else "speed_cuda")
    report = Report.load(path) if args.sections else Report(path, {"skipped": {}})
    return setup, report, args.sections or list(SECTIONS)


def interleave(calls: Mapping[str, Callable[[], object]], setup: Setup) -> dict[str, list[float]]:
    """Time every call once per round; seconds.

    A call goes ahead of each timed one: it finds caches and memory as its own variant leaves them.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    for done in range(setup.repeats):
        if done >= MIN_ROUNDS and setup.late():
            break
        for name, call in calls.items():
            call()
            seconds[name].append(timed(call, setup.device)[0])
    return seconds


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, Any]:
    """Return the seconds of a call, and its result."""
    time.sleep(SETTLE_SECONDS)
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(seconds: list[float], images: int) -> Row:
    """Return median and interquartile range per image, in milliseconds."""
    low, median, high = 1000 * np.percentile(seconds, (25, 50, 75)) / images
    return {"ms_per_image": round(median, 3), "iqr_ms": round(high - low, 3), "rounds": len(seconds)}


def speedup(base: list[float], seconds: list[float]) -> float:
    """Return the median of the ratios within the rounds: a machine that slows down for some seconds slows both."""
    return round(float(np.median(np.divide(base, seconds))), 3)


def inference(setup: Setup, report: Report) -> list[Row]:
    """Time every variant that can be built, at every batch size."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        predicts, differences = build_variants(setup, report, Path(folder))
        for name in [name for name, difference in differences.items() if not math.isfinite(difference)]:
            report.skip(f"map difference of {name}", "its map is not finite with these random weights")
            del differences[name]
        for batch in BATCHES:
            calls = {name: partial(predict, setup.images(batch, size)) for name, (predict, size) in predicts.items()}
            seconds = interleave(calls, setup)
            for name, values in seconds.items():
                row = {"variant": name, "batch": batch, **spread(values, batch)}
                base = seconds[TRAINED if name.startswith("trained") else PLAIN]
                row["speedup"] = speedup(base, values)
                rows.append({**row, "map_difference": differences.get(name)})  # None where no map compares
            report.add("inference", rows)
    return rows


def build_variants(
    setup: Setup, report: Report, folder: Path
) -> tuple[dict[str, tuple[Predict, int]], dict[str, float]]:
    """Return inference and image size of the variants, and how far UniAS' maps are from the plain form's."""
    predicts, differences = {}, {}
    reference = torch.empty(0)
    for name, (build, size) in variants(setup, folder).items():
        try:
            predict = build()
            anomaly_map = predict(setup.images(1, size)).float().cpu()
        except Exception as error:  # one variant must not stop the run
            report.skip(name, error)
            continue
        predicts[name] = predict, size
        report.results["skipped"].pop(name, None)  # by an earlier call
        if name == PLAIN:
            reference = anomaly_map
        if name.startswith("UniAS"):
            differences[name] = float((anomaly_map - reference).abs().max() / reference.abs().max())
    return predicts, differences


def train_step(setup: Setup, form: str, *, noise: bool = True) -> Callable[[int], float]:
    """Return a training step as Lightning runs it (forward, loss, backward, clipping, AdamW); it gives the loss.

    The images of step n are the same whatever the form. Dropout and jitter draw other numbers in other forms; without
    `noise` there are none.
    """
    model = unias(setup, ACCELERATED if form == BFLOAT16 else form).train()
    if not noise:
        for module in model.modules():
            if isinstance(module, nn.Dropout | Dropout):
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            elif isinstance(module, FeatureJitter):
                module.probability = 0.0
    configuration: Any = model.configure_optimizers()
    optimizer = configuration["optimizer"]

    def step(number: int) -> float:
        torch.manual_seed(number)
        image = torch.randn(TRAIN_BATCH, 3, setup.image_size, setup.image_size, device=setup.device)
        autocast = torch.autocast(setup.device.type, torch.bfloat16, enabled=form == BFLOAT16)
        with autocast:
            loss = model.loss(*model.model.reconstruct(image))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def training(setup: Setup, _: Report) -> Row:
    """Train every form beside the plain one for its time, then some for their loss curves from the same start."""
    plain_seconds: list[float] = []
    rows: list[Row] = []
    for name in (ACCELERATED, BFLOAT16, *(form for form in FORMS if form not in (PLAIN, ACCELERATED))):
        base, seconds = pair_of_train_steps(setup, name)
        plain_seconds += base
        rows.append(training_row(name, seconds, base))
    rows.insert(0, training_row(PLAIN, plain_seconds, plain_seconds))
    losses = {}
    for name in (PLAIN, ACCELERATED, BFLOAT16):
        step = train_step(setup, name, noise=False)
        losses[name] = [step(number) for number in range(setup.train_steps)]
    plain = np.array(losses[PLAIN])
    return {
        "rows": rows,
        "steps": setup.train_steps,
        "losses": losses,
        "largest_relative_loss_difference": {
            name: float((np.abs(losses[name] - plain) / plain).max()) for name in (ACCELERATED, BFLOAT16)
        },
    }


def pair_of_train_steps(setup: Setup, form: str) -> tuple[list[float], list[float]]:
    """Time a step of the plain form and of another in turn; return the seconds of both.

    No third model is in memory, for a training holds no other either.
    """
    steps = {name: train_step(setup, name) for name in (PLAIN, form)}
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(1 + setup.repeats):  # the first step makes the optimizer's state
        if number > MIN_ROUNDS and setup.late():
            break
        for name, step in steps.items():
            seconds[name].append(timed(partial(step, number), setup.device)[0])
    return seconds[PLAIN][1:], seconds[form][1:]


def training_row(form: str, seconds: list[float], base: list[float]) -> Row:
    """Return a form's row: its time, and how often it fits into the plain form's."""
    return {"variant": form, "batch": TRAIN_BATCH, **spread(seconds, TRAIN_BATCH), "speedup": speedup(base, seconds)}


def train_memory(setup: Setup, _: Report) -> list[Row]:
    """Train some steps in a process of its own per form, because a reused heap hides what a form needs."""
    rows = []
    for name in FORMS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            memory = process.submit(measure_train_memory, setup, name).result()
        rows.append({"variant": name, "batch": TRAIN_BATCH, **memory})
    return rows


def measure_train_memory(setup: Setup, form: str) -> Row:
    """Return memory before the first training step, at its peak since, and what training needs, in MiB."""
    torch.set_num_threads(setup.threads)
    step = train_step(setup, form)
    on_gpu = setup.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else resident_bytes("VmRSS")
    for number in range(MEMORY_STEPS):
        step(number)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")
    need = peak if on_gpu else peak - before  # a process holds libraries too
    sizes = {"before_mib": before, "peak_mib": peak, "need_mib": need}
    return {name: round(size / 2**20, 1) for name, size in sizes.items()}


def resident_bytes(field: str) -> int:
    """Return this process's resident memory now (VmRSS) or at most so far (VmHWM); Linux only.

    The maximum of ``getrusage`` will not do: a child process starts with its parent's.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def image_sizes(setup: Setup, report: Report) -> list[Row]:
    """Time the forms of UniAS over the image size, batch 1."""
    rows: list[Row] = []
    for size in setup.sizes:
        models = {name: unias(setup, name, size=size) for name in (PLAIN, ACCELERATED)}
        calls = {name: partial(predictor(model), setup.images(1, size)) for name, model in models.items()}
        rows += [{"variant": name, "size": size, **spread(s, 1)} for name, s in interleave(calls, setup).items()]
        report.add("image_size", rows)
    return rows


def operations(setup: Setup, _: Report) -> Row:
    """Count operations (2 per multiply-add) of the network and its parts; time them and two dense kernels."""
    matrix = torch.rand(1024, 1024, device=setup.device)
    pixels, kernel = torch.rand(1, 256, 56, 56, device=setup.device), torch.rand(256, 256, 3, 3, device=setup.device)
    products = {"matmul": partial(torch.mm, matrix, matrix), "conv": partial(torch.conv2d, pixels, kernel, padding=1)}
    work = {"matmul": 2 * 1024**3, "conv": 2 * 56**2 * 9 * 256**2}
    seconds = interleave(products, replace(setup, repeats=30))
    gflops = {name: round(float(work[name] / np.median(values) / 1e9), 1) for name, values in seconds.items()}
    image = setup.images(1)
    rows: list[Row] = []
    for name in (PLAIN, ACCELERATED):
        network = unias(setup, PLAIN).model
        # "memory" computes the same, but calls parts of the pixel decoder by themselves: hooks would not see the whole.
        accelerate(network, [rewrite for rewrite in FORMS[name] if rewrite != "memory"])
        milliseconds = part_times(network, image, setup)
        with FlopCounterMode(display=False) as counter:
            network(image)
        gflop = {path: sum(count.values()) / 1e9 for path, count in counter.get_flop_counts().items()}
        for part, duration in milliseconds.items():
            path = ".".join(filter(None, (type(network).__name__, part)))
            row = {"variant": name, "part": part or "all", "gflop": round(gflop.get(path, 0), 3)}
            rows.append({**row, "ms": round(duration, 3)})
    return {"gflops": gflops, "rows": rows}


def part_times(network: nn.Module, image: Tensor, setup: Setup) -> dict[str, float]:
    """Return the median milliseconds of a network ("") and its parts, measured with hooks."""
    parts = {"": network}
    for name, child in network.named_children():
        parts |= {f"{name}.{i}": c for i, c in enumerate(child)} if isinstance(child, nn.ModuleList) else {name: child}
    spent: Counter[str] = Counter()

    def clock(sign: int, part: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            synchronize(setup.device)
            spent[part] += sign * time.perf_counter()  # type: ignore[assignment]  # a counter of seconds

        return hook

    for part, module in parts.items():
        module.register_forward_pre_hook(clock(-1, part))
        module.register_forward_hook(clock(1, part))
    runs = []
    for _ in range(WARM_UP + setup.repeats):
        spent.clear()
        network(image)
        runs.append([1000 * spent[part] for part in parts])
    return dict(zip(parts, np.median(runs[WARM_UP:], axis=0).tolist(), strict=True))


def categories(setup: Setup, _: Report) -> list[Row]:
    """Time the metrics of a test set over the number of categories; the model's forward knows no categories."""
    images, size = 120, 56
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(images, size, size, generator=generator)
    anomalous = torch.arange(images) // 15 % 2 == 1  # some and not all of every category
    masks = anomalous[:, None, None] & maps.gt(0.9)

    def evaluate(count: int) -> None:
        metric = CategoryMetrics([str(i) for i in range(count)])
        names = [str(i % count) for i in range(images)]
        metric.update(maps, masks, maps.amax((1, 2)), anomalous, names)
        metric.compute()

    seconds = interleave({str(count): partial(evaluate, count) for count in (1, 5, 15)}, setup)
    return [{"categories": int(name), **spread(values, images)} for name, values in seconds.items()]


SECTIONS: dict[str, Callable[[Setup, Report], Any]] = {
    "train_memory": train_memory,
    "inference": inference,
    "training": training,
    "image_size": image_sizes,
    "operations": operations,
    "categories": categories,
}


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Accuracy study on the inspection benchmark: UniAS, UniAD and Patchcore on one backbone, and ablations.

Every model is trained once on all nine categories (``configs/inspection.yaml`` beside this file) and scored by the
metrics of this package. Sections: ``models``, the comparison over seeds, with learning curves, of UniAS as configured
(``best``) and of the paper on standardised features (``paper``), UniAD and the bank; ``maps``, trained UniAS without
one or all of the recipe's parts, and other image scores; ``demo``, the trainings of the demo; ``ablations``, UniAS
retrained with something changed, on fewer epochs; ``levels``, what of each level's error comes from the token grid, and
how much of a category's variety is reconstructed; ``presets``, the speed of the demo's model, trained, beside the
paper's of full size (random weights), both in OpenVINO. The summary also holds the results of ``elpv.py`` beside these.
No checkpoint is selected; the curves only show whether training had converged (without statistics of errors and
segmentation head, which come when it ends: the last point of a curve jumps). Choices are made on the development part
(``inspection_means.py``); the recipe's target and statistics were made after figures of all nine were seen.

Every finished run is kept in ``RESULTS/accuracy.json`` and not run again; an unfinished one resumes from its last
checkpoint below WORK, so the study can be made in pieces (``--minutes``).

python benchmarks/accuracy.py DATA [--sections models maps ablations] [--seeds 0 1 2] [--minutes 10]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accuracy_report import Report, Row, host
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer
from retrieval_bank import GuidedBank, RetrievalBank
from speed import interleave, speedup, spread
from speed_models import Setup, openvino, runtime
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass import BoundedPatchcore, UniAD, UniAS, Unified
from anomalib_uniass.layers.standardization import FeatureStandardization
from anomalib_uniass.metrics import CategoryMetrics, CategoryMetricsCallback
from anomalib_uniass.models.unias.detector.distances import CosineDistances
from anomalib_uniass.models.unias.detector.image_score import standard_deviation, top
from anomalib_uniass.models.unias.detector.recipes import RECIPES
from anomalib_uniass.models.unias.torch_model import Reconstruction, UniASModel

CONFIG = Path(__file__).parent / "configs" / "inspection.yaml"
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
DEMO_WRITER = Path(__file__).parent / "sample_data" / "write.py"
SECTIONS = ("models", "maps", "demo", "ablations", "levels", "presets")
UNIAD_EPOCHS = 24  # longer than UniAS: it learns more slowly and an epoch takes less
CURVE_SHARES = (0.125, 0.25, 0.5, 0.75)  # of the epochs; the last point of a curve is the test itself

Changes = dict[str, Any]
"""What is put in the place of parts of a network, by their names; None leaves a part out."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Args:
        name: Unique name, also of its folder.
        model: Class of the model.
        arguments: Its constructor's arguments.
        epochs: Length of the training; None leaves it to the model.
        changes: Tells what is changed of the network before it is trained, see :func:`change`.
    """

    name: str
    model: type[AnomalibModule]
    arguments: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    changes: Callable[[UniASModel], Changes] | None = None

    def has_ended(self, saved: dict[str, Any]) -> bool:
        """Return whether a checkpoint, or ``{}``, is that of the last of its epochs."""
        return self.epochs is not None and saved.get("epoch", -1) + 1 >= self.epochs

    def build(self) -> AnomalibModule:
        """Return the model, not trained."""
        model = self.model(**self.arguments, evaluator=False)
        if self.changes is not None:
            change(model.model, self.changes(model.model))
        return model


class LearningCurve(Callback):
    """Score the test set after some epochs, for the plot alone; resumes with the checkpoint."""

    def __init__(self, epochs: Iterable[int]) -> None:
        self.epochs = set(epochs)
        self.points: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the test set if it is time."""
        if trainer.current_epoch + 1 not in self.epochs:
            return
        pl_module.eval()
        (table,) = score(pl_module, trainer.datamodule, [lambda model, image: model.model(image)])  # type: ignore[attr-defined]
        pl_module.train()
        self.points.append({"epoch": trainer.current_epoch + 1, "pixel_AP": table["mean"]["pixel_AP"]})
        print(f"    epoch {trainer.current_epoch + 1}: pixel AP {100 * self.points[-1]['pixel_AP']:.2f} %", flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the points so far."""
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with earlier points."""
        self.points = state_dict["points"]


class StopAtDeadline(Callback):
    """Stop after the epoch in which the deadline passes.

    Lightning's ``max_time`` stops within an epoch, does not make up for the rest of it, and counts the time of earlier
    pieces too.

    Args:
        deadline: Time of the monotonic clock.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if it is time."""
        del pl_module
        trainer.should_stop = trainer.should_stop or time.monotonic() >= self.deadline


@torch.no_grad()
def score(
    model: LightningModule, datamodule: Unified, predictions: list[Callable[[Any, Tensor], Any]]
) -> list[dict[str, dict[str, float]]]:
    """Return the table of the test set for each way to make map and score from a model and normalised images."""
    samples = datamodule.test_data.samples
    category = dict(zip(samples["image_path"], samples["category"], strict=True))
    metrics = [CategoryMetrics(sorted(set(category.values()))) for _ in predictions]
    for batch in datamodule.test_dataloader():
        names = [category[path] for path in batch.image_path]
        image, mask = model.pre_processor.transform(batch.image.to(model.device), batch.gt_mask)
        for metric, predict in zip(metrics, predictions, strict=True):
            output = predict(model, image)
            metric.update(output.anomaly_map, mask, output.pred_score, batch.gt_label, names)
    return [metric.compute() for metric in metrics]


@dataclass(kw_only=True)
class Study:
    """Trains and tests, and keeps what is done.

    Args:
        root: The inspection benchmark.
        work: Folder of checkpoints.
        report: Results so far.
        deadline: Time of the monotonic clock when a training has to stop, to be resumed by the next call.
        config: Configuration of the data.
    """

    root: Path
    work: Path
    report: Report
    deadline: float
    config: Path = CONFIG

    def datamodule(self) -> Unified:
        """Return the data as the configuration has it."""
        arguments = yaml.safe_load(self.config.read_text())["data"]["init_args"]
        return Unified(**(arguments | {"root": self.root}))

    def checkpoint(self, name: str) -> Path | None:
        """Return the last checkpoint of a run."""
        found = sorted((self.work / name).rglob("model.ckpt"), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else None

    def is_trained(self, run: Run, section: str) -> bool:
        """Return whether a training has ended and left its weights; if not, say what a section lacks."""
        checkpoint = self.checkpoint(run.name)
        if checkpoint is not None and run.has_ended(torch.load(checkpoint, map_location="cpu", weights_only=False)):
            return True
        print(f"  {section} needs {run.name}, whose training has not ended below {self.work}: run it first", flush=True)
        return False

    def train(self, section: str, run: Run) -> None:
        """Train and test unless done before."""
        if run.name in self.report.rows(section):
            return
        curve = LearningCurve(round(share * run.epochs) for share in CURVE_SHARES) if run.epochs else LearningCurve(())
        datamodule = self.datamodule()
        fitted = self.fit(run, datamodule, curve)
        if fitted is None:
            return
        model, engine, facts = fitted
        engine.test(model, datamodule=datamodule, verbose=False)
        table = next(c.table for c in engine.trainer.callbacks if isinstance(c, CategoryMetricsCallback))
        self.report.add(section, run.name, table, facts | {"curve": curve.points})

    def fit(
        self, run: Run, datamodule: AnomalibDataModule, *callbacks: Callback
    ) -> tuple[AnomalibModule, Engine, dict[str, Any]] | None:
        """Train a model, or go on training it, until it is done or the deadline passes.

        Returns:
            The trained model, its engine and the facts of the run; None if it is not finished.
        """
        if time.monotonic() >= self.deadline:
            self.report.unfinished(run.name)
            return None
        print(f"  {run.name} ...", flush=True)
        model = run.build()
        checkpoint = self.checkpoint(run.name)
        length = {} if run.epochs is None else {"max_epochs": run.epochs, "check_val_every_n_epoch": 1}
        stop = StopAtDeadline(self.deadline)
        engine = Engine(default_root_dir=self.work / run.name, callbacks=[*callbacks, stop], **length)
        saved = {} if checkpoint is None else torch.load(checkpoint, map_location="cpu", weights_only=False)
        if run.has_ended(saved):  # it was trained, but not tested
            model.load_state_dict(saved["state_dict"])
            datamodule.setup()
            for callback in callbacks:
                callback.load_state_dict(saved["callbacks"].get(callback.state_key, callback.state_dict()))
            steps = saved["global_step"]
        else:
            engine.fit(model, datamodule=datamodule, ckpt_path=checkpoint)
            if run.epochs is not None and engine.trainer.current_epoch < run.epochs:
                self.report.unfinished(run.name)
                return None
            steps = engine.trainer.global_step
        facts = {
            "model": run.model.__name__,
            "arguments": run.arguments,
            "epochs": run.epochs,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "steps": steps,
        }
        return model, engine, facts

    def compare_maps(self, run: Run) -> None:
        """Score other maps and image scores of a trained UniAS, each with one thing changed."""
        if "as configured" in self.report.rows("maps") or not self.is_trained(run, "maps"):
            return
        print("  maps ...", flush=True)
        model, datamodule = self.trained(run)
        variants = {"as configured": model.model.detect} | map_variants(model.model)
        tables = score(model, datamodule, [Shared(variant) for variant in variants.values()])
        for variant, table in zip(variants, tables, strict=True):
            self.report.add("maps", variant, table, {"run": run.name})

    def measure_levels(self, section: str, run: Run, measure: Callable[[UniAS, Unified], list[Row]]) -> None:
        """Measure the levels of a trained UniAS on good test images."""
        if section in self.report.results or not self.is_trained(run, section):
            return
        print(f"  {section} ...", flush=True)
        self.report.add_rows(section, measure(*self.trained(run)))

    def time_presets(self, run: Run, repeats: int) -> None:
        """Time the exported model of a run, which is ``unias_fast.yaml``'s, beside the paper's of full size."""
        if "presets" in self.report.results or not self.is_trained(run, "presets"):
            return
        print("  presets ...", flush=True)
        setup = Setup(device=torch.device("cpu"), threads=os.cpu_count() or 1, repeats=repeats, sizes=())
        with tempfile.TemporaryDirectory() as folder:
            paper = openvino(setup, Path(folder) / "paper", "f32")
            fast = runtime(setup, self.trained(run)[0].to_openvino(Path(folder) / "fast"), "f32")
            images = setup.images(1)
            seconds = interleave(
                {"unias.yaml": partial(paper, images), "unias_fast.yaml": partial(fast, images)}, setup
            )
        base = seconds["unias.yaml"]
        rows = [{"preset": n, **spread(s, 1), "speedup": speedup(base, s)} for n, s in seconds.items()]
        self.report.results["presets_machine"] = host()
        self.report.add_rows("presets", rows)

    def trained(self, run: Run) -> tuple[UniAS, Unified]:
        """Return a trained UniAS and the data, ready to test."""
        datamodule = self.datamodule()
        datamodule.setup()
        model = run.build()
        model.load_state_dict(torch.load(self.checkpoint(run.name), map_location="cpu")["state_dict"])
        return model.eval(), datamodule


@torch.no_grad()
def explained_shares(model: UniAS, datamodule: Unified) -> list[Row]:
    """Return per category and level how much of the features' variance is reconstructed.

    The variance within the category, over images and places: a reconstruction that gives nothing but the category's
    mean features explains 0 %, a perfect one 100 %.
    """
    samples = datamodule.test_data.samples
    category = dict(zip(samples["image_path"], samples["category"], strict=True))
    moments: dict[str, list[Tensor]] = {}  # per level: sums over images of squared errors, features, squared features
    count: Counter[str] = Counter()
    for batch in datamodule.test_dataloader():
        images = model.pre_processor.transform(batch.image)
        reconstructions, targets, deviations = model.model.reconstruct(images)
        for index in torch.nonzero(batch.gt_label == 0).flatten().tolist():
            name = category[batch.image_path[index]]
            count[name] += 1
            for j, (r, t, scale) in enumerate(zip(reconstructions, targets, deviations, strict=True)):
                error, feature = (r - t)[index] / scale[0], t[index] / scale[0]
                means = torch.stack([x.double().mean((1, 2)) for x in (error**2, feature, feature**2)])
                levels = moments.setdefault(name, [torch.zeros(())] * len(targets))
                levels[j] = levels[j] + means
    rows: list[Row] = []
    for name, levels in sorted(moments.items()):
        row: Row = {"category": name}
        for j, sums in enumerate(levels):
            error, mean, square = sums / count[name]
            row[f"level {4 - j}"] = round(100 * float(1 - error.sum() / (square - mean**2).sum()), 1)
        rows.append(row)
    return rows


@torch.no_grad()
def level_errors(model: UniAS, datamodule: Unified) -> list[Row]:
    """Return the mean cosine distance of good test images per level, coarse to fine.

    Returns:
        ``error`` of the reconstruction, and ``grid``, that of the target averaged over the 14 x 14 tokens and
        interpolated, which shows what a head can render at best: it upsamples tokens linearly.
    """
    errors: list[Tensor] = []
    for batch in datamodule.test_dataloader():
        good = batch.gt_label == 0
        if not good.any():
            continue
        reconstruction = model.model.reconstruct(model.pre_processor.transform(batch.image[good]))
        grid = reconstruction.targets[0].shape[-2:]
        pairs = []
        for reconstructed, target in zip(reconstruction.reconstructions, reconstruction.targets, strict=True):
            tokens = F.adaptive_avg_pool2d(target, grid)
            rendered = F.interpolate(tokens, size=target.shape[-2:], mode="bilinear", align_corners=False)
            pairs.append([(1 - F.cosine_similarity(x, target, dim=1)).mean((1, 2)) for x in (reconstructed, rendered)])
        errors.append(torch.stack([torch.stack(pair, dim=1) for pair in pairs], dim=1))  # (B, levels, 2)
    mean = torch.cat(errors).mean(0)
    return [{"level": 4 - j, "error": e, "grid": g} for j, (e, g) in enumerate(mean.tolist())]


@dataclass(frozen=True)
class Prediction:
    """What :func:`score` needs of a prediction."""

    anomaly_map: Tensor
    pred_score: Tensor


class Shared:
    """A variant of the map; all variants share the reconstruction of the same batch."""

    batch: Tensor | None = None
    reconstruction: Any = None

    def __init__(self, variant: Callable[[Reconstruction, Tensor], Any]) -> None:
        self.variant = variant

    def __call__(self, model: Any, image: Tensor) -> Prediction:
        """Reconstruct if no other variant has done so, and make the map."""
        if Shared.batch is not image:
            Shared.batch, Shared.reconstruction = image, model.model.reconstruct(image)
        return self.variant(Shared.reconstruction, image)


def map_variants(network: UniASModel) -> dict[str, Callable[[Reconstruction, Tensor], Prediction]]:
    """Return ways to make map and score of a reconstruction, each with one thing changed."""

    def changed(changes: Changes) -> Callable[[Reconstruction, Tensor], Prediction]:
        other = deepcopy(network)
        change(other, changes)
        return other.detect

    def scored(score: Callable[[Tensor], Tensor]) -> Callable[[Reconstruction, Tensor], Prediction]:
        def predict(reconstruction: Reconstruction, image: Tensor) -> Prediction:
            anomaly_map = network.detect(reconstruction, image).anomaly_map
            return Prediction(anomaly_map, score(anomaly_map))

        return predict

    def level(number: int) -> Callable[[Reconstruction, Tensor], Prediction]:
        def predict(reconstruction: Reconstruction, image: Tensor) -> Prediction:
            maps = network.detector.distances(network.residual(reconstruction, image))
            level_map = F.interpolate(maps[number], scale_factor=2.0, mode="bilinear", align_corners=True)
            return Prediction(level_map, top(level_map))

        return predict

    shapes, distances = (network.backbone.channels[::-1], network.image_size), network.detector.distances
    changes: dict[str, Changes] = {
        "no guided filter": {"detector.parts.guided_filter": None},
        "no segmentation head": {"detector.parts.segmentation_head": None},
        "maps not evened out": {"detector.parts.evenness": None},
        "no directions of errors": {"detector.distances.directions": None},
        "no statistics of errors": {"detector.distances": CosineDistances(network.image_size)},
        "all levels everywhere": {
            "detector.distances.whitening.exponents": torch.ones_like(distances.whitening.exponents)
        },
        "no blur of levels": {"detector.distances.blurs": nn.ModuleList(nn.Identity() for _ in distances.blurs)},
        "map of the paper": {"detector": RECIPES["paper"].detector(*shapes)},
    }
    scores = {"std": lambda x: standard_deviation(x, []), "max": lambda x: x.amax(dim=(1, 2, 3)), "top": top}
    return (
        {name: changed(change) for name, change in changes.items()}
        | {f"score {name} of the whole map": scored(score) for name, score in scores.items()}
        | {f"level {4 - number} alone": level(number) for number in range(len(network.heads))}
    )


def configured(config: Path, epochs: int | None) -> tuple[dict[str, Any], int]:
    """Return the arguments of UniAS and the number of epochs."""
    content = yaml.safe_load(config.read_text())
    return content["model"]["init_args"] | {"visualizer": False}, epochs or content["trainer"]["max_epochs"]


def demo_runs(seeds: Iterable[int], epochs: int | None) -> list[Run]:
    """Return trainings as in the demo."""
    unias, length = configured(DEMO, epochs)
    return [Run(name=f"demo_{seed}", model=UniAS, arguments=unias | {"seed": seed}, epochs=length) for seed in seeds]


def model_runs(seeds: Iterable[int], epochs: int | None) -> list[Run]:
    """Return the compared trainings."""
    unias, epochs_of_unias = configured(CONFIG, epochs)
    backbone = {name: unias[name] for name in ("backbone", "weights", "visualizer")}
    uniad = backbone | {"learning_rate": 5e-4, "lr_schedule": "onecycle"}
    runs = []
    for seed in seeds:
        runs += [
            Run(name=f"best_{seed}", model=UniAS, arguments=unias | {"seed": seed}, epochs=epochs_of_unias),
            paper_run(f"paper_{seed}", unias | {"seed": seed}, epochs_of_unias),
            Run(name=f"uniad_{seed}", model=UniAD, arguments=uniad | {"seed": seed}, epochs=epochs or UNIAD_EPOCHS),
            Run(name=f"patchcore_{seed}", model=BoundedPatchcore, arguments=backbone | {"seed": seed}),
        ]
    runs.append(Run(name="bank_retrieval_0", model=RetrievalBank, arguments=backbone))
    runs.append(Run(name="bank_guided_0", model=GuidedBank, arguments=backbone))
    return runs


def paper_run(name: str, arguments: dict[str, Any], epochs: int) -> Run:
    """Return a training of the paper's model, but on standardised features: they help short trainings."""
    paper = arguments | {"recipe": "paper"}
    return Run(
        name=name,
        model=UniAS,
        arguments=paper,
        epochs=epochs,
        changes=lambda network: {"standardization": FeatureStandardization(network.backbone.channels)},
    )


def ablation_runs(epochs: int) -> list[Run]:
    """Return trainings that differ in one thing from the first, the configured one."""
    base = configured(CONFIG, epochs)[0] | {"seed": 0}
    changes: dict[str, dict[str, Any]] = {
        "base": {},
        "no channel branch": {"channel_branch": False},
        "jitter 5": {"jitter_scale": 5.0},
        "no jitter": {"jitter_scale": 0.0},
        "width 128": {"hidden_dim": 128, "feedforward_dim": 512},
        "loss sign of the release": {"cosine_term": "release"},
    }
    parts: dict[str, Callable[[UniASModel], Changes]] = {
        "no statistics of errors": lambda network: {"detector.distances": CosineDistances(network.image_size)},
        "target of the paper": lambda _: {"low_frequencies": True},
        "raw features": lambda _: {"standardization": None},
        "no Gaussian split": lambda _: {"frequency_split": NoSplit()},
        "no MGG-CNN in the decoder": lambda network: {
            f"decoder.blocks.{i}.mgg_cnn": nn.Identity() for i in range(len(network.decoder.blocks))
        },
    }
    runs = [Run(name=name, model=UniAS, arguments=base | change, epochs=epochs) for name, change in changes.items()]
    runs += [Run(name=name, model=UniAS, arguments=base, epochs=epochs, changes=part) for name, part in parts.items()]
    runs.append(paper_run("the paper on standardised features", base, epochs))
    return [replace(run, name=f"ablation_{run.name.replace(' ', '_')}") for run in runs]


def change(network: UniASModel, changes: Changes) -> None:
    """Put something else in the place of parts of a network; None leaves a part out."""
    for name, value in changes.items():
        *above, last = name.split(".")
        parent = network.get_submodule(".".join(above))
        if value is None and isinstance(parent, nn.ModuleDict):
            del parent[last]
        else:
            setattr(parent, last, value)


class NoSplit(nn.Module):
    """Stands for the Gaussian split: the features themselves, and nothing where their high frequencies would be."""

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return features and the inputs of the network, as wide as ever."""
        return list(features), [torch.cat([feature, torch.zeros_like(feature)], dim=1) for feature in features]


def main() -> None:
    """Run the chosen sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the nine category folders")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=["models", "maps"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="of UniAS and UniAD in `models`")
    parser.add_argument("--ablation-epochs", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=15, help="rounds of timings in `presets`")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then; the next call resumes")
    parser.add_argument("--work", type=Path, default=Path("results/accuracy"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "accuracy")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"{args.data} is no folder; give the inspection benchmark (nine category folders)")
    study = Study(
        root=args.data,
        work=args.work,
        report=Report.load(args.output),
        deadline=time.monotonic() + 60 * args.minutes,
    )
    ablations = ablation_runs(args.ablation_epochs)
    runs = model_runs(args.seeds, args.epochs)  # the recipe of the first seed comes first
    if "models" in args.sections:
        for run in runs:
            study.train("models", run)
    if "maps" in args.sections:
        study.compare_maps(runs[0])
    demo = replace(study, root=args.work / "demo_data", config=DEMO)
    demos = demo_runs(args.seeds, args.epochs)
    if "demo" in args.sections:
        subprocess.run([sys.executable, DEMO_WRITER, demo.root], check=True)
        for run in demos:
            demo.train("demo", run)
    if "ablations" in args.sections:
        for run in ablations:
            study.train("ablations", run)
    if "levels" in args.sections:
        study.measure_levels("levels", ablations[-1], level_errors)
        study.measure_levels("explained", runs[0], explained_shares)
    if "presets" in args.sections:
        demo.time_presets(demos[0], args.repeats)
    print(study.report.markdown())


if __name__ == "__main__":
    main()

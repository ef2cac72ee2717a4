# SPDX-License-Identifier: Apache-2.0
"""Results of ``accuracy.py``: JSON, Markdown and a picture."""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from inspection_means import METRICS, group_means
from speed_report import machine, table

Row = dict[str, Any]
GROUPS = ("real", "synthetic", "all")
SECTIONS = {
    "models": "Models, one training for all nine categories each",
    "maps": "Maps and image scores of the first UniAS, nothing retrained",
    "demo": "The demo (configs/demo.yaml), one training for all five categories each",
    "ablations": "UniAS retrained with something changed, shorter trainings: compare within this table alone",
}


class Report:
    """Results so far, written after every run.

    Args:
        path: Where they are written, without the suffix.
        results: What is there already: ``results[section][run]`` with ``categories`` (metrics in [0, 1]), ``means``
            (percent) and facts of the run.
    """

    def __init__(self, path: Path, results: dict[str, Any]) -> None:
        self.path = path
        self.results = results
        self.left: list[str] = []

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Go on with the results of an earlier call."""
        file = path.with_suffix(".json")
        report = cls(path, json.loads(file.read_text()) if file.exists() else {})
        for section in SECTIONS:
            for row in report.rows(section).values():
                if "categories" in row:  # those of elpv.py have scores
                    row["means"] = group_means(row["categories"])  # an older file may have fewer
        return report

    def rows(self, section: str) -> dict[str, Row]:
        """Return the finished runs of a section."""
        return self.results.get(section, {})

    def unfinished(self, name: str) -> None:
        """Note a run that this call could not finish."""
        print(f"  {name} is not finished: call again to go on", flush=True)
        self.left.append(name)

    def add(self, section: str, name: str, categories: dict[str, dict[str, float]], facts: Row) -> None:
        """Take a finished run and write all files."""
        categories = {category: row for category, row in categories.items() if category != "mean"}
        row = {"means": group_means(categories), **facts, "machine": host(), "categories": categories}
        self.results.setdefault(section, {})[name] = row
        self.results["summary"] = self.summary()
        self.write()
        print(f"    {name}: pixel AP {row['means']['all']['pixel_AP']} %", flush=True)

    def add_rows(self, section: str, rows: list[Row]) -> None:
        """Take the rows of a table and write all files."""
        self.results[section] = rows
        self.results["summary"] = self.summary()
        self.write()

    def summary(self) -> dict[str, float]:
        """Return the means over seeds.

        With them the speed of the fast preset and its accuracy, for it is `best` here; the demo's accuracy; and the
        results of ``elpv.py`` that lie beside these.
        """
        result = summary(self.rows("models"))
        if "presets" in self.results:
            result["fast_speedup"] = self.results["presets"][-1]["speedup"]
        if "best_all" in result:
            result["fast_all_pixel_AP"] = result["best_all"]
        if demo := self.rows("demo"):
            result["demo_pixel_AP"] = round(fmean(row["means"]["all"]["pixel_AP"] for row in demo.values()), 2)
        if (cells := self.path.with_name("elpv.json")).exists():
            scores = json.loads(cells.read_text())["summary"]
            for key, name in {"pooled": "all", "within_modules": "within"}.items():
                result[f"elpv_{name}_image_AUROC"] = scores[f"best_own_{key}"]
        return result

    def write(self) -> None:
        """Write all files."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".json").write_text(json.dumps(self.results, indent=2) + "\n")
        self.path.with_suffix(".md").write_text(self.markdown())
        if self.rows("models"):
            draw(self.rows("models"), self.path.with_suffix(".png"))

    def markdown(self) -> str:
        """Return all results as Markdown."""
        text = [
            "# Accuracy on the inspection benchmark",
            "Percent; per category first, then the mean over the four real, the five synthetic, and all categories. "
            "Not comparable with published figures of other datasets.",
            MODELS_MEAN,
            table(comparison(self.rows("models")), ("model", "seeds", "group", *METRICS)),
        ]
        for section, title in SECTIONS.items():
            rows = [_flat(name, row) for name, row in self.rows(section).items()]
            if rows:
                text += [f"## {title}", table(rows, tuple(dict.fromkeys(key for row in rows for key in row)))]
        if "levels" in self.results:
            text += [
                "## Cosine distance of good images per level (target and levels of the paper)",
                "`error`: of the reconstruction; `grid`: of the target averaged over the tokens and interpolated.",
                table(self.results["levels"], ("level", "error", "grid")),
            ]
        if "explained" in self.results:
            text += [
                "## Variance of good images' features that the first UniAS reconstructs, percent",
                "Within a category, over images and places: 0 is a reconstruction of nothing but the category's mean.",
                table(self.results["explained"], tuple(self.results["explained"][0])),
            ]
        if "presets" in self.results:
            text += [
                "## Speed of the presets, OpenVINO float32, batch 1, in one run",
                "`unias_fast.yaml` is `demo_0`, trained; `unias.yaml` is the paper's of full size, random weights.",
                table(self.results["presets"], tuple(self.results["presets"][0])),
                describe(self.results["presets_machine"]),
            ]
        models = self.rows("models")
        if models:
            rows = [
                {"category": name, **{run: 100 * row["categories"][name]["pixel_AP"] for run, row in models.items()}}
                for name in next(iter(models.values()))["categories"]
            ]
            text += ["## Pixel AP per category", table(rows, ("category", *models))]
        hosts = {describe(row["machine"]) for section in SECTIONS for row in self.rows(section).values()}
        text += ["## Machines and versions", "\n".join(f"- {host}" for host in sorted(hosts))]
        return "\n\n".join(text) + "\n"


MODELS_MEAN = """\
`best` is the configuration as it is, `paper` the paper's model on standardised features, `unias` an earlier
configuration, without a segmentation head and with moving averages for statistics; `bank_guided` is `bank_retrieval`
with the guided filter of `best`. The development part (brick, coins, magtile, pcb, solar_mono) is what choices are made
on; what is held back was seen by earlier ones too. Mean over seeds ± standard deviation."""


def by_model(models: dict[str, Row]) -> dict[str, list[Row]]:
    """Return the runs of each model, one a seed: names are ``MODEL_SEED``."""
    runs: dict[str, list[Row]] = {}
    for name, row in models.items():
        runs.setdefault(name.rpartition("_")[0], []).append(row)
    return runs


def summary(models: dict[str, Row]) -> dict[str, float]:
    """Return means in percent over the seeds of each model: ``best_all_AUPRO``, ..., and ``best_all`` for pixel AP."""
    result = {}
    for model, runs in by_model(models).items():
        for group in runs[0]["means"]:
            means = {metric: round(fmean(row["means"][group][metric] for row in runs), 2) for metric in METRICS}
            result |= {f"{model}_{group}": means["pixel_AP"]}
            result |= {f"{model}_{group}_{metric}": mean for metric, mean in means.items()}
    return result


def comparison(models: dict[str, Row]) -> list[Row]:
    """Return a row per model and group: the mean of every metric over the seeds, and its spread."""
    rows = []
    for model, runs in by_model(models).items():
        for group in runs[0]["means"]:
            row: Row = {"model": model, "seeds": len(runs), "group": group.replace("_", " ")}
            for metric in METRICS:
                values = [run["means"][group][metric] for run in runs]
                row[metric] = f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
            rows.append(row)
    return rows


def draw(models: dict[str, Row], path: Path) -> None:
    """Draw pixel AP per category, a bar a model with the spread of its seeds, and the learning curves of all runs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(14, 4.5), width_ratios=(2, 1), layout="constrained")
    grouped = by_model(models)
    names = list(next(iter(models.values()))["categories"])
    width = 0.8 / len(grouped)
    for index, (model, runs) in enumerate(grouped.items()):
        columns = [[100 * run["categories"][name]["pixel_AP"] for run in runs] for name in names]
        places = [x + width * (index - (len(grouped) - 1) / 2) for x in range(len(names))]
        spreads = [stdev(column) if len(column) > 1 else 0 for column in columns]
        bars.bar(places, [fmean(column) for column in columns], width, yerr=spreads, label=model, color=f"C{index}")
        for run in runs:
            if run["curve"]:
                points = [*run["curve"], {"epoch": run["epochs"], "pixel_AP": run["means"]["all"]["pixel_AP"] / 100}]
                curves.plot(
                    [point["epoch"] for point in points],
                    [100 * point["pixel_AP"] for point in points],
                    marker="o",
                    color=f"C{index}",
                )
    bars.set_xticks(range(len(names)), names, rotation=30, ha="right")
    bars.set_ylabel("pixel AP, %")
    curves.set_xlabel("epoch")
    curves.set_ylabel("mean pixel AP, %")
    figure.legend(loc="outside upper center", ncols=len(grouped), frameon=False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _flat(name: str, row: Row) -> Row:
    means = row["means"]
    flat = {"run": name} | {f"pixel AP {group}": means[group]["pixel_AP"] for group in GROUPS if group in means}
    flat |= {metric.replace("_", " "): means["all"][metric] for metric in ("DSC", "pixel_AUROC", "image_AUROC")}
    for key in ("epochs", "parameters"):
        if key in row:
            flat[key.replace("_", " ")] = row[key]
    return flat


def host() -> Row:
    """Return the machine that a run was made on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return machine(device, torch.get_num_threads())


def describe(host: Row) -> str:
    """Return machine, commit and versions as a line."""
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    return f"{host['device']}, {host['cpu']}, {host['threads']} threads; commit {host['commit']}; {versions}"

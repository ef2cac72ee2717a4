# SPDX-License-Identifier: Apache-2.0
"""Check of a file for `anomalib benchmark`, whose entries anomalib builds one after the other, between trainings."""

from pathlib import Path

import yaml
from anomalib.data import get_datamodule
from anomalib.models import get_model
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict

from anomalib_uniass.training.from_checkpoint import FromCheckpointMixin


def check_entries(config: Path | str) -> None:
    """Build every model and datamodule of a benchmark's file once, and fetch the weights of our models.

    One that cannot be built later would end the run, the entries behind it included, with exit code 0.

    Args:
        config: YAML file of the benchmark.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none of a benchmark, or an entry cannot be built; names all of them and why.
    """
    content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("benchmark"), dict):
        msg = f"Expected {config} to have a section `benchmark` with `seed`, `model` and `data`, got {content!r}."
        raise ValueError(msg)
    entries = list(get_iterator_from_grid_dict(content["benchmark"]))
    problems: dict[str, None] = {}  # a set that keeps the order
    for entry in entries:
        for part, build in (("model", get_model), ("data", get_datamodule)):
            try:
                built = build(entry[part])
                if isinstance(built, FromCheckpointMixin):
                    built.fetch_weights()
            except Exception as error:  # a constructor may raise anything
                name = entry[part].get("class_path") if isinstance(entry.get(part), dict) else None
                reason = " ".join(str(error).split()) or "no such class"
                problems[f"  - {part} {name}: {type(error).__name__}: {reason}"] = None
    if problems:
        listed = "\n".join(problems)
        msg = f"{config} has {len(entries)} entries, and these cannot be built:\n{listed}\nNothing was trained."
        raise ValueError(msg)

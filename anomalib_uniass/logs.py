# SPDX-License-Identifier: Apache-2.0
"""What is said beside our results: each line once, and neither advertisements nor a converter's diary.

All of it is done by filters on handlers and loggers, and by levels, which stay for as long as a run or a call lasts.
"""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_module  # type: ignore[attr-defined]  # has its logger
from rich.logging import RichHandler

from anomalib_uniass.text import one_line

UNWANTED = (
    "💡 Tip:",  # Lightning's advertisements
    # The command's own callbacks, which it brings again in the test after a training.
    "The following callbacks returned in `LightningModule.configure_callbacks` will override existing callbacks",
)
"""How lines of Lightning begin that tell nothing of a run."""

EXPECTED = (
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the backbone is frozen
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch, in every stage
)
"""Warnings of Lightning that nobody can do something about."""

logger = logging.getLogger(__name__)

CONVERTERS = ("onnxscript", "onnx_ir", "torch.onnx")
"""Loggers that tell of every constant of a graph, at the levels INFO and WARNING."""

_runs: "WeakSet[object]" = WeakSet()
"""Whose lines are filtered: a filter that is left when they are gone lets everything pass."""


def install_log_filters(run: object) -> None:
    """Filter the log until :func:`remove_log_filters`, or until `run` is gone.

    anomalib's command gives the root logger two handlers, so that every line comes twice; Rich's, which breaks lines at
    80 columns in a file, is kept from writing what the other one writes. Installing again changes nothing.

    Args:
        run: What runs: a model or a datamodule.
    """
    _runs.add(run)
    handlers = logging.getLogger().handlers
    if any(type(handler) is logging.StreamHandler for handler in handlers):
        for handler in handlers:
            if isinstance(handler, RichHandler):
                handler.addFilter(_once)
    rank_zero_module.log.addFilter(_wanted)


def remove_log_filters(run: object) -> None:
    """Take the filters away, unless something else runs.

    Args:
        run: What has run.
    """
    _runs.discard(run)
    if not _runs:
        for handler in logging.getLogger().handlers:
            handler.removeFilter(_once)
        rank_zero_module.log.removeFilter(_wanted)


class QuietRun(Callback):
    """Keep log and warnings of a run short, and leave both as they were, however it ends."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the filters."""
        del trainer, stage
        install_log_filters(pl_module)
        for message in EXPECTED:
            warnings.filterwarnings("ignore", message)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the filters away."""
        del stage
        self._restore(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the filters away."""
        del exception
        self._restore(trainer, pl_module)

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        remove_log_filters(pl_module)
        if (datamodule := getattr(trainer, "datamodule", None)) is not None:
            remove_log_filters(datamodule)
        for message in EXPECTED:
            added: Any = ("ignore", re.compile(message, re.IGNORECASE), Warning, None, 0)
            if added in warnings.filters:
                warnings.filters.remove(added)  # type: ignore[attr-defined]  # a list, whatever its annotation


@contextmanager
def quiet(*names: str, level: int = logging.ERROR) -> Iterator[None]:
    """Let loggers and those below them say only what is of some level, within this context.

    Args:
        names: Their names.
        level: The least level that is written.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(level, logger.level))
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)


def from_here(path: Path) -> str:
    """Return a path as it is typed in the current folder, if it lies below, and as the terminal can show it."""
    path, here = path.resolve(), Path.cwd()
    shown = str(path.relative_to(here) if path.is_relative_to(here) else path)
    return one_line(shown, sys.stdout.encoding or "utf-8")


class _Once(logging.Filter):
    """Lets nothing pass while something runs: another handler writes it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether this handler writes a line."""
        del record
        return not _runs


class _Wanted(logging.Filter):
    """Lets all but :data:`UNWANTED` lines pass while something runs."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line is written."""
        return not _runs or not record.getMessage().startswith(UNWANTED)


_once, _wanted = _Once(), _Wanted()


@rank_zero_only
def warn(message: str | None) -> None:
    """Log a warning, by one process of a distributed run; nothing if there is no message."""
    if message is not None:
        logger.warning("%s", message)

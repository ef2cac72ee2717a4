# SPDX-License-Identifier: Apache-2.0
"""Lines come once while a run lasts, adverts and a converter's diary do not, and nothing is left behind."""

import gc
import io
import logging
from collections.abc import Iterator
from weakref import WeakSet

import pytest
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from rich.console import Console
from rich.logging import RichHandler

from anomalib_uniass import logs
from anomalib_uniass.logs import install_log_filters, quiet, remove_log_filters


class Run:
    """What runs."""


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """Take away the handlers of the root for a while, and what other tests have left running."""
    monkeypatch.setattr(logs, "_runs", WeakSet())
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    logger.handlers = []
    logger.setLevel(logging.INFO)
    yield logger
    logger.handlers = handlers
    logger.setLevel(level)


def filters(root: logging.Logger) -> list[object]:
    return [one for place in (*root.handlers, rank_zero_module.log) for one in place.filters]


@pytest.mark.parametrize("plain", [True, False], ids=["both", "Rich alone"])
def test_lines_come_once_while_something_runs(root: logging.Logger, *, plain: bool) -> None:
    text, run, other = io.StringIO(), Run(), Run()
    if plain:
        root.addHandler(logging.StreamHandler(text))
    root.addHandler(RichHandler(console=Console(file=text, width=200)))
    names = ("anomalib_uniass.data.unified", "anomalib.engine", "elsewhere")

    def count(word: str) -> list[int]:
        for name in names:
            logging.getLogger(name).warning("%s of %s", word, name)
        return [text.getvalue().count(f"{word} of {name}") for name in names]

    before = 2 if plain else 1
    assert count("before") == [before] * 3
    for one in (run, run, other):
        install_log_filters(one)
    assert count("during") == [1] * 3
    remove_log_filters(run)
    assert count("in the other") == [1] * 3
    remove_log_filters(other)
    assert count("after") == [before] * 3
    assert not filters(root)


def test_filters_of_what_is_gone_let_everything_pass(root: logging.Logger) -> None:
    text, run = io.StringIO(), Run()
    root.addHandler(logging.StreamHandler(text))
    root.addHandler(RichHandler(console=Console(file=text, width=200)))
    install_log_filters(run)
    del run
    gc.collect()
    logging.getLogger("elsewhere").warning("here")
    assert text.getvalue().count("here") == 2


def test_adverts_do_not_come_while_something_runs(caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    with caplog.at_level(logging.INFO, logger=rank_zero_module.log.name):
        for word in ("before", "during", "after"):
            rank_zero_info(f"💡 Tip: For seamless logging {word} ...")
            rank_zero_info(f"GPU available: {word}")
            (install_log_filters if word == "before" else remove_log_filters)(run)
            if word == "during":
                continue
    tips = [record.getMessage() for record in caplog.records if "💡" in record.getMessage()]
    assert [tip.split()[-2] for tip in tips] == ["before", "after"]
    assert sum("GPU available" in record.getMessage() for record in caplog.records) == 3


def test_quiet_loggers_still_say_errors_and_are_as_before(caplog: pytest.LogCaptureFixture) -> None:
    parent, child = logging.getLogger("converter"), logging.getLogger("converter.folding")
    parent.setLevel(logging.INFO)
    with pytest.raises(ZeroDivisionError), quiet("converter", "converter.never_seen"):
        child.warning("of a constant")
        child.error("of a failure")
        1 / 0  # noqa: B018
    assert parent.level == logging.INFO
    assert logging.getLogger("converter.never_seen").level == logging.NOTSET
    child.warning("afterwards")
    assert [record.getMessage() for record in caplog.records] == ["of a failure", "afterwards"]


def test_quiet_makes_nothing_louder() -> None:
    logger = logging.getLogger("converter.silent")
    logger.setLevel(logging.CRITICAL)
    with quiet("converter.silent"):
        assert logger.level == logging.CRITICAL

# SPDX-License-Identifier: Apache-2.0
"""Lines of this package come once where anomalib's command has two handlers, and those of others as before."""

import io
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.logging import RichHandler

from anomalib_uniass.logs import log_once


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """Take away the handlers of the root for a while."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    logger.handlers = []
    logger.setLevel(logging.INFO)
    yield logger
    logger.handlers = handlers
    logger.setLevel(level)


@pytest.mark.parametrize(("plain", "ours"), [(True, 1), (False, 1)], ids=["both", "Rich alone"])
def test_lines_come_once(root: logging.Logger, *, plain: bool, ours: int) -> None:
    text = io.StringIO()
    if plain:
        root.addHandler(logging.StreamHandler(text))
    root.addHandler(RichHandler(console=Console(file=text)))
    for _ in range(2):
        log_once()
    logging.getLogger("anomalib_uniass.data.unified").warning("of ours")
    logging.getLogger("anomalib.engine").warning("of theirs")
    logging.getLogger("anomalib_uniass_else").warning("of others")
    assert text.getvalue().count("of ours") == ours
    assert text.getvalue().count("of theirs") == (2 if plain else 1)
    assert text.getvalue().count("of others") == (2 if plain else 1)
    assert all(len(handler.filters) <= 1 for handler in root.handlers)

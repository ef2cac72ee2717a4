# SPDX-License-Identifier: Apache-2.0
"""Lines of this package in the log, once each."""

import logging

from rich.logging import RichHandler


def log_once() -> None:
    """Keep this package's lines out of `RichHandler` where another handler of the root writes them too.

    anomalib's command adds both, so that every line comes twice; Rich's is the one that breaks lines at 80 columns in a
    file. Lines of others stay as they are.
    """
    handlers = logging.getLogger().handlers
    rich = [handler for handler in handlers if isinstance(handler, RichHandler)]
    if any(type(handler) is logging.StreamHandler for handler in handlers):
        for handler in rich:
            if not any(isinstance(one, _NotOurs) for one in handler.filters):
                handler.addFilter(_NotOurs())


class _NotOurs(logging.Filter):
    """Lets the lines of other packages pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line is of another package."""
        return record.name.partition(".")[0] != "anomalib_uniass"

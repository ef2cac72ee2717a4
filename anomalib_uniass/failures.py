# SPDX-License-Identifier: Apache-2.0
"""Files that fail one by one while a run goes on: the first are named, the others counted."""

import logging

from anomalib_uniass.text import MOST_NAMED, one_line


class Failures:
    """Warn of failures of one kind, without a line for each of a thousand files.

    Args:
        logger: Where to warn.
        what: What failed, such as ``No picture``; begins the line.
    """

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._files: set[str] = set()
        self._logger = logger
        self._what = what

    def add(self, file: str, reason: object) -> None:
        """Warn that a file failed, if it is one of the first, once."""
        is_new = file not in self._files
        self._files.add(file)
        if is_new and len(self._files) <= MOST_NAMED:
            self._logger.warning("%s of %s: %s", self._what, one_line(file), one_line(str(reason)))

    def end(self) -> None:
        """Say how many failed without a warning of their own, and begin anew."""
        if len(self._files) > MOST_NAMED:
            self._logger.warning("%s of %d files in all, of which the first were named.", self._what, len(self._files))
        self._files = set()

# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: how schedulers ask a run to end before they kill it."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

EXIT_CODE = 128 + signal.SIGTERM
"""Exit code of a process that SIGTERM ended, as shells give it: 143."""


class TerminationCallback(Callback):
    """End at SIGTERM within seconds, with exit code 143.

    Lightning notes the signal, and looks for it between batches of a training and of a test, never in a prediction. It
    ends with a ``SystemExit`` that has no code, which a scheduler takes for success.

    Between batches of a training it is left to Lightning. What changes no checkpoint, as a test, ends at once. Handlers
    that the user or a cluster's plug-in has set are called first, as Lightning calls them. None of this stays:
    Lightning puts back the handlers of before when a run ends, whatever ends it.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Lightning's exit a code."""
        del trainer, pl_module
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = EXIT_CODE

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a validation at once, unless it belongs to a training."""
        del pl_module
        if trainer.state.fn == TrainerFn.VALIDATING:
            _end_at_sigterm(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a test at once."""
        del pl_module
        _end_at_sigterm(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a prediction at once."""
        del pl_module
        _end_at_sigterm(trainer)


@contextmanager
def ending_at_sigterm(trainer: Trainer) -> Iterator[None]:
    """Let SIGTERM end what runs inside at once: long work of a training that has no batches Lightning knows of.

    Args:
        trainer: The trainer, which runs.

    Raises:
        SIGTERMException: If the signal comes, or came before.
    """
    if trainer.received_sigterm:
        raise SIGTERMException
    restore = _end_at_sigterm(trainer)
    try:
        yield
    finally:
        restore()


def _end_at_sigterm(trainer: Trainer) -> Callable[[], None]:
    """Raise as soon as Lightning has noted the signal, and return what puts its handler back."""
    noting = signal.getsignal(signal.SIGTERM)
    # Lightning sets no handler on Windows, and threads other than the main one cannot have any.
    if sys.platform == "win32" or not callable(noting) or threading.current_thread() is not threading.main_thread():
        return lambda: None

    def end(number: int, frame: FrameType | None) -> None:
        noting(number, frame)
        if trainer.received_sigterm:
            raise SIGTERMException

    signal.signal(signal.SIGTERM, end)

    def restore() -> None:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, noting)

    return restore

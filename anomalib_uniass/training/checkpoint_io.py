# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there, and errors that name the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO

from anomalib_uniass.files import replacing

NEEDED = ("state_dict", "hyper_parameters", "pytorch-lightning_version")
"""What every checkpoint of an anomalib model holds."""


class WholeCheckpointIO(AnomalibCheckpointIO):
    """anomalib's reader and writer of checkpoints, which replaces a file by a whole one only, and names a broken one.

    Lightning writes to the system's folder for temporary files and moves the file from there. Where that is another
    file system, as it often is, the move is a copy onto the old checkpoint: a run that is killed meanwhile loses both.
    This one lets it write beside the target, and then renames.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; arguments as for Lightning's ``TorchCheckpointIO``.

        Raises:
            OSError: If the file cannot be written; the message names it.
        """
        if "://" in str(path):  # object storage shows whole objects only
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as draft:
            super().save_checkpoint(checkpoint, draft, storage_options)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; arguments as for anomalib's ``AnomalibCheckpointIO``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is broken, or no checkpoint of an anomalib model; the message names it.
        """
        if Path(path).is_dir():
            msg = (
                f"Expected a checkpoint, got the folder {path}. Give a file, such as its weights/lightning/model.ckpt."
            )
            raise ValueError(msg)
        try:
            content = super().load_checkpoint(path, *args, **kwargs)
        except OSError:
            raise  # names the file by itself
        except Exception as error:  # torch raises whatever the file's bytes lead to
            size = f", {Path(path).stat().st_size:,} bytes," if Path(path).is_file() else ""
            msg = (
                f"Expected {path} to be a checkpoint, but the file{size} cannot be read ({type(error).__name__}). It "
                "is empty, cut, damaged or something else, such as an exported model. Copy it again or take another."
            )
            raise ValueError(msg) from error
        if missing := [name for name in NEEDED if not isinstance(content, Mapping) or name not in content]:
            msg = (
                f"Expected {path} to be a checkpoint of an anomalib model, but it lacks {', '.join(missing)}: "
                f"{_describe(content)}. Give a file that a training saved, such as weights/lightning/model.ckpt."
            )
            raise ValueError(msg)
        return content


def _describe(content: object) -> str:
    """Say what a file holds instead."""
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}"
    names = ", ".join(map(str, list(content)[:3])) or "nothing"
    return f"it holds {names}{', …' if len(content) > 3 else ''}"

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there."""

from pathlib import Path
from typing import Any

from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO

from anomalib_uniass.files import replacing


class WholeCheckpointIO(AnomalibCheckpointIO):
    """anomalib's reader and writer of checkpoints, which replaces a file by a whole one only.

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

# SPDX-License-Identifier: Apache-2.0
"""Per-channel standardisation of the backbone features (recipe `best`, not in the paper)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from anomalib_uniass.distribution import of_all_processes


class FeatureStandardization(nn.Module):
    """Scale every backbone channel to zero mean and unit variance: ``[(B, C_i, H_i, W_i)] -> the same``.

    ImageNet features have mean squares that differ by orders of magnitude between levels and channels, so that a few
    channels rule both terms of the loss. The identity until :meth:`fit` has seen the training set.

    Args:
        channels: Channels C_i of the levels.
    """

    fitted: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.levels = len(channels)
        for level, c in enumerate(channels):
            self.register_buffer(f"mean_{level}", torch.zeros(1, c, 1, 1))
            self.register_buffer(f"std_{level}", torch.ones(1, c, 1, 1))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Take the statistics of batches of features; in a distributed run of those of all processes.

        Args:
            batches: Features ``[(B, C_i, H_i, W_i)]`` of the training set.

        Raises:
            ValueError: If there is no batch.
        """
        moments = [torch.zeros(2, self._mean(i).numel(), dtype=torch.float64) for i in range(self.levels)]
        count = torch.zeros((), dtype=torch.float64)
        for features in batches:
            count += len(features[0])
            for total, feature in zip(moments, features, strict=True):
                first_two = torch.stack([feature.mean(dim=(2, 3)), feature.square().mean(dim=(2, 3))])
                total += first_two.sum(dim=1).cpu()  # per image, summed on the CPU: not every device has float64
        count, *moments = (
            torch.stack(shares).sum(dim=0) for shares in zip(*of_all_processes([count, *moments]), strict=True)
        )
        if not count:
            msg = "Feature standardisation needs at least one batch of training images, got none."
            raise ValueError(msg)
        for i, total in enumerate(moments):
            mean, square = total / count
            self._mean(i).copy_(mean.view(1, -1, 1, 1))
            self._std(i).copy_((square - mean.square()).clamp_min(1e-12).sqrt().view(1, -1, 1, 1))
        self.fitted = torch.ones_like(self.fitted)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Standardise every level."""
        return [(feature - self._mean(i)) / self._std(i) for i, feature in enumerate(features)]

    def restore(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Undo :meth:`forward`."""
        restored = []
        for i, feature in enumerate(features):
            # Flat: OpenVINO 2026.4 fuses a scale of maps with the matrix product before it, along the wrong axis.
            flat = feature.flatten(2) * self._std(i).flatten(2) + self._mean(i).flatten(2)
            restored.append(flat.unflatten(2, feature.shape[2:]))
        return restored

    @property
    def stds(self) -> list[Tensor]:
        """Standard deviations of the levels, ``(1, C_i, 1, 1)`` each."""
        return [self._std(i) for i in range(self.levels)]

    def _mean(self, level: int) -> Tensor:
        return self.get_buffer(f"mean_{level}")

    def _std(self, level: int) -> Tensor:
        return self.get_buffer(f"std_{level}")

# SPDX-License-Identifier: Apache-2.0
"""The form of a detector's parts."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn

from anomalib_uniass.models.unias.detector.residual import Residual


class Training(Protocol):
    """The training set as the network sees it that has learned from it, in evaluation mode.

    In a distributed run every process sees its share; parts join what they take of it.
    """

    @property
    def steps(self) -> int:
        """Return for how many optimizer steps the network was trained."""

    def coarsest(self) -> Iterable[Tensor]:
        """Yield the coarsest features of every image, ``(B, C, h, w)``."""

    def residuals(self) -> Iterable[Residual]:
        """Yield the residuals of every image."""

    def random_images(self, batches: int, *, size: int, what: str) -> Iterable[Tensor]:
        """Yield batches of random images, normalised ``(size, 3, H, W)``, and say how far `what` is."""

    def residual(self, image: Tensor) -> Residual:
        """Return the residual of normalised images ``(B, 3, H, W)``."""


class Part(nn.Module):
    """A step between the distances and the anomaly map: ``(B, 1, H, W), residual -> (B, 1, H, W)``.

    What it is given and returns is the geometric mean of the levels' distances, none negative.
    """

    def forward(self, distance: Tensor, residual: Residual) -> Tensor:
        """Return the map behind this part."""
        raise NotImplementedError


class Fitted(ABC):
    """What is fitted to the trained network when a training ends. Without that it changes nothing."""

    @abstractmethod
    def fit(self, training: Training) -> None:
        """Take what it needs of the training set, anew."""

    @abstractmethod
    def reset(self) -> None:
        """Become what it was before :meth:`fit`: the network learns on, and what was fitted is of old weights."""

    @abstractmethod
    def lack(self) -> str:
        """Say what weights miss whose training did not end; nothing if it is fitted, or if another part says it."""

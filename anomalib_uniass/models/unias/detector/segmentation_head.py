# SPDX-License-Identifier: Apache-2.0
"""Segmentation head: learns from pseudo-defects how a defect's residual looks (recipe `best`, not in the paper)."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.ops import sigmoid_focal_loss

from anomalib_uniass.distribution import is_first_process, of_all_processes
from anomalib_uniass.layers.precision import full_precision, widen
from anomalib_uniass.layers.seeding import seeded
from anomalib_uniass.models.unias.detector.parts import Fitted, Part, Training
from anomalib_uniass.models.unias.detector.pseudo_defects import add_pseudo_defects
from anomalib_uniass.models.unias.detector.residual import Levels, Residual

WIDTH = 64
LEVEL_WIDTH = 32
"""Channels that each level's residual is reduced to."""

DILATIONS = (1, 2, 4)
"""Of the convolutions: each pixel sees 60 around it, a quarter of an image of 224, to know what is usual there."""

RARE = 0.01
"""Share of defective pixels that an untrained head expects."""

WEIGHT = 0.2
"""Weight of the head's probabilities beside the distances of the reconstruction."""

LEARNING_RATE = 2e-3
FOCAL_WEIGHT = 10.0

BATCHES = 1000
"""Batches of its training, at most; a shorter training of the network gives it as few."""

BATCH = 8
"""Images of such a batch."""


class SegmentationHead(Part, Fitted):
    """Segment defects by the residual of the reconstruction, and average the map with their probabilities.

    It sees the squared differences of the normalised features and their cosine distances at a quarter of the image
    size, so that no image is segmented by how it looks itself. As in INP-Former++ (Luo et al., 2025) it is trained on
    pseudo-defects behind a reconstruction that it does not change, and its map is averaged with the residual's.

    Args:
        channels: Channels C_j of the levels, coarse to fine.
        image_size: Height H and width W of the image, multiples of 4.
    """

    fitted: Tensor

    def __init__(self, channels: Sequence[int], *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size
        self.grid_size = (image_size[0] // 4, image_size[1] // 4)
        self.reductions = nn.ModuleList(nn.Conv2d(c, LEVEL_WIDTH, kernel_size=1) for c in channels)
        width, body = (LEVEL_WIDTH + 1) * len(channels), list[nn.Module]()
        for dilation in DILATIONS:
            convolution = nn.Conv2d(width, WIDTH, kernel_size=3, padding=dilation, dilation=dilation)
            body += [convolution, nn.BatchNorm2d(WIDTH), nn.ReLU()]
            width = WIDTH
        self.body = nn.Sequential(*body)
        self.classifier = nn.Conv2d(WIDTH, 1, kernel_size=1)
        self.register_buffer("fitted", torch.tensor(False))
        self.requires_grad_(False)  # the reconstruction's optimizer leaves it alone
        self._reset_parameters()
        self.eval()

    def train(self, mode: bool = True) -> "SegmentationHead":
        """Stay in eval mode: :meth:`fit` alone moves the statistics of batch norm."""
        del mode
        return super().train(False)

    def _reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()
        self.reset()

    def reset(self) -> None:
        """Take all pixels for alike again."""
        nn.init.zeros_(self.classifier.weight)
        nn.init.constant_(self.classifier.bias, math.log(RARE))  # type: ignore[arg-type]
        self.fitted.fill_(False)

    def forward(self, distance: Tensor, residual: Residual) -> Tensor:
        """Return the weighted mean of the map and the head's probabilities."""
        probability = self.logits(residual.reconstructions, residual.targets).sigmoid()
        return torch.lerp(distance, probability, WEIGHT)

    def logits(self, reconstructions: Levels, targets: Levels) -> Tensor:
        """Return the logits of every pixel: ``[(B, C_j, H_j, W_j)] x 2 -> (B, 1, H, W)``."""
        dtype = self.classifier.weight.dtype
        with full_precision(targets[0]):
            residuals = []
            for reduction, pair in zip(self.reductions, zip(reconstructions, targets, strict=True), strict=True):
                x, y = (F.normalize(widen(features), dim=1) for features in pair)
                squares = ((x - y).square() * x.shape[1]).to(dtype)  # (B, C_j, H_j, W_j), about as large whatever C_j
                distance = 2.5 * squares.mean(dim=1, keepdim=True)  # five times the cosine distance
                residual = torch.cat([reduction(squares), distance], dim=1)
                residuals.append(F.interpolate(residual, size=self.grid_size, mode="bilinear"))
            logits = self.classifier(self.body(torch.cat(residuals, dim=1)))  # (B, 1, H / 4, W / 4)
            return F.interpolate(widen(logits), size=self.image_size, mode="bilinear")

    def fit(self, training: Training) -> None:
        """Train on pseudo-defects, on process 0 for all of a distributed run."""
        count = max(1, min(BATCHES, training.steps))
        if is_first_process():
            with seeded(0):
                self.learn(training.random_images(count, size=BATCH, what="Segmentation head"), training, count=count)
        state = {name: value.cpu() for name, value in self.state_dict().items()}
        self.load_state_dict(of_all_processes(state)[0])

    def learn(self, batches: Iterable[Tensor], training: Training, *, count: int) -> None:
        """Train from the start: an earlier training was behind another reconstruction.

        Args:
            batches: Normalised good images ``(B, 3, H, W)``.
            training: Gives the residuals of images.
            count: Number of batches.
        """
        self._reset_parameters()
        self.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.parameters(), LEARNING_RATE, weight_decay=1e-4)
        schedule = OneCycleLR(optimizer, LEARNING_RATE, total_steps=count)
        super().train()
        for images in batches:
            defective, masks = add_pseudo_defects(images)
            with torch.no_grad():
                residual = training.residual(defective)
            with torch.enable_grad():
                loss = segmentation_loss(self.logits(residual.reconstructions, residual.targets), masks)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
        self.eval()
        self.requires_grad_(False)
        self.fitted.fill_(True)

    def lack(self) -> str:
        """Say that it is not trained."""
        if self.fitted:
            return ""
        return (
            "The segmentation head is not trained: it is when a training ends, and this one did not. The map is that "
            "of the distances."
        )


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return focal loss over all pixels and dice loss of the defective images.

    Args:
        logits: Logits ``(B, 1, H, W)``.
        masks: Masks ``(B, 1, H, W)`` of 0 and 1.
    """
    focal = FOCAL_WEIGHT * sigmoid_focal_loss(logits, masks, alpha=-1, gamma=2, reduction="mean")
    probabilities, defective = logits.sigmoid(), masks.amax(dim=(1, 2, 3)) > 0
    overlap = 2 * (probabilities * masks).sum(dim=(1, 2, 3)) + 1
    dice = 1 - overlap / ((probabilities + masks).sum(dim=(1, 2, 3)) + 1)
    return focal + (dice * defective).sum() / defective.sum().clamp_min(1)

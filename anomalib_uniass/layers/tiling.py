# SPDX-License-Identifier: Apache-2.0
"""Large images by tiles: every tile is one more image for the same network."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.layers.antialiased_resize import antialiased_resize

TILE_BATCH = 4
"""Tiles that the network sees at a time, whatever the size of the image: what bounds the memory.

On a CPU core four at a time were an eighth faster than eight, whose activations leave the cache; no GPU was tried.
"""

Size = tuple[int, int]
Detect = Callable[[Tensor], InferenceBatch]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles that cover an image evenly; neighbours overlap by what `stride` leaves of `tile_size`, or a little more.

    anomalib's ``Tiler`` pads images that its tiles do not fit into, and takes the plain mean of overlaps, which shows
    seams. Here the last tiles end with the image, and overlaps are blended by weights that fall to the edges.

    Args:
        tile_size: Height and width of the tiles, in pixels of the image.
        stride: Largest steps from a tile to the next.

    Raises:
        ValueError: If a size is not positive, or a stride is larger than its tile.
    """

    tile_size: Size
    stride: Size

    def __post_init__(self) -> None:
        """Refuse tiles that do not cover an image."""
        for side, step in zip(self.tile_size, self.stride, strict=True):
            if side < 1 or not 0 < step <= side:
                msg = (
                    f"Tiles need a stride from 1 to their size, got tile_size {self.tile_size} and stride "
                    f"{self.stride}. Three quarters of the size are a good stride."
                )
                raise ValueError(msg)

    def check(self, size: Size) -> None:
        """Refuse an image that is smaller than a tile.

        Args:
            size: Its height and width.

        Raises:
            ValueError: If it is.
        """
        if any(tile > side for tile, side in zip(self.tile_size, size, strict=True)):
            msg = (
                f"A tile of {self.tile_size[0]} x {self.tile_size[1]} pixels does not fit into an image of "
                f"{size[0]} x {size[1]}. Set a smaller tile_size, or take images that are larger."
            )
            raise ValueError(msg)

    def starts(self, size: Size) -> tuple[list[int], list[int]]:
        """Return the first row of each row of tiles, and the first column of each column, in an image of some size."""
        self.check(size)
        rows, columns = map(_starts, size, self.tile_size, self.stride)
        return rows, columns

    def random_tiles(self, images: Tensor) -> Tensor:
        """Cut a tile out of each image at random: ``(B, 3, H, W) -> (B, 3, h, w)``."""
        self.check((images.shape[-2], images.shape[-1]))
        return torch.stack([self._cut(image, *self._random_place(image)) for image in images])

    def central_tiles(self, images: Tensor) -> Tensor:
        """Cut the middle out of each image: ``(B, 3, H, W) -> (B, 3, h, w)``."""
        height, width = images.shape[-2:]
        self.check((height, width))
        return self._cut(images, (height - self.tile_size[0]) // 2, (width - self.tile_size[1]) // 2)

    def _random_place(self, image: Tensor) -> Size:
        top, left = (
            int(torch.randint(side - tile + 1, ())) for side, tile in zip(image.shape[-2:], self.tile_size, strict=True)
        )
        return top, left

    def _cut(self, image: Tensor, top: int, left: int) -> Tensor:
        return image[..., top : top + self.tile_size[0], left : left + self.tile_size[1]]

    def detect(self, images: Tensor, network: Detect) -> InferenceBatch:
        """Detect anomalies tile by tile.

        Args:
            images: ``(B, 3, H, W)``.
            network: Returns map ``(n, 1, ., .)`` and score ``(n,)`` of tiles ``(n, 3, h, w)``.

        Returns:
            Map ``(B, 1, H, W)``, blended where tiles overlap, and the score of the most anomalous tile.
        """
        size = (images.shape[-2], images.shape[-1])
        rows, columns = self.starts(size)
        row_weights, column_weights = (
            _weights(starts, side, tile).to(images.device)
            for starts, side, tile in zip((rows, columns), size, self.tile_size, strict=True)
        )
        strips: list[tuple[int, Tensor]] = []
        scores: list[Tensor] = []
        for maps, tile_scores in self._detect_rows(images, rows, columns, network):
            scores.append(tile_scores)
            for tiles in maps:  # of a row, ``(columns, B, 1, h, w)``
                placed = (
                    F.pad(tile * weight, (left, size[1] - left - self.tile_size[1]))
                    for tile, weight, left in zip(tiles, column_weights, columns, strict=True)
                )
                top, weight = rows[len(strips)], row_weights[len(strips)][:, None]
                strips.append((top, weight * reduce(torch.add, placed)))
        canvas = reduce(torch.add, (F.pad(s, (0, 0, top, size[0] - top - self.tile_size[0])) for top, s in strips))
        return InferenceBatch(anomaly_map=canvas, pred_score=torch.cat(scores).amax(dim=0))

    def _detect_rows(
        self, images: Tensor, rows: list[int], columns: list[int], network: Detect
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield maps ``(rows, columns, B, 1, h, w)`` and scores ``(tiles, B)``, a row of tiles at a time.

        An exported graph would have the network once for each batch of tiles, so there it sees all at once.
        """
        exporting = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
        for some in [rows] if exporting else [[row] for row in rows]:
            places = [(row, column) for row in some for column in columns]
            tiles = torch.cat([self._cut(images, *place) for place in places])  # places first
            found = [network(part) for part in ([tiles] if exporting else tiles.split(TILE_BATCH))]
            maps = torch.cat([cast("Tensor", part.anomaly_map) for part in found])
            maps = F.interpolate(maps, self.tile_size, mode="bilinear")
            scores = torch.cat([cast("Tensor", part.pred_score) for part in found])
            yield maps.unflatten(0, (len(some), len(columns), -1)), scores.unflatten(0, (len(places), -1))


class TiledModel(nn.Module):
    """A network for images of one size that takes larger ones by tiles, if there is a `tiling`.

    Attributes:
        image_size: Height and width that the network works at; tiles are resized to it.
        tiling: Tiles, None to take whole images of `image_size`.
    """

    image_size: Size
    tiling: Tiling | None = None

    @property
    def tiler(self) -> Tiler | None:
        """What anomalib's ``TilerConfigurationCallback`` sets."""
        if self.tiling is None:
            return None
        return Tiler(tile_size=self.tiling.tile_size, stride=self.tiling.stride)

    @tiler.setter
    def tiler(self, tiler: Tiler) -> None:
        if tiler.remove_border_count:
            msg = (
                f"remove_border_count must be 0, got {tiler.remove_border_count}: overlaps are blended to their edges."
            )
            raise ValueError(msg)
        self.tiling = Tiling(tile_size=(tiler.tile_size_h, tiler.tile_size_w), stride=(tiler.stride_h, tiler.stride_w))

    def tiles_to_learn(self, images: Tensor) -> Tensor:
        """Return what a training step sees of images ``(B, 3, H, W)``: a tile of each at random, or all of it."""
        return images if self.tiling is None else self._resize(self.tiling.random_tiles(images))

    def tiles_to_validate(self, images: Tensor) -> Tensor:
        """Return what the validation loss sees of images ``(B, 3, H, W)``: the middle of each, or all of it."""
        return images if self.tiling is None else self._resize(self.tiling.central_tiles(images))

    def by_tiles(self, images: Tensor, detect: Detect) -> InferenceBatch:
        """Detect anomalies in images ``(B, 3, H, W)`` as a whole or by tiles."""
        if self.tiling is None:
            return detect(images)
        return self.tiling.detect(images, lambda tiles: detect(self._resize(tiles)))

    def _resize(self, tiles: Tensor) -> Tensor:
        return antialiased_resize(tiles, self.image_size)


def make_tiling(tile_size: int | Sequence[int] | None, stride: int | Sequence[int] | None) -> Tiling | None:
    """Return the tiling of a model's arguments, None without a `tile_size`.

    Args:
        tile_size: Side, or height and width, of the tiles.
        stride: Likewise; None takes three quarters of the size.

    Raises:
        ValueError: If these are no sizes, or there is a `stride` alone.
    """
    if tile_size is None:
        if stride is not None:
            msg = f"stride {stride} needs a tile_size: without one the model takes whole images."
            raise ValueError(msg)
        return None
    tile = _pair("tile_size", tile_size)
    return Tiling(
        tile_size=tile,
        stride=(max(1, 3 * tile[0] // 4), max(1, 3 * tile[1] // 4)) if stride is None else _pair("stride", stride),
    )


def _pair(name: str, value: object) -> Size:
    sides = (value, value) if isinstance(value, int) else tuple(value) if hasattr(value, "__iter__") else ()
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        msg = f"{name} must be a number of pixels, or (height, width), got {value!r}."
        raise ValueError(msg)
    return sides[0], sides[1]


def _starts(side: int, tile: int, stride: int) -> list[int]:
    """Return where the tiles along an axis begin: as few as `stride` allows, evenly from one end to the other."""
    steps = math.ceil((side - tile) / stride)
    return [round(step * (side - tile) / max(1, steps)) for step in range(steps + 1)]


def _weights(starts: list[int], side: int, tile: int) -> Tensor:
    """Return the weights of the tiles along an axis, ``(tiles, tile)``: a bell each, all together one everywhere."""
    bell = torch.sin(torch.pi * (torch.arange(tile) + 0.5) / tile) ** 2
    total = torch.zeros(side)
    for start in starts:
        total[start : start + tile] += bell
    return torch.stack([bell / total[start : start + tile] for start in starts])

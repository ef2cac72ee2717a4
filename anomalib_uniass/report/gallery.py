# SPDX-License-Identifier: Apache-2.0
"""The images of a test that are worth a look: surest hits, worst misses, worst false alarms."""

import base64
import heapq
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import cv2
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Kind = Literal["misses", "false alarms", "hits"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PANEL = 144
"""Pixels of the longer side of a panel."""

FOUND, TRUE = (230, 60, 60), (60, 200, 90)
"""Colours of the predicted outline and of the annotated one."""

Pixels = npt.NDArray[np.uint8]


class TestedImage(NamedTuple):
    """An image of a test.

    Attributes:
        path: Its file.
        category: Its category.
        score: Score, as the post-processor left it.
        is_defective: Its label.
        is_flagged: The model's decision; None without a threshold.
    """

    path: str
    category: str
    score: float
    is_defective: bool
    is_flagged: bool | None

    def kinds(self) -> Iterable[Kind]:
        """Yield what the image may be an example of; without a threshold the order of scores has to tell."""
        if self.is_defective and self.is_flagged is not False:
            yield "hits"
        if self.is_defective and not self.is_flagged:
            yield "misses"
        if not self.is_defective and self.is_flagged is not False:
            yield "false alarms"


class Maps(NamedTuple):
    """What a picture shows beside the image, ``(h, w)`` each, at most `PANEL` wide and high; None where there is none.

    Attributes:
        anomaly_map: Anomaly map, as the post-processor left it.
        pred_mask: Predicted mask, bool.
        gt_mask: Annotated mask, bool.
    """

    anomaly_map: Tensor | None
    pred_mask: Tensor | None
    gt_mask: Tensor | None


@dataclass(order=True)
class Example:
    """An image of the gallery; examples compare by their rank."""

    rank: float
    image: TestedImage = field(compare=False)
    maps: Maps = field(compare=False)


class Gallery:
    """Keeps the most telling images of every category while a test goes on.

    Args:
        per_kind: Images to keep of each kind in each category.
    """

    def __init__(self, per_kind: int) -> None:
        self.per_kind = per_kind
        self.examples: dict[tuple[str, Kind], list[Example]] = defaultdict(list)

    def add(self, image: TestedImage, maps: Callable[[], Maps]) -> None:
        """Keep an image if it tells more than those kept so far.

        Args:
            image: The image.
            maps: Returns its maps; called only if they are kept.
        """
        for kind in image.kinds():
            kept, rank = self.examples[image.category, kind], -image.score if kind == "misses" else image.score
            if len(kept) < self.per_kind or rank > kept[0].rank:
                heapq.heappush(kept, Example(rank, image, maps()))
                if len(kept) > self.per_kind:
                    heapq.heappop(kept)

    def merge(self, others: Iterable["Gallery"]) -> "Gallery":
        """Return the most telling images of this gallery and others; an image that several have is shown once."""
        merged = Gallery(self.per_kind)
        for gallery in (self, *others):
            for key, examples in gallery.examples.items():
                seen = {example.image.path for example in merged.examples[key]}
                merged.examples[key] += [example for example in examples if example.image.path not in seen]
        for key, examples in merged.examples.items():
            merged.examples[key] = heapq.nlargest(self.per_kind, examples, key=lambda example: example.rank)
        return merged


def reduce_map(values: Tensor | None) -> Tensor | None:
    """Return a map or mask ``(H, W)`` or ``(1, H, W)`` on the CPU, small enough for a panel; the highest value stays.

    A mean would hide a defect of few pixels. Maps become bfloat16, enough for colours, and of any range.
    """
    if values is None:
        return None
    plane = values.detach().reshape(1, 1, *values.shape[-2:]).float().cpu()
    if (longest := max(plane.shape)) > PANEL:
        plane = F.adaptive_max_pool2d(plane, _scaled(plane.shape, PANEL / longest))
    return plane[0, 0].bfloat16() if values.dtype.is_floating_point else plane[0, 0].bool()


def _scaled(shape: Sequence[int], factor: float) -> tuple[int, int]:
    """Return height and width, the last two of a shape, times a factor; one at least."""
    return max(1, round(shape[-2] * factor)), max(1, round(shape[-1] * factor))


def picture(image: Tensor, maps: Maps, *, highest: float) -> str:
    """Draw image, annotated mask, anomaly map and outlines beside each other.

    Args:
        image: ``(3, H, W)`` in [0, 1].
        maps: Its maps; what is None has no panel.
        highest: Value of the map that becomes the brightest colour.

    Returns:
        A JPEG as a `data:` address.
    """
    height, width = _scaled(image.shape, PANEL / max(image.shape))
    pixels = (F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0] * 255).round()
    photograph: Pixels = pixels.clamp(0, 255).byte().permute(1, 2, 0).numpy().copy()
    size = (width, height)
    panels = [photograph]
    if maps.gt_mask is not None:
        panels.append(np.repeat(_resized(maps.gt_mask, size)[..., None] * np.uint8(255), 3, axis=2))
    if maps.anomaly_map is not None:
        values = cv2.resize(maps.anomaly_map.float().numpy(), size, interpolation=cv2.INTER_LINEAR)
        panels.append((mpl.colormaps["inferno"](np.clip(values / highest, 0, 1))[..., :3] * 255).astype(np.uint8))
    if maps.pred_mask is not None:
        outlined = photograph.copy()
        for mask, colour in ((maps.gt_mask, TRUE), (maps.pred_mask, FOUND)):
            if mask is not None:
                contours, _ = cv2.findContours(_resized(mask, size), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
                cv2.drawContours(outlined, contours, -1, colour, 1)
        panels.append(outlined)
    stream = io.BytesIO()
    gap = np.full((height, 2, 3), 128, dtype=np.uint8)
    strip = [part for panel in panels for part in (gap, panel)][1:]
    Image.fromarray(np.concatenate(strip, axis=1)).save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _resized(mask: Tensor, size: tuple[int, int]) -> Pixels:
    """Return a mask at a width and height, 0 or 1."""
    resized = cv2.resize(mask.numpy().astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    return resized.astype(np.uint8)

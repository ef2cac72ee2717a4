# SPDX-License-Identifier: Apache-2.0
"""Torchmetrics state around the pure functions: one row of metrics per category and their mean."""

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.distributed import gather_all_tensors

from anomalib_uniass.distribution import is_distributed, of_all_processes
from anomalib_uniass.metrics.compact import CompactMap, compress, rank_compact
from anomalib_uniass.metrics.functional import METRICS, PIXEL_METRICS, check_finite, image_metrics, rank_pixels

MEAN = "mean"

EXACT_PIXELS = 2**29
"""Pixels of a process, 2.7 GB of them, up to which maps are kept as they are."""

COUNTS = ("n_images", "n_anomalous")


class CategoryMetrics(Metric):
    """Pixel AP, DSC, F1-max, AUPRO, pixel and image AUROC of every category, and the mean over categories.

    The protocol of the UniAS release's evaluation: every category is scored over all its test images on raw maps; the
    reported value is the plain mean over categories.

    States are tensors that torchmetrics gathers across ranks, kept on the CPU: 5 bytes per pixel. Maps of different
    sizes, or of more than `EXACT_PIXELS` pixels in all, are kept in a few kilobytes each
    (:mod:`~anomalib_uniass.metrics.compact`), and metrics of pixels are close to the exact ones then. PyTorch's
    `DistributedSampler` repeats images until every rank has equally many. Hence an image counts on the first rank that
    has it; a rank by itself gets no repeats, so all that it has count.

    Args:
        categories: All category names that `update` may bring, the same on every rank.

    Attributes:
        precision_recall: Points (recall, precision) of the pixels' curve by category, as of the last `compute`.

    Raises:
        ValueError: If `categories` is empty, has duplicates or contains the reserved name "mean".

    Example:
        >>> metric = CategoryMetrics(["bottle"])
        >>> maps, masks = torch.tensor([[[0.1, 0.9]], [[0.2, 0.3]]]), torch.tensor([[[False, True]], [[False, False]]])
        >>> metric.update(maps, masks, maps.amax((1, 2)), masks.any(2).any(1), ["bottle", "bottle"])
        >>> metric.compute()["mean"]["pixel_AP"]
        1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    anomaly_map: list[Tensor]
    gt_mask: list[Tensor]
    positives: list[Tensor]
    regions: list[Tensor]
    bins: list[Tensor]
    counts: list[Tensor]
    lengths: list[Tensor]
    pred_score: list[Tensor]
    gt_label: list[Tensor]
    category_id: list[Tensor]
    image_key: list[Tensor]

    def __init__(self, categories: Sequence[str]) -> None:
        super().__init__(compute_on_cpu=True, dist_sync_fn=_gather_to_cpu)
        self.categories = tuple(sorted(categories))
        if not categories or len(set(categories)) != len(categories) or MEAN in categories:
            msg = f"categories must be distinct names other than {MEAN!r}, at least one; got {list(categories)}"
            raise ValueError(msg)
        self.precision_recall: dict[str, list[tuple[float, float]]] = {}
        # Names do not gather across ranks, ids do.
        self._ids = {name: index for index, name in enumerate(self.categories)}
        images = ("anomaly_map", "gt_mask", "pred_score", "gt_label", "category_id", "image_key")
        for state in (*images, *CompactMap._fields, "lengths"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    @property
    def map_size(self) -> tuple[int, int] | None:
        """(H, W) of the maps seen so far, None without maps or with maps of several sizes."""
        maps = _entries(self.anomaly_map)
        return (maps[0].shape[1], maps[0].shape[2]) if maps else None

    def update(
        self,
        anomaly_map: Tensor | None,
        gt_mask: Tensor | None,
        pred_score: Tensor,
        gt_label: Tensor,
        category: Sequence[str],
        image: Sequence[str] | None = None,
    ) -> None:
        """Keep copies of a batch; pixels are kept only if there are both maps and masks.

        Args:
            anomaly_map: (B, H, W) or (B, 1, H, W) raw scores (kept as float32), None if the model gives no maps.
            gt_mask: Masks of the same shape, nonzero is anomalous, None if the dataset has no masks.
            pred_score: (B,) image scores.
            gt_label: (B,) image labels, nonzero is anomalous.
            category: B category names.
            image: B names of the images, such as their paths, by which ranks know repeats. None, or an empty name, for
                images that have none and always count.

        Raises:
            ValueError: If shapes do not fit each other or earlier batches, a score is not finite, a category is
                unknown, or only some batches have maps and masks.
        """
        ids = self._category_ids(category)
        keys = _image_keys([""] * len(ids) if image is None else image)
        check_shape(keys[:, 0], (len(ids),), "image")
        check_shape(pred_score, (len(ids),), "pred_score")
        check_shape(gt_label, (len(ids),), "gt_label")
        check_finite(pred_score, "pred_score")
        has_pixels = anomaly_map is not None and gt_mask is not None
        if _entries(self.category_id) and has_pixels != self._has_pixels:
            msg = "expected anomaly maps and masks with every batch or with none, got both kinds of batches"
            raise ValueError(msg)
        if anomaly_map is not None and gt_mask is not None:
            self._append_pixels(anomaly_map, gt_mask, len(ids))
        self.pred_score.append(_cpu_copy(pred_score, torch.float32))
        self.gt_label.append(_cpu_copy(gt_label, torch.bool))
        self.category_id.append(ids)
        self.image_key.append(keys)

    def compute(self) -> dict[str, dict[str, float]]:
        """Compute every category, one after the other, and their mean.

        Returns:
            Rows by category in sorted order and "mean" last. A row holds `METRICS` in [0, 1] and the counts
            `n_images` and `n_anomalous`; the mean leaves NaN out, its counts are totals.
            Undefined values are NaN; one warning per category says why.
        """
        has_pixels = self._has_pixels
        if not has_pixels:
            rank_zero_warn(f"No anomaly maps or no masks were given: {', '.join(PIXEL_METRICS)} are NaN.", UserWarning)
        counted = self._counted()
        compact_maps = self._compact_maps() if _entries(self.lengths) else []
        table = {}
        for name, index in self._ids.items():
            row = self._compute_row(index, counted, compact_maps)
            _warn_undefined(name, row, has_pixels=has_pixels)
            table[name] = row
        table[MEAN] = _mean_row(list(table.values()))
        return table

    def _category_ids(self, category: Sequence[str]) -> Tensor:
        unknown = sorted(set(category) - set(self._ids))
        if unknown:
            msg = f"unknown categories {unknown}; this metric was built for {list(self.categories)}"
            raise ValueError(msg)
        return torch.tensor([self._ids[name] for name in category], dtype=torch.int64)

    @property
    def _has_pixels(self) -> bool:
        return bool(_entries(self.anomaly_map) or _entries(self.lengths))

    def _append_pixels(self, anomaly_map: Tensor, gt_mask: Tensor, batch_size: int) -> None:
        anomaly_map, gt_mask = (x.squeeze(1) if x.ndim == 4 else x for x in (anomaly_map, gt_mask))
        check_shape(anomaly_map, (batch_size, *anomaly_map.shape[-2:]), "anomaly_map")
        check_shape(gt_mask, tuple(anomaly_map.shape), "gt_mask")
        check_finite(anomaly_map, "anomaly_map")
        other_size = self.map_size not in (None, tuple(anomaly_map.shape[1:]))
        self.anomaly_map.append(_cpu_copy(anomaly_map, torch.float32))
        self.gt_mask.append(_cpu_copy(gt_mask, torch.bool))
        if self.lengths or other_size or self._exact_pixels > EXACT_PIXELS:
            self._compress()

    @property
    def _exact_pixels(self) -> int:
        return sum(batch.numel() for batch in self.anomaly_map)

    def _compress(self) -> None:
        """Keep the maps so far in compact form."""
        for maps, masks in zip(_entries(self.anomaly_map), _entries(self.gt_mask), strict=True):
            for image in map(compress, maps, masks):
                for state, values in image._asdict().items():
                    getattr(self, state).append(values)
                self.lengths.append(torch.tensor([[len(image.positives), len(image.bins)]]))
        self.anomaly_map, self.gt_mask = [], []

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all ranks, in compact form if they do not go together; arguments as of torchmetrics."""
        compact, sizes, pixels = zip(
            *of_all_processes((bool(self.lengths), self.map_size, self._exact_pixels)), strict=True
        )
        if any(compact) or len({*sizes} - {None}) > 1 or sum(pixels) > EXACT_PIXELS:
            self._compress()
        super().sync(*args, **kwargs)

    def _compact_maps(self) -> list[CompactMap]:
        """Return the compact maps of all images, in their order."""
        positives, bins = torch.cat(_entries(self.lengths)).T.tolist()
        lengths = CompactMap(positives=positives, regions=positives, bins=bins, counts=bins)
        parts = [
            torch.cat(_entries(getattr(self, name)) or [torch.empty(0)]).split(length)
            for name, length in lengths._asdict().items()
        ]
        return [CompactMap(*values) for values in zip(*parts, strict=True)]

    def _counted(self) -> list[Tensor]:
        """Return for every batch which images count, ``(B,)`` bool: those that no lower rank has too."""
        batches = _entries(self.image_key)
        if not batches:
            return []
        keys = torch.cat(batches)
        digest, rank = keys[:, :2], keys[:, 2]
        is_nameless = (digest == 0).all(dim=1)
        if is_nameless.any() and len(rank.unique()) > 1:
            rank_zero_warn(
                f"{int(is_nameless.sum())} images came without a name from several processes: those that the sampler "
                "repeated to give each process equally many count twice. Test in one process for exact figures.",
                UserWarning,
            )
        _, image = digest.unique(dim=0, return_inverse=True)
        first_rank = torch.full_like(rank, torch.iinfo(rank.dtype).max).scatter_reduce(0, image, rank, "amin")
        counted = is_nameless | (rank == first_rank[image])
        return list(counted.split([len(batch) for batch in batches]))

    def _compute_row(self, index: int, counted: list[Tensor], compact_maps: list[CompactMap]) -> dict[str, float]:
        categories = _entries(self.category_id)
        chosen = [(ids == index) & counts for ids, counts in zip(categories, counted, strict=True)]
        row = dict.fromkeys(METRICS, math.nan)
        n_images = sum(int(mask.sum()) for mask in chosen)
        if n_images == 0:
            return {**row, "n_images": 0, "n_anomalous": 0}
        label = _select(self.gt_label, chosen)
        row |= image_metrics(_select(self.pred_score, chosen), label)
        ranking = None
        if compact_maps:
            ranking = rank_compact(list(itertools.compress(compact_maps, torch.cat(chosen).tolist())))
        elif _entries(self.anomaly_map):
            ranking = rank_pixels(_select(self.anomaly_map, chosen), _select(self.gt_mask, chosen))
        if ranking is not None:
            row |= ranking.metrics()
            self.precision_recall[self.categories[index]] = ranking.precision_recall()
        return {**row, "n_images": n_images, "n_anomalous": int(label.sum())}


def check_shape(tensor: Tensor, expected: tuple[int, ...], name: str) -> None:
    """Raise a ValueError that names `name` unless the tensor has the expected shape."""
    if tuple(tensor.shape) != expected:
        msg = f"{name} must have shape {expected}, got {tuple(tensor.shape)}"
        raise ValueError(msg)


def _cpu_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Always a copy: anomalib's post-processor changes the batch after us.
    return tensor.detach().to("cpu", dtype, copy=True)


def _image_keys(names: Sequence[str]) -> Tensor:
    """Return ``(B, 3)`` int64: 128 bits of a hash of each name, 0 for an empty one, and the rank of this process."""
    rank = torch.distributed.get_rank() if is_distributed() else 0
    # Names do not gather across ranks; hashes of this length do not collide.
    digests = [
        hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=16).digest() if name else bytes(16)
        for name in names
    ]
    halves = [[int.from_bytes(half, "little", signed=True) for half in (d[:8], d[8:])] for d in digests]
    return torch.tensor([[*pair, rank] for pair in halves], dtype=torch.int64).view(-1, 3)


def _gather_to_cpu(state: Tensor, group: "torch.distributed.ProcessGroup | None" = None) -> list[Tensor]:
    """Gather one state of all ranks; NCCL cannot gather CPU tensors, so it goes through the rank's GPU."""
    kinds: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(kinds, (state.shape[1:], state.dtype) if state.numel() else None, group=group)
    seen = {kind for kind in kinds if kind is not None}
    if seen and not state.numel():
        # Of a rank that saw no image; gathering takes tensors of equally many dimensions.
        shape, dtype = seen.pop()
        state = torch.empty(0, *shape, dtype=dtype)
    on_gpu = torch.distributed.get_backend(group) == "nccl"
    return [part.cpu() for part in gather_all_tensors(state.cuda() if on_gpu else state, group)]


def _entries(state: list[Tensor] | Tensor) -> list[Tensor]:
    """Batches of a state: torchmetrics turns a gathered list into one tensor (an empty one if nothing was added)."""
    batches = [state] if isinstance(state, Tensor) else state
    return [batch for batch in batches if batch.numel()]


def _select(state: list[Tensor] | Tensor, chosen: list[Tensor]) -> Tensor:
    return torch.cat([batch[mask] for batch, mask in zip(_entries(state), chosen, strict=True)])


def _warn_undefined(name: str, row: dict[str, float], *, has_pixels: bool) -> None:
    candidates = METRICS if has_pixels else tuple(key for key in METRICS if key not in PIXEL_METRICS)
    undefined = [key for key in candidates if math.isnan(row[key])]
    if not undefined:
        return
    reasons = []
    if row["n_images"] == 0:
        reasons.append("it has no test images")
    elif math.isnan(row["image_AUROC"]):
        reasons.append(f"its test images are all {'anomalous' if row['n_anomalous'] else 'good'}")
    if row["n_images"] and "pixel_AP" in undefined:
        reasons.append("its masks have no anomalous pixel")
    elif row["n_images"] and "pixel_AUROC" in undefined:
        reasons.append("its masks have no normal pixel")
    rank_zero_warn(
        f"Category {name!r}: {' and '.join(reasons)}; NaN, and left out of the mean: {', '.join(undefined)}.",
        UserWarning,
    )


def _mean_row(rows: list[dict[str, float]]) -> dict[str, float]:
    means = {key: float(torch.tensor([row[key] for row in rows], dtype=torch.float64).nanmean()) for key in METRICS}
    return means | {key: sum(row[key] for row in rows) for key in COUNTS}

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from anomalib.data import MVTecADDataset
from anomalib.data.utils import random_split, read_image, read_mask, split_by_label
from torchvision.transforms.v2 import Resize
from torchvision.tv_tensors import Mask

from anomalib_uniass.data import UnifiedDataset
from anomalib_uniass.data.dataset import category_augmentation
from tests.helpers.datasets import make_mvtec_layout

HEIGHT, WIDTH = 24, 16


@pytest.fixture
def dataset(tmp_path: Path) -> UnifiedDataset:
    root = make_mvtec_layout(tmp_path, ["nut", "bolt"], (HEIGHT, WIDTH), good=2, defective=3)
    return UnifiedDataset.join({c: MVTecADDataset(root, c, split="test") for c in ("nut", "bolt")})


def symmetries(image: torch.Tensor) -> list[torch.Tensor]:
    """The four quarter turns of an image, then those of its mirror image."""
    return [torch.rot90(x, k, (-2, -1)) for x in (image, image.flip(-1)) for k in range(4)]


def which(image: torch.Tensor, candidates: list[torch.Tensor]) -> int:
    (found,) = [i for i, candidate in enumerate(candidates) if torch.equal(image, candidate)]
    return found


def test_join(dataset: UnifiedDataset) -> None:
    assert len(dataset) == 10
    assert dataset.samples["category"].value_counts().to_dict() == {"nut": 5, "bolt": 5}
    assert all(Path(row.image_path).parents[2].name == row.category for row in dataset.samples.itertuples())
    assert dataset.task == "segmentation"


def test_items_are_those_of_the_source(dataset: UnifiedDataset, tmp_path: Path) -> None:
    source = MVTecADDataset(tmp_path, "bolt", split="test")
    for i in range(5):  # bolt sorts before nut
        item, expected = dataset[i], source[i]
        assert item.image_path == expected.image_path
        assert torch.equal(item.image, expected.image)
        assert torch.equal(item.gt_mask, expected.gt_mask)
        assert item.gt_label == expected.gt_label


def test_anomalib_operations_keep_the_category(dataset: UnifiedDataset) -> None:
    dataset.category_augmentations["nut"] = Resize((8, 8))
    normal, anomalous = split_by_label(dataset)
    assert (len(normal), len(anomalous)) == (4, 6)
    first, second = random_split(dataset, 0.4, label_aware=True, seed=0)
    assert len(first) + len(second) == 10
    both = normal + anomalous
    assert sorted(both.samples.image_path) == sorted(dataset.samples.image_path)
    for part in (normal, anomalous, first, second, both, dataset.subsample([7])):
        assert isinstance(part, UnifiedDataset)
        assert part.task == "segmentation"
        assert all(Path(row.image_path).parents[2].name == row.category for row in part.samples.itertuples())
        assert all((part[i].image.shape[-1] == 8) == (part.samples.category[i] == "nut") for i in range(len(part)))
    assert len(dataset) == 10


def test_join_refuses_mixed_tasks(tmp_path: Path) -> None:
    parts = {c: MVTecADDataset(make_mvtec_layout(tmp_path, [c], 8), c, split="test") for c in ("a", "b")}
    parts["b"].samples.attrs["task"] = "classification"
    with pytest.raises(ValueError, match=r"same task.*'a': 'segmentation', 'b': 'classification'"):
        UnifiedDataset.join(parts)


def test_broken_file_is_named(dataset: UnifiedDataset) -> None:
    for column in ("image_path", "mask_path"):
        path = Path(dataset.samples[column][4])
        good = path.read_bytes()
        path.write_bytes(good[: len(good) // 2])
        with pytest.raises(RuntimeError, match=f"Cannot read image .*{path.name}.*category 'bolt'"):
            dataset[4]
        path.unlink()
        with pytest.raises(
            RuntimeError, match=rf"(?s){path.name}: missing.*Put it back or take it out, and start again"
        ):
            dataset[4]
        path.write_bytes(good)
    dataset[4]


def test_no_augmentation() -> None:
    assert category_augmentation(hflip=False, vflip=False, rotate=False) is None


@pytest.mark.parametrize(
    ("flips", "expected"),
    [
        # index into symmetries(): 0 as is, 2 half turn, 4 mirrored, 6 mirrored and turned = upside down
        ({"hflip": True, "vflip": False, "rotate": False}, {0: 0.7, 4: 0.3}),
        ({"hflip": False, "vflip": True, "rotate": False}, {0: 0.7, 6: 0.3}),
        ({"hflip": False, "vflip": False, "rotate": True}, {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}),
        ({"hflip": True, "vflip": True, "rotate": False}, {0: 0.49, 4: 0.21, 6: 0.21, 2: 0.09}),
        # one flip of the two: 0.42, no or both: 0.58, then a uniform quarter turn
        (
            {"hflip": True, "vflip": True, "rotate": True},
            {**dict.fromkeys(range(4), 0.145), **dict.fromkeys(range(4, 8), 0.105)},
        ),
    ],
)
def test_augmentation_moves_image_and_mask_together_with_the_right_chances(
    dataset: UnifiedDataset, flips: dict[str, bool], expected: dict[int, float]
) -> None:
    augmentation = category_augmentation(**flips)
    assert augmentation is not None
    sample = dataset.samples.iloc[4]  # anomalous
    image, mask = read_image(sample.image_path, as_tensor=True), read_mask(sample.mask_path, as_tensor=True)
    images, masks = symmetries(image), symmetries(mask)
    torch.manual_seed(0)
    draws, counts = 1500, dict.fromkeys(range(8), 0)
    for _ in range(draws):
        moved_image, moved_mask = augmentation(image, mask)
        index = which(moved_image, images)
        assert torch.equal(moved_mask, masks[index])
        counts[index] += 1
    for index, count in counts.items():
        chance = expected.get(index, 0.0)
        assert abs(count / draws - chance) <= 4 * (chance * (1 - chance) / draws) ** 0.5


def test_augmentation_by_category_and_before_the_resize(dataset: UnifiedDataset) -> None:
    plain = [dataset[i] for i in range(len(dataset))]
    dataset.category_augmentations = {"nut": category_augmentation(hflip=True, vflip=True, rotate=True)}
    dataset.augmentations = Resize((8, 12), antialias=True)
    torch.manual_seed(0)
    seen: dict[str, set[int]] = {"nut": set(), "bolt": set()}
    for _ in range(20):
        for i, before in enumerate(plain):
            candidates = [dataset.augmentations(x) for x in symmetries(before.image)]
            masks = [dataset.augmentations(Mask(x)) for x in symmetries(before.gt_mask)]
            item = dataset[i]
            index = which(item.image, candidates)
            assert torch.equal(item.gt_mask, masks[index])
            seen[dataset.samples.category[i]].add(index)
    assert seen == {"nut": set(range(8)), "bolt": {0}}


def test_draws_follow_torch_seed(dataset: UnifiedDataset) -> None:
    dataset.category_augmentations = {"nut": category_augmentation(hflip=True, vflip=True, rotate=True)}

    def draw() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [dataset[9].image for _ in range(8)]

    assert all(torch.equal(a, b) for a, b in zip(draw(), draw(), strict=True))

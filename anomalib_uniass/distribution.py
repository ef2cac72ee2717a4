# SPDX-License-Identifier: Apache-2.0
"""What processes of a distributed run tell each other, and what they need not."""

from collections.abc import Iterable
from typing import Protocol, TypeVar, cast

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class OfImage(Protocol):
    """What is kept of an image, with its path or ""."""

    @property
    def path(self) -> str:
        """Return the path."""


Image = TypeVar("Image", bound=OfImage)


def is_distributed() -> bool:
    """Return whether this is one of several processes of a run."""
    return distributed.is_available() and distributed.is_initialized()


def is_first_process() -> bool:
    """Return whether this is process 0, or the only one."""
    return not is_distributed() or distributed.get_rank() == 0


def of_all_processes(value: T) -> list[T]:
    """Return the values of all processes by rank; the value alone without a distributed run."""
    if not is_distributed():
        return [value]
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return cast("list[T]", values)


def joined(parts: Iterable[Iterable[Image]]) -> list[Image]:
    """Join what processes keep of images, without those that an earlier one has too.

    The sampler repeats images until every process has equally many; a process by itself gets no repeats.
    """
    found: list[Image] = []
    seen: set[str] = set()
    for part in parts:
        new = [image for image in part if image.path not in seen]
        found += new
        seen |= {image.path for image in new if image.path}
    return found


def keep_constants_local(model: nn.Module, frozen: Iterable[nn.Module]) -> None:
    """Let `DistributedDataParallel` leave constants alone, all of which it would send from process 0 in every step.

    Constants are all buffers of frozen parts, and buffers outside the state dict, which every process makes by itself.

    Args:
        model: The model, not yet wrapped.
        frozen: Parts of it that do not change in training.
    """
    still = {id(buffer) for part in frozen for buffer in part.buffers()}
    # By hand: to ask for the state fetches the backbone's weights, which a checkpoint may be about to bring.
    still |= {id(module._buffers[name]) for module in model.modules() for name in module._non_persistent_buffers_set}
    constants = [name for name, buffer in model.named_buffers() if id(buffer) in still]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, constants)

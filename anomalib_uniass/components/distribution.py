# SPDX-License-Identifier: Apache-2.0
"""What processes of a distributed training need not tell each other."""

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from anomalib_uniass.components.folding import FoldingModule


def keep_constants_local(model: nn.Module, frozen: Iterable[nn.Module]) -> None:
    """Let `DistributedDataParallel` leave constants alone, all of which it would send from process 0 in every step.

    Constants are all buffers of frozen parts, and buffers outside the state dict, which every process makes by itself
    from its weights. Buffers that training changes are still sent, and with them what is made from them: it does not
    notice that they came, for `DistributedDataParallel` hides its writes from the tensors' version counters.

    Args:
        model: The model, not yet wrapped.
        frozen: Parts of it that do not change in training.
    """
    for module in model.modules():
        if isinstance(module, FoldingModule):
            module.fold_ahead()  # constants that come later, in the first evaluation, would not be known by name
    saved = model.state_dict().keys()
    still = {id(buffer) for part in frozen for buffer in part.buffers()}
    buffers = dict(model.named_buffers())
    changing = {name for name, buffer in buffers.items() if name in saved and id(buffer) not in still}
    owners = {name.rpartition(".")[0] for name in changing}
    constants = [name for name in buffers if name not in changing and name.rpartition(".")[0] not in owners]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, constants)

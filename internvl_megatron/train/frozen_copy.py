"""A second set of weights for the same modules, kept in host memory, that takes the place of the first for a while.

The reference model of preference training is the policy before its first update. Both run through the same schedule, so the
reference needs no modules, groups or device memory of its own: its parameters are swapped in, and out again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from internvl_megatron.device import Device
from internvl_megatron.model.build import Model
from internvl_megatron.model.vision_shards import local_shard


class FrozenCopy:
    """This rank's part of all parameters that are trained, as they are when it is made; the others stay the same anyway.

    One set of host memory holds whichever of the two is not in the modules.
    """

    def __init__(self, model: Model, device: Device, gather_parameters: Callable[[], None]) -> None:
        """Copy the parameters.

        Args:
            model: of this rank.
            device: where its parameters are.
            gather_parameters: has them up to date on this rank; collective.
        """
        self._gather_parameters = gather_parameters
        gather_parameters()
        trained = [parameter for _, parameter in model.named_parameters() if parameter.requires_grad]
        self._parameters = [local_shard(parameter.detach()) for parameter in trained]
        self._kept = device.copy_all_to_host(self._parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block the modules have the copied parameters, after it their own; collective over all ranks.

        Nothing may be updated in it, and no parameter may still be on its way from other ranks when it begins: gathering them
        would overwrite the copy.
        """
        self._gather_parameters()
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            own = parameter.clone()
            parameter.copy_(kept, non_blocking=True)
            kept.copy_(own, non_blocking=True)

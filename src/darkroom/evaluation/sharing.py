"""What several processes that draw or measure together have to offer."""

from typing import Protocol

from torch import Tensor


class Sharing(Protocol):
    """Processes that work on one thing together: `training.distributed.Ranks`, or `Alone`."""

    def share(self, size: int) -> slice: ...

    def gather(self, share: Tensor, size: int) -> Tensor | None: ...


class Alone:
    """One process: it has all."""

    def share(self, size: int) -> slice:
        return slice(0, size)

    def gather(self, share: Tensor, size: int) -> Tensor | None:
        return share

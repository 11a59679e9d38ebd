"""What goes wrong between ranks."""

from __future__ import annotations

__all__ = ["RoundError"]


class RoundError(RuntimeError):
    """A round of averaging failed: a rank died, did not answer within the group's timeout, or could not take part.

    Attributes:
        round: the number of the round (of the step, for `DataParallel`) that failed, from 1.
        restored: whether the parameters are those of the round before, bit for bit.
    """

    def __init__(self, message: str, round: int, restored: bool) -> None:
        super().__init__(message)
        self.round = round
        self.restored = restored

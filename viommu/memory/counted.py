"""What several share and the last one frees: a count of uses."""

from __future__ import annotations

from typing import Self

from viommu.errors import UsageError

__all__ = ["Counted"]


class Counted:
    """Counts uses and frees what they share with the last one; a context manager of one use.

    It starts with one use, its creator's; every :meth:`retain` needs one :meth:`close`.
    What is freed is for subclasses to say, in ``_free``.
    """

    __slots__ = ("_uses",)

    def __init__(self) -> None:
        self._uses = 1

    @property
    def uses(self) -> int:
        """Return how many uses were not given back."""
        return self._uses

    def retain(self) -> Self:
        """Take one more use.

        Raises:
            UsageError: The last use was given back.
        """
        if not self._uses:
            raise UsageError(f"{self} is closed")
        self._uses += 1
        return self

    def close(self) -> None:
        """Give one use back.

        Raises:
            UsageError: More was given back than taken.
        """
        if not self._uses:
            raise UsageError(f"{self} was closed more often than retained")
        self._uses -= 1
        if not self._uses:
            self._free()

    def _free(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

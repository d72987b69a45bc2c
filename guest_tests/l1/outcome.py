"""What came of a call to the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from viommu.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["number_of"]


def number_of(call: Callable[..., object], *arguments: object) -> int:
    """Return the errno that the kernel refuses a call with, 0 if it doesn't."""
    try:
        call(*arguments)
    except (BackendError, OSError) as error:
        return error.errno or 0
    return 0

"""Whose fault it is, and what the guest is told."""

import errno

import pytest

from viommu import errors
from viommu.errors import Access
from viommu.spec.virtio_iommu import FaultReason, Status


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.GuestError(Status.RANGE, "x"), Status.RANGE),
        (errors.BackendError(errno.ENOMEM, "x"), Status.NOMEM),
        (errors.BackendError(errno.ENOSPC, "x"), Status.NOMEM),
        (errors.BackendError(errno.EFAULT, "x"), Status.FAULT),
        (errors.BackendError(errno.EIO, "x"), Status.DEVERR),
        (errors.GuestMemoryError(0, 1, "x"), Status.FAULT),
        (errors.TranslationFault(0, Access.READ), Status.FAULT),
        (errors.InternalError("x"), Status.DEVERR),
    ],
)
def test_status_of(error: errors.ViommuError, status: int) -> None:
    assert errors.status_of(error) == status


def test_every_exception_is_public_and_has_one_parent() -> None:
    for name in errors.__all__:
        thing = getattr(errors, name)
        if isinstance(thing, type) and issubclass(thing, Exception):
            assert issubclass(thing, errors.ViommuError)


def test_messages_show_the_offending_value() -> None:
    fault = errors.TranslationFault(0x1234, Access.READ | Access.WRITE, FaultReason.DOMAIN)

    assert str(fault) == "read+write at IOVA 0x1234 faulted: domain"
    assert "[0x1000, 0x1800)" in str(errors.GuestMemoryError(0x1000, 0x800, "not memory"))
    assert "No space left" in str(errors.BackendError(errno.ENOSPC, "map"))


def test_a_usage_error_is_a_value_error() -> None:
    assert issubclass(errors.UsageError, ValueError)


def test_access_in_letters() -> None:
    assert [Access(value).letters for value in range(4)] == ["--", "r-", "-w", "rw"]

from __future__ import annotations

import pytest

from viommu.cli.exit_codes import (
    EXIT_CODES,
    CliError,
    CliUsageError,
    ExitCode,
    HostLacksError,
    cli_error,
)
from viommu.errors import BackendError, PeerError, UsageError, ViommuError
from viommu.vmm import UnsuitableQemuError


def test_every_exit_code_has_its_meaning() -> None:
    assert list(EXIT_CODES) == list(ExitCode)
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (UsageError("m"), CliUsageError, ExitCode.USAGE),
        (UnsuitableQemuError("m"), HostLacksError, ExitCode.HOST),
        (PeerError(5, "m"), CliError, ExitCode.FAILURE),
        (BackendError(12, "m"), CliError, ExitCode.FAILURE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_the_library_has_its_exit_code(
    error: ViommuError, kind: type[CliError], code: ExitCode
) -> None:
    found = cli_error(error)

    assert type(found) is kind
    assert (found.exit_code, found.message) == (code, str(error))

"""What a device can be configured to offer."""

import pytest

from viommu.config import IommuConfig, Limits
from viommu.errors import UsageError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("page_size_mask", 0),
        ("page_size_mask", 1 << 64),
        ("input_range", (5, 5)),
        ("input_range", (0, (1 << 64) + 1)),
        ("domain_range", (0, (1 << 32) + 1)),
        ("probe_size", 20),
        ("probe_size", 30),
        ("probe_size", 1 << 17),
    ],
)
def test_a_configuration_that_can_not_work_is_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        IommuConfig(**{field: value})  # type: ignore[arg-type]


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="mappings"):
        Limits(mappings=0)

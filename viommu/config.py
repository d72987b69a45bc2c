"""What a virtio-iommu offers, and how much it remembers for a guest (half-open ranges)."""

from __future__ import annotations

from dataclasses import dataclass, field

from viommu.basic import DEFAULT_PAGE_SIZES
from viommu.errors import UsageError
from viommu.iova import ADDRESS_SPACE_END
from viommu.spec import virtio_iommu as spec

__all__ = ["IommuConfig", "Limits"]


@dataclass(frozen=True)
class Limits:
    """What a guest can make the device remember; beyond it requests get NOMEM.

    Linux uses a domain for each group and a mapping for each DMA in flight.
    Precedents: Cloud Hypervisor allows 2**16 domains and 2**20 mappings each.
    """

    domains: int = 4096
    mappings_per_domain: int = 1 << 20
    mappings: int = 1 << 21
    pending_faults: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UsageError(f"limit {name} must be positive, not {value}")


@dataclass(frozen=True)
class IommuConfig:
    """What the device offers. Ranges are half-open.

    ``page_size_mask`` has a bit for each page size, the lowest is the granule.
    ``input_range`` is the IOVAs that can be mapped, ``domain_range`` the domain
    numbers. ``boot_bypass``: unattached endpoints reach all of guest memory.
    """

    page_size_mask: int = DEFAULT_PAGE_SIZES
    input_range: tuple[int, int] = (0, 1 << 48)
    domain_range: tuple[int, int] = (0, 1 << 32)
    probe_size: int = 512
    boot_bypass: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 < self.page_size_mask < ADDRESS_SPACE_END:
            raise UsageError(
                f"page_size_mask needs a bit below 2**64, not {self.page_size_mask:#x}"
            )
        for name, (start, end), top in (
            ("input_range", self.input_range, ADDRESS_SPACE_END),
            ("domain_range", self.domain_range, 1 << 32),
        ):
            if not 0 <= start < end <= top:
                raise UsageError(f"{name} [{start:#x}, {end:#x}) is empty or passes {top:#x}")
        if not spec.RESV_MEM.size <= self.probe_size <= 1 << 16 or self.probe_size % 4:
            raise UsageError(f"probe_size {self.probe_size} is not a multiple of 4 in 24 to 65536")

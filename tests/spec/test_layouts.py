"""Every wire structure: against a table, against the C headers, against its struct format."""

from __future__ import annotations

import ctypes
import random
import struct
from typing import Any, NamedTuple

import pytest

from tests.spec.c_header import c_constants, c_layout
from viommu.spec import pci, vfio, virtio_config, virtio_iommu, virtio_pci, virtio_ring
from viommu.spec._struct import Struct, sizeof

IOMMU_H = "linux/virtio_iommu.h"
RING_H = "linux/virtio_ring.h"
CONFIG_H = "linux/virtio_config.h"
PCI_H = "linux/virtio_pci.h"
REGS_H = "linux/pci_regs.h"
VFIO_H = "linux/vfio.h"


class Field(NamedTuple):
    name: str
    offset: int
    size: int
    c_name: str = ""


class Layout(NamedTuple):
    kind: type[Struct]
    size: int
    fields: tuple[Field, ...]
    header: str | None = None
    c_type: str = ""


def layout(
    kind: type[Struct], size: int, fields: str, header: str | None = None, c_type: str = ""
) -> Layout:
    """Parse ``name[=c_name]@offset+size`` words."""
    table = []
    for word in fields.split():
        names, where = word.split("@")
        name, _, c_name = names.partition("=")
        offset, count = where.split("+")
        table.append(Field(name, int(offset, 0), int(count, 0), c_name or name))
    return Layout(kind, size, tuple(table), header, c_type)


LAYOUTS = [
    layout(virtio_iommu.Range64, 16, "start@0+8 end@8+8", IOMMU_H, "struct virtio_iommu_range_64"),
    layout(virtio_iommu.Range32, 8, "start@0+4 end@4+4", IOMMU_H, "struct virtio_iommu_range_32"),
    layout(
        virtio_iommu.Config,
        40,
        "page_size_mask@0+8 input_range@8+16 domain_range@24+8 probe_size@32+4 bypass@36+1"
        " reserved@37+3",
        IOMMU_H,
        "struct virtio_iommu_config",
    ),
    layout(
        virtio_iommu.ReqHead, 4, "type@0+1 reserved@1+3", IOMMU_H, "struct virtio_iommu_req_head"
    ),
    layout(
        virtio_iommu.ReqTail, 4, "status@0+1 reserved@1+3", IOMMU_H, "struct virtio_iommu_req_tail"
    ),
    layout(
        virtio_iommu.AttachRequest,
        24,
        "head@0+4 domain@4+4 endpoint@8+4 flags@12+4 reserved@16+4 tail@20+4",
        IOMMU_H,
        "struct virtio_iommu_req_attach",
    ),
    layout(
        virtio_iommu.DetachRequest,
        24,
        "head@0+4 domain@4+4 endpoint@8+4 reserved@12+8 tail@20+4",
        IOMMU_H,
        "struct virtio_iommu_req_detach",
    ),
    layout(
        virtio_iommu.MapRequest,
        40,
        "head@0+4 domain@4+4 virt_start@8+8 virt_end@16+8 phys_start@24+8 flags@32+4 tail@36+4",
        IOMMU_H,
        "struct virtio_iommu_req_map",
    ),
    layout(
        virtio_iommu.UnmapRequest,
        32,
        "head@0+4 domain@4+4 virt_start@8+8 virt_end@16+8 reserved@24+4 tail@28+4",
        IOMMU_H,
        "struct virtio_iommu_req_unmap",
    ),
    layout(
        virtio_iommu.ProbeRequest,
        72,
        "head@0+4 endpoint@4+4 reserved@8+64",
        IOMMU_H,
        "struct virtio_iommu_req_probe",
    ),
    layout(
        virtio_iommu.ProbeProperty,
        4,
        "type@0+2 length@2+2",
        IOMMU_H,
        "struct virtio_iommu_probe_property",
    ),
    layout(
        virtio_iommu.ResvMemProperty,
        24,
        "head@0+4 subtype@4+1 reserved@5+3 start@8+8 end@16+8",
        IOMMU_H,
        "struct virtio_iommu_probe_resv_mem",
    ),
    layout(
        virtio_iommu.Fault,
        24,
        "reason@0+1 reserved@1+3 flags@4+4 endpoint@8+4 reserved2@12+4 address@16+8",
        IOMMU_H,
        "struct virtio_iommu_fault",
    ),
    layout(
        virtio_ring.Desc,
        16,
        "addr@0+8 len@8+4 flags@12+2 next@14+2",
        RING_H,
        "struct vring_desc",
    ),
    layout(virtio_ring.AvailHeader, 4, "flags@0+2 idx@2+2", RING_H, "struct vring_avail"),
    layout(virtio_ring.UsedHeader, 4, "flags@0+2 idx@2+2", RING_H, "struct vring_used"),
    layout(virtio_ring.UsedElem, 8, "id@0+4 len@4+4", RING_H, "struct vring_used_elem"),
    layout(
        virtio_pci.Cap,
        16,
        "cap_vndr@0+1 cap_next@1+1 cap_len@2+1 cfg_type@3+1 bar@4+1 id@5+1 padding@6+2 offset@8+4"
        " length@12+4",
        PCI_H,
        "struct virtio_pci_cap",
    ),
    layout(
        virtio_pci.NotifyCap,
        20,
        "cap@0+16 notify_off_multiplier@16+4",
        PCI_H,
        "struct virtio_pci_notify_cap",
    ),
    layout(virtio_pci.CfgCap, 20, "cap@0+16 pci_cfg_data@16+4", PCI_H, "struct virtio_pci_cfg_cap"),
    layout(
        virtio_pci.CommonCfg,
        60,
        "device_feature_select@0+4 device_feature@4+4"
        " driver_feature_select=guest_feature_select@8+4 driver_feature=guest_feature@12+4"
        " config_msix_vector=msix_config@16+2 num_queues@18+2 device_status@20+1"
        " config_generation@21+1 queue_select@22+2 queue_size@24+2 queue_msix_vector@26+2"
        " queue_enable@28+2 queue_notify_off@30+2 queue_desc_lo@32+4 queue_desc_hi@36+4"
        " queue_driver_lo=queue_avail_lo@40+4 queue_driver_hi=queue_avail_hi@44+4"
        " queue_device_lo=queue_used_lo@48+4 queue_device_hi=queue_used_hi@52+4"
        " queue_notify_data=@56+2 queue_reset=@58+2",
        PCI_H,
        "struct virtio_pci_common_cfg",
    ),
    layout(
        pci.Header,
        64,
        "vendor_id@0+2 device_id@2+2 command@4+2 status@6+2 revision_id@8+1 prog_if@9+1"
        " subclass@10+1 base_class@11+1 cache_line_size@12+1 latency_timer@13+1 header_type@14+1"
        " bist@15+1 bar@16+24 cardbus_cis@40+4 subsystem_vendor_id@44+2 subsystem_id@46+2"
        " rom@48+4 capabilities@52+1 reserved@53+7 interrupt_line@60+1 interrupt_pin@61+1"
        " min_gnt@62+1 max_lat@63+1",
    ),
    layout(pci.PmCap, 8, "cap_id@0+1 cap_next@1+1 pmc@2+2 ctrl@4+2 bridge@6+1 data@7+1"),
    layout(
        pci.ExpressCap,
        60,
        "cap_id@0+1 cap_next@1+1 flags@2+2 devcap@4+4 devctl@8+2 devsta@10+2 lnkcap@12+4"
        " lnkctl@16+2 lnksta@18+2 slot_and_root@20+16 devcap2@36+4 devctl2@40+2 devsta2@42+2"
        " lnkcap2@44+4 lnkctl2@48+2 lnksta2@50+2 slot2@52+8",
    ),
    layout(
        pci.MsiCap,
        16,
        "cap_id@0+1 cap_next@1+1 ctrl@2+2 address_lo@4+4 address_hi@8+4 data@12+2",
    ),
    layout(pci.MsixCap, 12, "cap_id@0+1 cap_next@1+1 ctrl@2+2 table@4+4 pba@8+4"),
    layout(pci.MsixEntry, 16, "address_lo@0+4 address_hi@4+4 data@8+4 vector_ctrl@12+4"),
]
LAYOUT_IDS = [f"{row.kind.__module__.rpartition('.')[2]}.{row.kind.__name__}" for row in LAYOUTS]

# Fields of virtio 1.2 that <linux/virtio_pci.h> has as macros only.
NEWER_THAN_C = {
    "queue_notify_data": "VIRTIO_PCI_COMMON_Q_NDATA",
    "queue_reset": "VIRTIO_PCI_COMMON_Q_RESET",
}
# Types that end without those fields in C.
LONGER_THAN_C: dict[type[Struct], int] = {virtio_pci.CommonCfg: 56}


@pytest.mark.parametrize("row", LAYOUTS, ids=LAYOUT_IDS)
def test_offsets_and_sizes(row: Layout) -> None:
    declared: Any = row.kind
    got = [
        (name, getattr(declared, name).offset, getattr(declared, name).size)
        for name, *_ in declared._fields_
    ]
    assert got == [field[:3] for field in row.fields]
    assert sizeof(row.kind) == row.size


def test_every_structure_is_in_the_table() -> None:
    listed = {row.kind for row in LAYOUTS}
    for module in (virtio_iommu, virtio_ring, virtio_pci, pci):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Struct) and value is not Struct:
                assert value in listed, value


@pytest.mark.parametrize("row", [row for row in LAYOUTS if row.header], ids=lambda r: r.c_type)
def test_offsets_and_sizes_of_the_c_headers(row: Layout) -> None:
    assert row.header is not None
    known = [field for field in row.fields if field.name not in NEWER_THAN_C]
    layout_in_c = c_layout(row.header, row.c_type, [field.c_name for field in known])
    size_in_c = c_constants(row.header, [size := f"sizeof({row.c_type})"])
    if layout_in_c is None or size_in_c is None:
        pytest.skip("no C compiler, or no kernel headers")
    for field in known:
        assert layout_in_c[field.c_name] == (field.offset, field.size), field
    assert size_in_c[size] in {row.size, LONGER_THAN_C.get(row.kind)}


# fmt: off
CONSTANTS: list[tuple[str, dict[str, int]]] = [
    (CONFIG_H, {
        "VIRTIO_CONFIG_S_ACKNOWLEDGE": virtio_config.STATUS_ACKNOWLEDGE,
        "VIRTIO_CONFIG_S_DRIVER": virtio_config.STATUS_DRIVER,
        "VIRTIO_CONFIG_S_DRIVER_OK": virtio_config.STATUS_DRIVER_OK,
        "VIRTIO_CONFIG_S_FEATURES_OK": virtio_config.STATUS_FEATURES_OK,
        "VIRTIO_CONFIG_S_NEEDS_RESET": virtio_config.STATUS_DEVICE_NEEDS_RESET,
        "VIRTIO_CONFIG_S_FAILED": virtio_config.STATUS_FAILED,
        "VIRTIO_F_VERSION_1": virtio_config.Feature.VERSION_1,
        "VIRTIO_F_ACCESS_PLATFORM": virtio_config.Feature.ACCESS_PLATFORM,
        "VIRTIO_F_RING_PACKED": virtio_config.Feature.RING_PACKED,
        "VIRTIO_F_IN_ORDER": virtio_config.Feature.IN_ORDER,
        "VIRTIO_F_ORDER_PLATFORM": virtio_config.Feature.ORDER_PLATFORM,
        "VIRTIO_F_SR_IOV": virtio_config.Feature.SR_IOV,
        "VIRTIO_F_RING_RESET": virtio_config.Feature.RING_RESET,
    }),
    (RING_H, {
        "VIRTIO_RING_F_INDIRECT_DESC": virtio_config.Feature.RING_INDIRECT_DESC,
        "VIRTIO_RING_F_EVENT_IDX": virtio_config.Feature.RING_EVENT_IDX,
        "VRING_DESC_F_NEXT": virtio_ring.DESC_F_NEXT,
        "VRING_DESC_F_WRITE": virtio_ring.DESC_F_WRITE,
        "VRING_DESC_F_INDIRECT": virtio_ring.DESC_F_INDIRECT,
        "VRING_USED_F_NO_NOTIFY": virtio_ring.USED_F_NO_NOTIFY,
        "VRING_AVAIL_F_NO_INTERRUPT": virtio_ring.AVAIL_F_NO_INTERRUPT,
        "VRING_DESC_ALIGN_SIZE": virtio_ring.DESC_ALIGN,
        "VRING_AVAIL_ALIGN_SIZE": virtio_ring.AVAIL_ALIGN,
        "VRING_USED_ALIGN_SIZE": virtio_ring.USED_ALIGN,
        "offsetof(struct vring_avail, ring)": virtio_ring.RING_OFFSET,
        "offsetof(struct vring_used, ring)": virtio_ring.RING_OFFSET,
    }),
    (PCI_H, {
        "VIRTIO_PCI_CAP_COMMON_CFG": virtio_pci.CfgType.COMMON,
        "VIRTIO_PCI_CAP_NOTIFY_CFG": virtio_pci.CfgType.NOTIFY,
        "VIRTIO_PCI_CAP_ISR_CFG": virtio_pci.CfgType.ISR,
        "VIRTIO_PCI_CAP_DEVICE_CFG": virtio_pci.CfgType.DEVICE,
        "VIRTIO_PCI_CAP_PCI_CFG": virtio_pci.CfgType.PCI,
        "VIRTIO_PCI_CAP_SHARED_MEMORY_CFG": virtio_pci.CfgType.SHARED_MEMORY,
        "VIRTIO_PCI_ISR_CONFIG": virtio_pci.ISR_CONFIG,
        "VIRTIO_MSI_NO_VECTOR": virtio_pci.MSI_NO_VECTOR,
    }),
    (IOMMU_H, {
        f"VIRTIO_IOMMU_F_{feature.name}": feature
        for feature in virtio_iommu.Feature
    } | {
        f"VIRTIO_IOMMU_S_{status.name}": status for status in virtio_iommu.Status
    } | {
        f"VIRTIO_IOMMU_T_{request.name}": request for request in virtio_iommu.RequestType
    } | {
        f"VIRTIO_IOMMU_FAULT_R_{reason.name}": reason for reason in virtio_iommu.FaultReason
    } | {
        "VIRTIO_IOMMU_ATTACH_F_BYPASS": virtio_iommu.ATTACH_F_BYPASS,
        "VIRTIO_IOMMU_MAP_F_READ": virtio_iommu.MAP_F_READ,
        "VIRTIO_IOMMU_MAP_F_WRITE": virtio_iommu.MAP_F_WRITE,
        "VIRTIO_IOMMU_MAP_F_MMIO": virtio_iommu.MAP_F_MMIO,
        "VIRTIO_IOMMU_PROBE_T_NONE": virtio_iommu.PROBE_T_NONE,
        "VIRTIO_IOMMU_PROBE_T_RESV_MEM": virtio_iommu.PROBE_T_RESV_MEM,
        "VIRTIO_IOMMU_RESV_MEM_T_RESERVED": virtio_iommu.ReservedKind.RESERVED,
        "VIRTIO_IOMMU_RESV_MEM_T_MSI": virtio_iommu.ReservedKind.MSI,
        "VIRTIO_IOMMU_FAULT_F_READ": virtio_iommu.FAULT_F_READ,
        "VIRTIO_IOMMU_FAULT_F_WRITE": virtio_iommu.FAULT_F_WRITE,
        "VIRTIO_IOMMU_FAULT_F_ADDRESS": virtio_iommu.FAULT_F_ADDRESS,
    }),
    ("linux/virtio_ids.h", {"VIRTIO_ID_IOMMU": virtio_iommu.DEVICE_ID}),
    (REGS_H, {
        "PCI_VENDOR_ID": pci.VENDOR_ID,
        "PCI_DEVICE_ID": pci.DEVICE_ID,
        "PCI_COMMAND": pci.COMMAND,
        "PCI_COMMAND_IO": pci.COMMAND_IO,
        "PCI_COMMAND_MEMORY": pci.COMMAND_MEMORY,
        "PCI_COMMAND_MASTER": pci.COMMAND_MASTER,
        "PCI_COMMAND_PARITY": pci.COMMAND_PARITY,
        "PCI_COMMAND_SERR": pci.COMMAND_SERR,
        "PCI_COMMAND_INTX_DISABLE": pci.COMMAND_INTX_DISABLE,
        "PCI_STATUS": pci.STATUS,
        "PCI_STATUS_CAP_LIST": pci.STATUS_CAP_LIST,
        "PCI_STATUS_PARITY|PCI_STATUS_SIG_TARGET_ABORT|PCI_STATUS_REC_TARGET_ABORT"
        "|PCI_STATUS_REC_MASTER_ABORT|PCI_STATUS_SIG_SYSTEM_ERROR|PCI_STATUS_DETECTED_PARITY":
            pci.STATUS_ERRORS,
        "PCI_REVISION_ID": pci.REVISION_ID,
        "PCI_CLASS_PROG": pci.CLASS_PROG,
        "PCI_CACHE_LINE_SIZE": pci.CACHE_LINE_SIZE,
        "PCI_HEADER_TYPE": pci.HEADER_TYPE,
        "PCI_BASE_ADDRESS_0": pci.BASE_ADDRESS_0,
        "PCI_BASE_ADDRESS_SPACE_IO": pci.BAR_IO,
        "PCI_BASE_ADDRESS_MEM_TYPE_MASK": pci.BAR_TYPE,
        "PCI_BASE_ADDRESS_MEM_TYPE_64": pci.BAR_MEM_64,
        "PCI_BASE_ADDRESS_MEM_PREFETCH": pci.BAR_PREFETCH,
        "PCI_SUBSYSTEM_VENDOR_ID": pci.SUBSYSTEM_VENDOR_ID,
        "PCI_SUBSYSTEM_ID": pci.SUBSYSTEM_ID,
        "PCI_ROM_ADDRESS": pci.ROM_ADDRESS,
        "PCI_CAPABILITY_LIST": pci.CAPABILITY_LIST,
        "PCI_INTERRUPT_LINE": pci.INTERRUPT_LINE,
        "PCI_INTERRUPT_PIN": pci.INTERRUPT_PIN,
        "PCI_CAP_ID_PM": pci.CAP_ID_PM,
        "PCI_CAP_ID_MSI": pci.CAP_ID_MSI,
        "PCI_CAP_ID_VNDR": pci.CAP_ID_VENDOR,
        "PCI_CAP_ID_EXP": pci.CAP_ID_EXPRESS,
        "PCI_CAP_ID_MSIX": pci.CAP_ID_MSIX,
        "PCI_CAP_ID_AF": pci.CAP_ID_AF,
        "PCI_AF_CAP": pci.AF_CAP,
        "PCI_AF_CAP_FLR": pci.AF_CAP_FLR,
        "PCI_AF_CTRL": pci.AF_CTRL,
        "PCI_AF_CTRL_FLR": pci.AF_CTRL_FLR,
        "PCI_MSIX_FLAGS_QSIZE": pci.MSIX_CTRL_TABLE_SIZE,
        "PCI_MSIX_TABLE": pci.MSIX_TABLE,
        "PCI_MSIX_TABLE_BIR": pci.MSIX_PLACE_BAR,
        "PCI_MSIX_PBA": pci.MSIX_PENDING,
        "PCI_MSIX_PBA_BIR": pci.MSIX_PLACE_BAR,
        "PCI_PM_CTRL": pci.PM_CTRL,
        "PCI_PM_CTRL_STATE_MASK": pci.PM_CTRL_STATE,
        "PCI_PM_CTRL_NO_SOFT_RESET": pci.PM_CTRL_NO_SOFT_RESET,
        "PCI_PM_SIZEOF": 8,
        "PCI_EXP_DEVCAP": pci.EXP_DEVCAP,
        "PCI_EXP_DEVCTL": pci.EXP_DEVCTL,
        "PCI_EXP_DEVSTA": pci.EXP_DEVSTA,
        "PCI_EXP_LNKCTL": pci.EXP_LNKCTL,
        "PCI_EXP_DEVCTL2": pci.EXP_DEVCTL2,
        "PCI_EXP_LNKCTL2": pci.EXP_LNKCTL2,
        "PCI_EXP_DEVCAP_RBER": pci.EXP_DEVCAP_RBER,
        "PCI_EXP_DEVCAP_FLR": pci.EXP_DEVCAP_FLR,
        "PCI_EXP_DEVCTL_BCR_FLR": pci.EXP_DEVCTL_FLR,
        "PCI_EXP_DEVCTL_RELAX_EN": pci.EXP_DEVCTL_RELAX,
        "PCI_EXP_DEVCTL_READRQ_512B": pci.EXP_DEVCTL_READRQ_512B,
        "PCI_EXP_LNKCAP_SLS_2_5GB": pci.EXP_LNK_2_5GT,
        "PCI_EXP_LNKSTA_NLW_X1": pci.EXP_LNK_X1,
        "PCI_EXP_TYPE_ENDPOINT": pci.EXP_TYPE_ENDPOINT,
        "PCI_MSI_FLAGS_ENABLE": pci.MSI_CTRL_ENABLE,
        "PCI_MSI_FLAGS_QSIZE": pci.MSI_CTRL_MULTIPLE_ENABLE,
        "PCI_MSI_FLAGS_64BIT": pci.MSI_CTRL_64BIT,
        "PCI_MSIX_FLAGS_MASKALL": pci.MSIX_CTRL_MASK_ALL,
        "PCI_MSIX_FLAGS_ENABLE": pci.MSIX_CTRL_ENABLE,
        "PCI_MSIX_ENTRY_SIZE": pci.MSIX_ENTRY_SIZE,
        "PCI_MSIX_FLAGS_QSIZE + 1": pci.MSIX_MAX_VECTORS,
        "PCI_CFG_SPACE_SIZE": pci.LEGACY_CONFIG_SPACE_SIZE,
        "PCI_CFG_SPACE_EXP_SIZE": pci.CONFIG_SPACE_SIZE,
    }),
    (VFIO_H, {
        "VFIO_PCI_CONFIG_REGION_INDEX": vfio.PCI_CONFIG_REGION_INDEX,
        "VFIO_PCI_NUM_REGIONS": vfio.PCI_NUM_REGIONS,
        "VFIO_REGION_INFO_FLAG_READ": vfio.REGION_INFO_FLAG_READ,
        "VFIO_REGION_INFO_FLAG_WRITE": vfio.REGION_INFO_FLAG_WRITE,
        "VFIO_PCI_MSI_IRQ_INDEX": vfio.PCI_MSI_IRQ_INDEX,
        "VFIO_PCI_MSIX_IRQ_INDEX": vfio.PCI_MSIX_IRQ_INDEX,
        "VFIO_PCI_ERR_IRQ_INDEX": vfio.PCI_ERR_IRQ_INDEX,
        "VFIO_PCI_REQ_IRQ_INDEX": vfio.PCI_REQ_IRQ_INDEX,
        "VFIO_PCI_NUM_IRQS": vfio.PCI_NUM_IRQS,
        "VFIO_IRQ_INFO_EVENTFD": vfio.IRQ_INFO_EVENTFD,
    }),
]
# fmt: on


@pytest.mark.parametrize(("header", "ours"), CONSTANTS, ids=[header for header, _ in CONSTANTS])
def test_constants_of_the_c_headers(header: str, ours: dict[str, int]) -> None:
    theirs = c_constants(header, list(ours))
    if theirs is None:
        pytest.skip("no C compiler, or no kernel headers")
    assert ours == theirs


def test_fields_that_c_has_as_macros_only() -> None:
    theirs = c_constants(PCI_H, list(NEWER_THAN_C.values()))
    if theirs is None:
        pytest.skip("no C compiler, or no kernel headers")
    declared: Any = virtio_pci.CommonCfg
    for name, macro in NEWER_THAN_C.items():
        assert getattr(declared, name).offset == theirs[macro]


@pytest.mark.parametrize(
    ("ring_size", "size"),
    [
        (virtio_ring.desc_size, 256 * 16),
        (virtio_ring.avail_size, 256 * 2 + 6),
        (virtio_ring.used_size, 256 * 8 + 6),
    ],
)
def test_sizes_of_the_ring_parts(ring_size: Any, size: int) -> None:
    # virtio 1.2, 2.7 "Split Virtqueues", table of alignments and sizes.
    assert ring_size(256) == size


# (format, structure, bytes to skip at the front of it, fields in the order of the format)
FORMATS: list[tuple[str, struct.Struct, type[Struct], int, str]] = [
    ("ATTACH", virtio_iommu.ATTACH, virtio_iommu.AttachRequest, 0, "head domain endpoint flags"),
    ("DETACH", virtio_iommu.DETACH, virtio_iommu.DetachRequest, 0, "head domain endpoint"),
    (
        "MAP",
        virtio_iommu.MAP,
        virtio_iommu.MapRequest,
        0,
        "head domain virt_start virt_end phys_start flags",
    ),
    ("UNMAP", virtio_iommu.UNMAP, virtio_iommu.UnmapRequest, 0, "head domain virt_start virt_end"),
    ("PROBE", virtio_iommu.PROBE, virtio_iommu.ProbeRequest, 0, "head endpoint"),
    (
        "CONFIG",
        virtio_iommu.CONFIG,
        virtio_iommu.Config,
        0,
        "page_size_mask input_range domain_range probe_size bypass",
    ),
    (
        "RESV_MEM",
        virtio_iommu.RESV_MEM,
        virtio_iommu.ResvMemProperty,
        0,
        "head subtype start end",
    ),
    ("FAULT", virtio_iommu.FAULT, virtio_iommu.Fault, 0, "reason flags endpoint address"),
    ("DESC", virtio_ring.DESC, virtio_ring.Desc, 0, "addr len flags next"),
    ("USED_ELEM", virtio_ring.USED_ELEM, virtio_ring.UsedElem, 0, "id len"),
    (
        "CAP_BODY",
        virtio_pci.CAP_BODY,
        virtio_pci.Cap,
        2,
        "cap_len cfg_type bar id offset length",
    ),
    ("PM", pci.PM, pci.PmCap, 2, "pmc ctrl bridge data"),
    (
        "EXPRESS",
        pci.EXPRESS,
        pci.ExpressCap,
        2,
        """flags devcap devctl devsta lnkcap lnkctl lnksta
        devcap2 devctl2 devsta2 lnkcap2 lnkctl2 lnksta2""",
    ),
    ("MSI", pci.MSI, pci.MsiCap, 2, "ctrl address_lo address_hi data"),
    ("MSIX", pci.MSIX, pci.MsixCap, 2, "ctrl table pba"),
    (
        "COMMON_CFG",
        virtio_pci.COMMON_CFG,
        virtio_pci.CommonCfg,
        0,
        """device_feature_select device_feature driver_feature_select driver_feature
        config_msix_vector num_queues device_status config_generation
        queue_select queue_size queue_msix_vector queue_enable queue_notify_off
        queue_desc_lo queue_desc_hi queue_driver_lo queue_driver_hi
        queue_device_lo queue_device_hi queue_notify_data queue_reset""",
    ),
]


def _leaves(value: Any) -> list[int]:
    """Return the numbers of a field, reserved arrays left out as the formats do."""
    if isinstance(value, int):
        return [value]
    if isinstance(value, ctypes.Array):
        return []
    return [leaf for name, *_ in value._fields_ for leaf in _leaves(getattr(value, name))]


@pytest.mark.parametrize(("name", "fmt", "kind", "skip", "fields"), FORMATS)
def test_struct_formats_decode_what_ctypes_decodes(
    name: str, fmt: struct.Struct, kind: type[Struct], skip: int, fields: str
) -> None:
    dice = random.Random(name)
    for _ in range(20):
        raw = dice.randbytes(sizeof(kind))
        decoded = kind.from_buffer_copy(raw)
        numbers = [leaf for field in fields.split() for leaf in _leaves(getattr(decoded, field))]
        got = list(fmt.unpack_from(raw, skip))
        # ATTACH decodes its reserved bytes as one number, because they must be zero.
        if name == "ATTACH":
            assert got.pop() == int.from_bytes(raw[16:20], "little")
        assert got == numbers


def test_every_format_of_a_spec_module_is_in_the_table() -> None:
    listed = {id(fmt) for _, fmt, *_ in FORMATS}
    for module in (virtio_iommu, virtio_ring, virtio_pci, pci):
        for name, value in vars(module).items():
            if isinstance(value, struct.Struct):
                assert id(value) in listed, name


def test_the_readable_part_of_a_request_ends_at_its_tail() -> None:
    for fmt, kind in (
        (virtio_iommu.ATTACH, virtio_iommu.AttachRequest),
        (virtio_iommu.DETACH, virtio_iommu.DetachRequest),
        (virtio_iommu.MAP, virtio_iommu.MapRequest),
        (virtio_iommu.UNMAP, virtio_iommu.UnmapRequest),
    ):
        declared: Any = kind
        assert fmt.size == declared.tail.offset
    assert sizeof(virtio_iommu.ReqTail) == virtio_iommu.TAIL_SIZE

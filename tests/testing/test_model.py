"""The model is simple enough to check by hand."""

import pytest

from viommu.errors import Access, ExportError, SessionFaulted, TranslationFault
from viommu.mapper import MappingInfo, MemRegion
from viommu.testing.model import ModelMapper

R = Access.READ


def test_it_maps_exports_faults_and_releases() -> None:
    model = ModelMapper(page=4)
    assert model.add_map(MappingInfo(0, 100, 8, R))
    assert not model.add_map(MappingInfo(4, 0, 4, R))
    with pytest.raises(ExportError):
        model.export(0, 1)
    model.start_export_session()
    assert model.export(2, 4) == [MemRegion(102, 4, R)]
    with pytest.raises(TranslationFault) as caught:
        model.export(6, 4)
    assert caught.value.iova == 8
    with pytest.raises(ExportError):
        model.start_export_session()
    assert not model.remove_map(0, 4)
    assert model.remove_map(0, 8)
    assert model.faulted
    with pytest.raises(SessionFaulted):
        model.export(0, 1)
    with pytest.raises(ExportError):
        model.release(0, 1)
    model.release(2, 4)
    model.start_export_session()
    assert not model.faulted


def test_reset_faults_only_what_is_held() -> None:
    model = ModelMapper(page=4)
    model.add_map(MappingInfo(0, 0, 4, R))
    model.start_export_session()
    model.reset_domain()
    assert not model.faulted
    assert model.pages == {}

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.spec import virtio_config as spec
from viommu.virtio.status import TRANSITIONS, DeviceStatus, Event, State

ACK, DRIVER, OK = spec.STATUS_ACKNOWLEDGE, spec.STATUS_DRIVER, spec.STATUS_DRIVER_OK
FEATURES, FAILED = spec.STATUS_FEATURES_OK, spec.STATUS_FAILED
BROKEN = spec.STATUS_DEVICE_NEEDS_RESET


def walk(*events: Event) -> DeviceStatus:
    status = DeviceStatus()
    for event in events:
        assert status.feed(event), event
    return status


RUNNING = (Event.ACKNOWLEDGE, Event.DRIVER, Event.FEATURES_OK, Event.DRIVER_OK)


def test_the_initialization_sequence() -> None:
    # virtio 1.2, 3.1.1
    status = DeviceStatus()
    bytes_seen = []
    for event in RUNNING:
        assert status.feed(event)
        bytes_seen.append(status.byte)
    assert bytes_seen == [ACK, ACK | DRIVER, ACK | DRIVER | FEATURES, ACK | DRIVER | FEATURES | OK]
    assert status.state is State.RUNNING


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", list(Event))
def test_a_transition_is_in_the_table_or_changes_nothing(state: State, event: Event) -> None:
    status = DeviceStatus()
    status.state = state
    status._byte = 0x55
    following = TRANSITIONS[state].get(event)
    assert status.feed(event) == (following is not None)
    assert status.state is (following or state)
    if following is None:
        assert status.byte == 0x55


@pytest.mark.parametrize(
    ("events", "refused"),
    [
        ((), Event.DRIVER_OK),
        ((Event.ACKNOWLEDGE, Event.DRIVER), Event.DRIVER_OK),  # a legacy driver
        ((Event.ACKNOWLEDGE,), Event.FEATURES_OK),
        ((), Event.BREAK),
        ((), Event.FINISH_RESET),
        (RUNNING, Event.FEATURES_OK),
        ((*RUNNING, Event.START_RESET), Event.DRIVER_OK),
        ((*RUNNING, Event.BREAK), Event.DRIVER_OK),
        ((*RUNNING, Event.FAIL), Event.BREAK),
    ],
)
def test_illegal_steps(events: tuple[Event, ...], refused: Event) -> None:
    assert not walk(*events).feed(refused)


def test_a_broken_device_keeps_what_the_driver_has_set() -> None:
    status = walk(*RUNNING, Event.BREAK)
    assert status.byte == ACK | DRIVER | FEATURES | OK | BROKEN


def test_the_status_stays_until_the_reset_has_finished() -> None:
    status = walk(*RUNNING, Event.START_RESET)
    assert status.byte == ACK | DRIVER | FEATURES | OK
    assert status.feed(Event.FINISH_RESET)
    assert status.byte == 0
    assert status.state is State.RESET


def test_a_reset_shows_until_it_has_finished_even_if_there_was_nothing_to_reset() -> None:
    status = walk(Event.START_RESET)
    assert status.byte != 0
    assert not status.byte & (FEATURES | OK)
    assert status.feed(Event.FINISH_RESET)
    assert status.byte == 0


@pytest.mark.parametrize(
    ("written", "byte", "events"),
    [
        (0, 0, [Event.START_RESET]),
        (0, 0x0F, [Event.START_RESET]),
        (ACK, 0, [Event.ACKNOWLEDGE]),
        (ACK | DRIVER, ACK, [Event.DRIVER]),
        (ACK | DRIVER, 0, [Event.ACKNOWLEDGE, Event.DRIVER]),
        (0x0F, 0, list(RUNNING)),
        (ACK, ACK | DRIVER, []),  # clearing a bit
        (ACK | DRIVER | BROKEN, ACK | DRIVER, []),  # the device's bit
        (FAILED, 0x0F, [Event.FAIL]),
        (0x30, 0, []),  # reserved bits
    ],
)
def test_what_a_driver_means(written: int, byte: int, events: list[Event]) -> None:
    assert DeviceStatus.events_of(written, byte) == events


@given(st.lists(st.sampled_from(list(Event))))
def test_the_byte_never_contradicts_the_state(events: list[Event]) -> None:
    status = DeviceStatus()
    for event in events:
        status.feed(event)
        assert (status.byte == 0) == (status.state is State.RESET)
        if status.state is State.RUNNING:
            assert status.byte & (FEATURES | OK | FAILED | BROKEN) == FEATURES | OK
        assert bool(status.byte & FAILED) <= (status.state in {State.FAILED, State.RESETTING})
        if status.state is State.RESET:
            assert status.byte == 0

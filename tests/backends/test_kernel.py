"""Ioctls and device files that fail keep the kernel's errno."""

from __future__ import annotations

import errno
import os
import termios
from typing import TYPE_CHECKING

import pytest

from viommu.errors import BackendError
from viommu_backends.kernel import ask, open_device_file

if TYPE_CHECKING:
    from pathlib import Path


def test_an_answer_is_in_the_buffer() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"four")
    buffer = bytearray(4)

    assert ask(reader, termios.FIONREAD, buffer, "how much there is to read") == 0
    assert buffer == (4).to_bytes(4, "little")
    os.close(reader)
    os.close(writer)


def test_a_refusal_keeps_its_errno_and_says_what_was_asked() -> None:
    with pytest.raises(BackendError, match="the moon") as caught:
        ask(0, 0x3B64, bytearray(4), "the moon")

    assert caught.value.errno in (errno.ENOTTY, errno.EINVAL)


def test_nothing_is_asked_of_what_is_closed() -> None:
    with pytest.raises(BackendError, match="the moon") as caught:
        ask(-1, 0x3B64, bytearray(4), "the moon")

    assert caught.value.errno == errno.EBADF


def test_a_device_file_is_not_left_to_children(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.touch()
    fd = open_device_file(path)

    assert not os.get_inheritable(fd)
    os.close(fd)
    with pytest.raises(BackendError, match="nothing") as caught:
        open_device_file(tmp_path / "nothing")
    assert caught.value.errno == errno.ENOENT

"""Copies on the host: which memory they lie in."""

import torch

from aclip.engine.host_copy import HostBuffers, Room, host_copies, rooms_of_copies


def test_copies_lie_in_the_memory_of_the_copies_before():
    buffers = HostBuffers()
    buffers.prepare([Room(6, torch.float32, False), Room(2, torch.int64, False)])
    first = buffers.take(6, torch.float32, False)
    second = buffers.take(2, torch.int64, False)
    buffers.start_again()
    assert buffers.take(6, torch.float32, False).data_ptr() == first.data_ptr()
    assert buffers.take(2, torch.int64, False).data_ptr() == second.data_ptr()


def test_other_copies_than_before_get_memory_of_their_own():
    buffers = HostBuffers()
    kept = buffers.take(6, torch.float32, False)
    for room in (Room(7, torch.float32, False), Room(7, torch.int64, False)):
        buffers.start_again()
        taken = buffers.take(*room)
        assert (taken.numel(), taken.dtype) == (7, room.dtype)
        assert taken.data_ptr() != kept.data_ptr()


def test_tensors_on_the_host_are_copied_too():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7.0)}
    buffers = HostBuffers()
    assert rooms_of_copies(tensors) == [Room(7, torch.float32, False)]
    copies = host_copies(tensors, buffers)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()
    assert all(torch.equal(copies[name], value) for name, value in expected.items())

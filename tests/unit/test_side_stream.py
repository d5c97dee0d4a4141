"""Pixels are copied to a GPU beside the step: in which order, with stand-ins for CUDA's objects."""

import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from shard_batches import make_recipe, take, write_shards

from aclip.data.images.whole_images import WholeImages
from aclip.data.side_stream import SideStream
from aclip.data.workers import run_ahead


class Pixels:
    """A tensor that notes what is done with it, and on which stream."""

    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def to(self, device, non_blocking):
        assert non_blocking and device == "gpu"
        self.cuda.log.append(f"copy {self.name} on {self.cuda.current}")
        return Pixels(self.cuda, f"{self.name} copy")

    def record_stream(self, stream):
        self.cuda.log.append(f"keep {self.name} for {stream.name}")


class Cuda:
    """As much of torch.cuda as a SideStream needs."""

    def __init__(self):
        self.log, self.current, cuda = [], "step", self

        class Stream:
            def __init__(self, device=None, name="side"):
                self.name = name

            def wait_event(self, event):
                cuda.log.append(f"{self.name} waits for {event.recorded}")

        class Event:
            def record(self, stream):
                self.recorded = f"event of {stream.name}"
                cuda.log.append(f"record {self.recorded}")

        self.Stream, self.Event = Stream, Event

    def current_stream(self, device):
        return self.Stream(name=self.current)

    @contextmanager
    def stream(self, stream):
        self.current, before = stream.name, self.current
        yield
        self.current = before

    def set_device(self, device):
        pass


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    for name in ("Stream", "Event", "stream", "current_stream", "set_device"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    return cuda


@pytest.fixture
def batch(write_tar, encode_image, tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    (batch,) = take(make_recipe(), write_shards(write_tar, encode_image), 1, 1)
    return batch


def test_pixels_are_copied_on_the_side_and_the_step_waits_for_them_alone(cuda, batch):
    views = {"student_views": Pixels(cuda, "student"), "teacher_view": Pixels(cuda, "teacher")}
    side = SideStream("gpu")
    sent = side.send(replace(batch, **views))
    copies = ["copy student on side", "copy teacher on side", "record event of side"]
    assert cuda.log == copies
    received = side.receive(*sent)
    assert cuda.log[3:] == [
        "step waits for event of side",
        "keep student copy for step",
        "keep teacher copy for step",
    ]
    assert received.student_views.name == "student copy"
    assert received.tokens is batch.tokens and received.student_boxes is batch.student_boxes


def test_whole_images_are_copied_on_the_side_but_their_sizes_stay(cuda, batch):
    sizes = torch.tensor([[2, 2, 1]])
    whole = WholeImages(Pixels(cuda, "pixels"), sizes, Pixels(cuda, "boxes"), None)
    side = SideStream("gpu")
    sent = replace(batch, student_views=None, teacher_view=None, whole_images=whole)
    received = side.receive(*side.send(sent)).whole_images
    assert cuda.log == [
        "copy pixels on side",
        "copy boxes on side",
        "record event of side",
        "step waits for event of side",
        "keep pixels copy for step",
        "keep boxes copy for step",
    ]
    assert received.sizes is sizes and received.ssl_flips is None


class Numbers:
    """A sender that counts what it has sent."""

    device = None

    def __init__(self):
        self.sent = 0

    def send(self, item):
        self.sent += 1
        return item, -item

    def receive(self, item, negative):
        assert item == -negative
        return item


def test_one_batch_at_most_is_on_the_device_ahead_of_the_one_in_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    sender = Numbers()
    ahead = run_ahead(iter(range(100)), sender)
    for taken in range(5):
        assert next(ahead) == taken
        until = time.monotonic() + 10
        while sender.sent < taken + 2 and time.monotonic() < until:
            time.sleep(0.001)  # the next one follows by itself
        time.sleep(0.02)
        assert sender.sent == taken + 2
    ahead.close()

"""Layers lent to a GPU: what they compute, and that no copy meets a layer that computes. The streams are stand-ins."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from afnext.quant.linear import Linear
from afnext.runtime.model import lending
from afnext.runtime.model.lending import LentLayers


class FakeStreams:
    """Two streams, and what the host asks of each: (stream, "wait", "record" or "compute", event)."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, object]] = []

    def __deepcopy__(self, memo: dict[int, object]) -> "FakeStreams":
        return self

    def positions(self, stream: str, what: str) -> list[int]:
        """Where the stream was asked for that, in order."""
        return [at for at, asked in enumerate(self.asked) if asked[:2] == (stream, what)]

    def ordered(self, earlier: int, later: int) -> bool:
        """Whether what was asked first has ended when the other begins, however fast each stream is."""
        reached = {earlier}
        for at in range(earlier + 1, later + 1):
            stream, what, event = self.asked[at]
            if any(self.asked[before][0] == stream for before in reached):
                reached.add(at)
            elif what == "wait":
                records = [i for i in range(at) if self.asked[i][1:] == ("record", event)]
                reached |= {at} if records and records[-1] in reached else set()
        return later in reached


class _Stream:
    def __init__(self, streams: FakeStreams, name: str):
        self.streams, self.name = streams, name

    def wait_event(self, event: "_Event") -> None:
        self.streams.asked.append((self.name, "wait", event))

    def wait_stream(self, stream: "_Stream") -> None:
        pass  # once, before any copy


class _Event:
    def record(self, stream: _Stream) -> None:
        stream.streams.asked.append((stream.name, "record", self))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    fake = FakeStreams()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: _Stream(fake, "copying"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: _Stream(fake, "computing"))
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(lending, "_pinned", lambda size: torch.full((size,), 255, dtype=torch.uint8))
    return fake


class Layer(nn.Module):
    """x W^T + b + shift + step, with a number of another dtype beside the weights."""

    def __init__(self, streams: FakeStreams, width: int):
        super().__init__()
        self.linear = Linear(width, width, bias=True)
        self.register_buffer("step", torch.randint(-9, 9, (1,), dtype=torch.int8))
        self.streams = streams

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        self.streams.asked.append(("computing", "compute", None))
        return self.linear(x) + shift + self.get_buffer("step")


def random_layers(streams: FakeStreams, count: int) -> list[nn.Module]:
    layers: list[nn.Module] = [Layer(streams, 24) for _ in range(count)]
    for layer in layers:
        for module in layer.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, torch.randn(buffer.shape) if buffer.is_floating_point() else buffer)
    return layers


def test_lent_layers_compute_what_they_compute_at_home(streams: FakeStreams, seed: int) -> None:
    layers, shift = random_layers(streams, 5), torch.randn(24)
    x = torch.randn(3, 24)
    expected = x
    for layer in layers:
        expected = layer(expected, shift)
    lent = LentLayers(layers, torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(lent(x, shift), expected)
    assert sum(place.numel() for place in lent._places) == 2 * len(lent._blocks[0]), "two layers on the GPU"
    again = x
    for layer in layers:  # they are still whole, in pinned memory
        again = layer(again, shift)
        assert {buffer.untyped_storage().data_ptr() for buffer in layer.buffers()} <= {
            block.data_ptr() for block in lent._blocks
        }
    assert torch.equal(again, expected)


def test_a_copy_waits_for_its_place_and_for_nothing_else(streams: FakeStreams) -> None:
    lent = LentLayers(random_layers(streams, 6), torch.device("cpu"))
    for _ in range(2):
        lent(torch.randn(2, 24), torch.zeros(24))
    copies, computed = streams.positions("copying", "record"), streams.positions("computing", "compute")
    assert len(copies) == len(computed) == 12
    for copy, compute in zip(copies, computed, strict=True):
        assert streams.ordered(copy, compute), "a layer computes with what was copied"
    for place in range(10):
        assert streams.ordered(computed[place], copies[place + 2]), "a place is free before it is written again"
    for layer in range(11):
        assert not streams.ordered(computed[layer], copies[layer + 1]), "the next copy does not wait for this layer"

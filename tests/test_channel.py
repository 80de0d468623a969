import os
import socket

import pytest

from agent.channel import MAX_DESCRIPTORS, MAX_RECORD_BYTES, Channel


def test_records_and_descriptors_arrive_whole_and_in_order() -> None:
    ours, theirs = Channel.pair()
    reader, writer = os.pipe()
    ours.send({"n": 1}, (writer,))
    ours.send({"n": 2})
    first, second = theirs.receive(), theirs.receive()
    assert first is not None
    assert second is not None
    assert (first.record, second.record, second.descriptors) == ({"n": 1}, {"n": 2}, ())
    (received,) = first.descriptors
    os.write(received, b"x")
    assert os.read(reader, 1) == b"x"
    assert not os.get_inheritable(received), "the model server must not inherit what we were handed"
    for descriptor in (reader, writer, received):
        os.close(descriptor)
    ours.close()
    assert theirs.receive() is None
    theirs.close()


def test_receiving_never_waits() -> None:
    ours, theirs = Channel.pair()
    with pytest.raises(BlockingIOError):
        theirs.receive()
    ours.close()
    theirs.close()


def test_the_largest_record_passes_and_a_larger_one_is_our_bug() -> None:
    ours, theirs = Channel.pair()
    text = "y" * (MAX_RECORD_BYTES - len('{"x":""}'))
    ours.send({"x": text})
    packet = theirs.receive()
    assert packet is not None
    assert packet.record == {"x": text}
    with pytest.raises(RuntimeError):
        ours.send({"x": text + "y"})
    with pytest.raises(RuntimeError):
        ours.send({}, tuple(range(MAX_DESCRIPTORS + 1)))
    ours.close()
    theirs.close()


@pytest.mark.parametrize(("padding", "descriptors"), [(MAX_RECORD_BYTES, 1), (0, 2 * MAX_DESCRIPTORS)])
def test_what_does_not_arrive_whole_is_refused(padding: int, descriptors: int) -> None:
    raw, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_RECORD_BYTES)
    theirs = Channel(end)
    reader, writer = os.pipe()
    socket.send_fds(raw, [b"{}" + b" " * padding], [writer] * descriptors)
    os.close(writer)
    with pytest.raises(ValueError):
        theirs.receive()
    assert os.read(reader, 1) == b"", "nobody holds the other end any more"
    os.close(reader)
    raw.close()
    theirs.close()


@pytest.mark.parametrize("data", [b"not json", b"[1]", b'"text"', b"\xff", b"{" * 100, b"[" * 5000])
def test_what_is_no_record_is_refused_and_its_descriptors_are_closed(data: bytes) -> None:
    raw, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs = Channel(end)
    reader, writer = os.pipe()
    socket.send_fds(raw, [data], [writer])
    os.close(writer)
    with pytest.raises(ValueError):
        theirs.receive()
    assert os.read(reader, 1) == b"", "nobody holds the other end any more"
    os.close(reader)
    raw.close()
    theirs.close()

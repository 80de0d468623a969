import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import EvidenceFormat, MalformedEvidenceError
from agent.evidence.qgs_abi import (
    MAX_ID_BYTES,
    QuoteResponse,
    pack_quote_request,
    pack_quote_response,
    parse_frame_length,
    parse_quote_response,
)

MAX_QUOTE_BYTES = 5000


def test_a_request_lies_as_the_service_reads_it() -> None:
    frame = pack_quote_request(b"r" * 1024)
    assert frame[:28] == bytes.fromhex(
        "00000418" + "0100" + "0000" + "00000000" + "18040000" + "00000000" + "00040000" + "00000000"
    )
    assert frame[28:] == b"r" * 1024
    assert len(frame) == 4 + 0x418


@pytest.mark.parametrize("length", [0, 15, 16 + 8 + MAX_ID_BYTES + MAX_QUOTE_BYTES + 1, 0xFFFF_FFFF])
def test_a_length_that_no_answer_has_is_refused(length: int) -> None:
    with pytest.raises(MalformedEvidenceError) as caught:
        parse_frame_length(struct.pack(">I", length), MAX_QUOTE_BYTES)
    assert (caught.value.format, caught.value.got) == (EvidenceFormat.TDX_QUOTE, length)


def test_an_answer_cut_anywhere_is_refused() -> None:
    message = pack_quote_response(QuoteResponse(0, b"quote", bytes(16)))[4:]
    for length in range(len(message)):
        with pytest.raises(MalformedEvidenceError):
            parse_quote_response(message[:length])


@given(st.integers(0, 0xFFFF_FFFF), st.binary(max_size=100), st.binary(max_size=16), st.sampled_from([0, 1]))
def test_an_answer_survives_the_round_trip(error: int, made: bytes, selected_id: bytes, minor: int) -> None:
    response = QuoteResponse(error, made, selected_id, minor)
    frame = pack_quote_response(response)
    assert parse_frame_length(frame[:4], MAX_QUOTE_BYTES) == len(frame) - 4
    assert parse_quote_response(frame[4:]) == response


@pytest.mark.parametrize(("id_bytes", "quote_bytes"), [(16, 4), (15, 5), (0, 5), (16, 6), (0xFFFFFFF0, 0x20)])
def test_sizes_that_are_not_those_of_the_whole_message_are_refused(id_bytes: int, quote_bytes: int) -> None:
    message = bytearray(pack_quote_response(QuoteResponse(0, b"quote", bytes(16)))[4:])
    message[16:24] = struct.pack("<II", id_bytes, quote_bytes)
    with pytest.raises(MalformedEvidenceError) as caught:
        parse_quote_response(bytes(message))
    assert caught.value.field == "qgs_sizes"

"""Byte layouts of the Quote Generation Service of a TDX host: the request for a quote and its answer.

A frame is a 4-byte length, big endian, of the message that follows; the message is little endian. An answer that is accepted
`pack_quote_response` gives back byte for byte. What the quote itself is, is not looked at.

Spec: Intel DCAP, QuoteGeneration/quote_wrapper/qgs_msg_lib/inc/qgs_msg_lib.h.
"""

import struct
from dataclasses import dataclass

from agent.closed import Ident
from agent.errors import EvidenceFormat, MalformedEvidenceError

TDREPORT_BYTES = 1024
MAX_ID_BYTES = 256
"""Of the Quoting Enclave a service selected: 16 today. None is asked for, and none is needed."""

_LENGTH = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size
_HEADER = struct.Struct("<HHIII")  # major and minor version, type, size of the message, error
_SIZES = struct.Struct("<II")  # request: report, id list; response: selected id, quote
_MAJOR, _MINORS = 1, (0, 1)
_GET_QUOTE_REQUEST, _GET_QUOTE_RESPONSE = 0, 1


@dataclass(frozen=True, slots=True)
class QuoteResponse:
    """Attributes:
    error: 0, or 0x12001 to 0x12007.
    quote: may be empty, which is an error too.
    """

    error: int
    quote: bytes = b""
    selected_id: bytes = b""
    minor: int = 0


def pack_quote_request(report: bytes) -> bytes:
    """The frame that asks for a quote over a TDREPORT of 1024 bytes."""
    assert len(report) == TDREPORT_BYTES
    body = _SIZES.pack(len(report), 0) + report
    return _frame(_HEADER.pack(_MAJOR, 0, _GET_QUOTE_REQUEST, _HEADER.size + len(body), 0) + body)


def parse_frame_length(data: bytes, max_quote_bytes: int) -> int:
    """How many bytes follow the first four of an answer.

    Raises:
        MalformedEvidenceError: fewer than an answer has, or more than one with the longest quote.
    """
    (length,) = _LENGTH.unpack(data)
    longest = _HEADER.size + _SIZES.size + MAX_ID_BYTES + max_quote_bytes
    if not _HEADER.size <= length <= longest:
        raise _malformed("qgs_length", length, longest)
    return int(length)


def parse_quote_response(message: bytes) -> QuoteResponse:
    """What follows the length of an answer.

    Raises:
        MalformedEvidenceError: another version, type or size than an answer to our request has, or it is cut short.
    """
    if len(message) < _HEADER.size:
        raise _malformed("qgs_header", len(message), _HEADER.size)
    major, minor, kind, size, error = _HEADER.unpack_from(message)
    if major != _MAJOR or minor not in _MINORS:
        raise _malformed("qgs_version", major << 16 | minor, _MAJOR << 16)
    if kind != _GET_QUOTE_RESPONSE:
        raise _malformed("qgs_type", kind, _GET_QUOTE_RESPONSE)
    if size != len(message):
        raise _malformed("qgs_size", size, len(message))
    start = _HEADER.size + _SIZES.size
    if len(message) < start:
        raise _malformed("qgs_sizes", len(message), start)
    id_bytes, quote_bytes = _SIZES.unpack_from(message, _HEADER.size)
    if id_bytes > MAX_ID_BYTES or start + id_bytes + quote_bytes != len(message):
        raise _malformed("qgs_sizes", start + id_bytes + quote_bytes, len(message))
    return QuoteResponse(error, message[start + id_bytes :], message[start : start + id_bytes], minor)


def pack_quote_response(response: QuoteResponse) -> bytes:
    """The frame of an answer, with its length: what a service sends."""
    body = _SIZES.pack(len(response.selected_id), len(response.quote)) + response.selected_id + response.quote
    size = _HEADER.size + len(body)
    return _frame(_HEADER.pack(_MAJOR, response.minor, _GET_QUOTE_RESPONSE, size, response.error) + body)


def _frame(message: bytes) -> bytes:
    return _LENGTH.pack(len(message)) + message


def _malformed(field: str, got: int, expected: int) -> MalformedEvidenceError:
    return MalformedEvidenceError(EvidenceFormat.TDX_QUOTE, Ident(field), got, expected)

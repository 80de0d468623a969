"""A TDX quote by its outline: header, body, length. Nobody signed it."""

import struct

HEADER_BYTES = 48
BODY_1_0_BYTES, BODY_1_5_BYTES = 584, 648
REPORT_DATA_AT = 520


def quote(report_data: bytes, version: int = 4, signature: bytes = b"s" * 4200) -> bytes:
    """Version 5 with a body of TDX 1.5."""
    size = BODY_1_0_BYTES if version == 4 else BODY_1_5_BYTES
    body = (b"b" * REPORT_DATA_AT + report_data).ljust(size, b"b")
    descriptor = b"" if version == 4 else struct.pack("<HI", 3, size)
    header = struct.pack("<HHI", version, 2, 0x81).ljust(HEADER_BYTES, b"h")
    return header + descriptor + body + struct.pack("<I", len(signature)) + signature


def tdreport(report_data: bytes) -> bytes:
    """A TDREPORT by its type and its report data: 1024 bytes."""
    return (b"\x81".ljust(128, b"\0") + report_data).ljust(1024, b"r")

"""Failure details: what the broker packs comes back, and a peer's bytes can only make us wait or stop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.closed import Ident
from agent.errors import DenialReason
from agent.handshake.grpc_status import Denial, Failure, pack_failure, parse_failure

ID = Ident("request-1")
REVOKED = Denial(DenialReason.POLICY, Ident("policy.revoked"), None, Ident("7"))


def test_failures_come_back() -> None:
    for failure in (
        Failure(14, Ident("BUSY"), ID, 1.5),
        Failure(7, Ident("TOKEN_EXPIRED"), None, None),
        Failure(14, Ident("BUSY"), None, 0.0),
        Failure(7, Ident("POLICY_REVOKED"), ID, denial=REVOKED),
        Failure(7, Ident("SNP_TCB"), ID, denial=Denial(DenialReason.CLAIM, Ident("snp.tcb"), Ident("tcb-1"), Ident("7"))),
    ):
        assert parse_failure(pack_failure(failure), failure.code) == failure


def test_failure_details_that_do_not_fit_say_nothing() -> None:
    packed = pack_failure(Failure(14, Ident("BUSY"), ID, 1.5))
    assert parse_failure(packed, 7) is None
    assert parse_failure(packed[:-1], 14) is None
    assert parse_failure(b"", 0) is None
    same_with_9000_bytes_of_text = packed + b"\x12\xa8\x46" + b"a" * 9000
    assert parse_failure(same_with_9000_bytes_of_text, 14) is None


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        (b"policy.revoked", b"policy revoked"),  # no identifier
        (b"\x0a\x06reason\x12\x06policy", b"\x0a\x06reason\x12\x06becaus"),  # no reason of ours
        (b"\x0a\x0epolicy_version", b"\x0a\x0epolicy_versios"),  # a part is missing
        (b"keyturn.kbs.v1", b"keyturn.kbs.v2"),  # the same words may mean something else
    ],
)
def test_a_denial_that_is_not_whole_and_ours_says_no_more_than_its_word(said: bytes, instead: bytes) -> None:
    packed = pack_failure(Failure(7, Ident("POLICY_REVOKED"), ID, denial=REVOKED))
    assert packed.count(said) == 1
    assert parse_failure(packed.replace(said, instead), 7) == Failure(7, Ident("POLICY_REVOKED"), ID)


def test_a_peers_delay_is_bounded() -> None:
    for asked, got in ((-5.0, 0.0), (1e9, 86_400.0)):
        packed = pack_failure(Failure(14, Ident("BUSY"), None, asked))
        failure = parse_failure(packed, 14)
        assert failure is not None
        assert failure.retry_after_s == got


@given(st.binary(max_size=200))
def test_any_failure_details_are_read_or_say_nothing(data: bytes) -> None:
    failure = parse_failure(data, 14)
    assert failure is None or failure.code == 14

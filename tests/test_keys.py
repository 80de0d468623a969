"""Secret memory, and the unwrapping of the model key against Trustee's vectors and two JOSE libraries."""

import copy
import ctypes
import json
import mmap
import os
import pickle
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwe as joserfc_jwe
from joserfc.jwk import ECKey
from jwcrypto import jwe as jwcrypto_jwe
from jwcrypto import jwk as jwcrypto_jwk

from agent.closed import Ident
from agent.errors import CredentialsProblem, KeyUnwrapError, StoreCredentialsError, UnwrapCheck
from agent.evidence import Nonce
from agent.evidence.gate import ExpectedReady, SecuredDevices, secure
from agent.guest import hardening
from agent.handshake import KeptCredentials, KeptKey, SealedCredentials, SealedKey, TeePublicKey, TokenClaims, Verdict
from agent.jose import pack_b64url, pack_jwk, parse_b64url
from agent.keys import EphemeralKey, ReleasedKey, SecretBuffer, open_credentials, open_jwe, unwrap
from agent.store_credentials import MAX_CREDENTIALS_BYTES, StoreCredentials
from tests.children import in_child
from tests.shared import shared_data

MODEL_KEY = bytes(range(32))
PRIVATE = ec.derive_private_key(0x1234567890ABCDEF, ec.SECP256R1())
HEADER = {"alg": "ECDH-ES+A256KW", "enc": "A256GCM"}
Members = dict[str, str]


def key() -> EphemeralKey:
    return EphemeralKey(PRIVATE)


def flattened(compact: str) -> bytes:
    names = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
    return json.dumps(dict(zip(names, compact.split("."), strict=True))).encode()


def sealed_by_jwcrypto(plaintext: bytes = MODEL_KEY) -> bytes:
    token = jwcrypto_jwe.JWE(plaintext, protected=json.dumps(HEADER))
    token.add_recipient(jwcrypto_jwk.JWK(**pack_jwk(key().public)))
    return flattened(token.serialize(compact=True))  # its JSON form leaves the ephemeral key unprotected


def sealed_by_joserfc(plaintext: bytes = MODEL_KEY) -> bytes:
    recipient = ECKey.import_key({**pack_jwk(key().public)})
    return flattened(joserfc_jwe.encrypt_compact(dict(HEADER), plaintext, recipient, algorithms=list(HEADER.values())))


def opened(jwe: bytes, with_key: EphemeralKey | None = None) -> bytes:
    out = bytearray(32)
    open_jwe(jwe, with_key or key(), memoryview(out))
    return bytes(out)


def refused(jwe: bytes) -> UnwrapCheck:
    with pytest.raises(KeyUnwrapError) as raised:
        opened(jwe)
    return raised.value.check


def changed(change: Callable[[Members], object]) -> bytes:
    members: Members = json.loads(SEALED)
    change(members)
    return json.dumps(members).encode()


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    members: Members = json.loads(SEALED)
    header = json.loads(parse_b64url(members["protected"]))
    change(header)
    members["protected"] = pack_b64url(json.dumps(header).encode())
    return json.dumps(members).encode()


def flipped(name: str) -> bytes:
    def flip(members: Members) -> None:
        data = bytearray(parse_b64url(members[name]))
        data[0] ^= 1
        members[name] = pack_b64url(bytes(data))

    return changed(flip)


SEALED = sealed_by_jwcrypto()
OTHER_CURVE = jwcrypto_jwk.JWK.generate(kty="EC", crv="P-521").export_public(as_dict=True)
CLAIMS = TokenClaims(Nonce(bytes(32)), key().public, Ident("kbs:///a/b/c"), Ident("p1"), 0, None, False, 0, 1)


def secured() -> SecuredDevices:
    return secure(Verdict(Ident("r"), "t", CLAIMS, ()), None, None, ExpectedReady.UNSET)


def test_trustees_p256_vector_opens() -> None:
    cases = json.loads(shared_data("trustee/vectors/kbs_vectors.json").read_text())["jwe"]
    case = next(case for case in cases if case["recipient_jwk"]["crv"] == "P-256")
    private = ec.derive_private_key(int.from_bytes(parse_b64url(case["recipient_pkcs8_pem"]["d"])), ec.SECP256R1())
    recipient = EphemeralKey(private)
    assert pack_jwk(recipient.public) == case["recipient_jwk"]
    assert opened(json.dumps(case["response"]).encode(), recipient) == case["plaintext"].encode()


def test_trustees_p521_vector_is_refused() -> None:
    cases = json.loads(shared_data("trustee/vectors/kbs_vectors.json").read_text())["jwe"]
    case = next(case for case in cases if case["recipient_jwk"]["crv"] == "P-521")
    assert refused(json.dumps(case["response"]).encode()) is UnwrapCheck.EPHEMERAL_KEY


def test_what_jwcrypto_seals_opens() -> None:
    assert opened(sealed_by_jwcrypto()) == MODEL_KEY


def test_what_joserfc_seals_opens() -> None:
    assert opened(sealed_by_joserfc()) == MODEL_KEY


@pytest.mark.parametrize(
    ("check", "jwe"),
    [
        (UnwrapCheck.FORMAT, b""),
        (UnwrapCheck.FORMAT, b"{" * 5000),
        (UnwrapCheck.FORMAT, SEALED + b" " * (8 << 10)),
        (UnwrapCheck.FORMAT, SEALED[:-1] + b', "tag": "AAAAAAAAAAAAAAAAAAAAAA"}'),  # a member twice
        (UnwrapCheck.FORMAT, changed(lambda m: m.pop("tag"))),
        (UnwrapCheck.FORMAT, changed(lambda m: m.update(aad="AA"))),
        (UnwrapCheck.FORMAT, changed(lambda m: m.update(header="{}"))),
        (UnwrapCheck.FORMAT, changed(lambda m: m.update(iv=m["iv"] + "="))),
        (UnwrapCheck.FORMAT, changed(lambda m: m.update(iv="AAAA"))),
        (UnwrapCheck.FORMAT, changed(lambda m: m.update(tag=m["tag"][:-8]))),
        (UnwrapCheck.FORMAT, changed(lambda m: m.update(encrypted_key=m["encrypted_key"] + "AAAAAAAAAAA"))),
        (UnwrapCheck.FORMAT, changed(lambda m: m.update(protected="ö"))),
        (UnwrapCheck.FORMAT, with_header(lambda h: h.update(apu="AA"))),
        (UnwrapCheck.FORMAT, with_header(lambda h: h.update(apv="AA"))),
        (UnwrapCheck.FORMAT, with_header(lambda h: h.update(zip="DEF"))),
        (UnwrapCheck.FORMAT, with_header(lambda h: h.update(crit=["exp"]))),
        (UnwrapCheck.FORMAT, with_header(lambda h: h.pop("epk"))),
        (UnwrapCheck.ALGORITHM, with_header(lambda h: h.update(alg="ECDH-ES+A128KW"))),
        (UnwrapCheck.ALGORITHM, with_header(lambda h: h.update(enc="A128GCM"))),
        (UnwrapCheck.ALGORITHM, with_header(lambda h: h.update(alg=None))),
        (UnwrapCheck.EPHEMERAL_KEY, with_header(lambda h: h.update(epk="x"))),
        (UnwrapCheck.EPHEMERAL_KEY, with_header(lambda h: h.update(epk=list(h["epk"])))),
        (UnwrapCheck.EPHEMERAL_KEY, with_header(lambda h: h["epk"].update(y=pack_b64url(b"y" * 32)))),  # not on the curve
        (UnwrapCheck.EPHEMERAL_KEY, with_header(lambda h: h["epk"].update(x=pack_b64url(bytes(32)), y=pack_b64url(bytes(32))))),
        (UnwrapCheck.EPHEMERAL_KEY, with_header(lambda h: h["epk"].update(x=pack_b64url(b"\xff" * 32)))),
        (UnwrapCheck.EPHEMERAL_KEY, with_header(lambda h: h["epk"].update(kid="1"))),
        (UnwrapCheck.EPHEMERAL_KEY, with_header(lambda h: h.update(epk=OTHER_CURVE))),
        (UnwrapCheck.EPHEMERAL_KEY, with_header(lambda h: h["epk"].update(crv="secp256k1"))),
        (UnwrapCheck.EPHEMERAL_KEY, with_header(lambda h: h["epk"].update(kty="OKP"))),
        (UnwrapCheck.KEY_WRAP, flipped("encrypted_key")),
        (UnwrapCheck.CONTENT, flipped("ciphertext")),
        (UnwrapCheck.CONTENT, flipped("tag")),
        (UnwrapCheck.CONTENT, flipped("iv")),
        (UnwrapCheck.CONTENT, with_header(lambda h: None)),  # the same header in other bytes
        (UnwrapCheck.LENGTH, sealed_by_jwcrypto(b"k" * 31)),
        (UnwrapCheck.KEYSET, sealed_by_jwcrypto(b"k" * 33)),
        (UnwrapCheck.LENGTH, sealed_by_jwcrypto(b"k" * 2049)),
        (UnwrapCheck.LENGTH, sealed_by_jwcrypto(b"")),
    ],
)
def test_a_sealed_key_that_is_not_exactly_ours_is_refused(check: UnwrapCheck, jwe: bytes) -> None:
    assert refused(jwe) is check


def test_a_key_sealed_to_somebody_else_is_a_key_wrap_error() -> None:
    with pytest.raises(KeyUnwrapError) as raised:
        opened(SEALED, EphemeralKey.generate())
    assert raised.value.check is UnwrapCheck.KEY_WRAP


@settings(max_examples=200)
@given(st.data())
def test_a_mutilated_jwe_opens_to_the_same_key_or_is_refused(data: st.DataObject) -> None:
    jwe = bytearray(SEALED)
    for _ in range(data.draw(st.integers(1, 3))):
        jwe[data.draw(st.integers(0, len(jwe) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert opened(bytes(jwe)) == MODEL_KEY
    except KeyUnwrapError as error:
        assert error.__cause__ is None  # no foreign text travels with it


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(jwe: bytes) -> None:
    assert refused(jwe) is UnwrapCheck.FORMAT


def test_unwrap_releases_the_key_and_destroys_the_ephemeral_key() -> None:
    ephemeral = key()
    with unwrap(SealedKey(SEALED, Ident("id-1"), 3), ephemeral, secured()) as released:
        assert isinstance(released, ReleasedKey)
        assert bytes(released.secret.view()) == MODEL_KEY
        assert (released.key_id, released.key_version) == ("id-1", 3)
    with pytest.raises(RuntimeError):
        released.secret.view()
    with pytest.raises(RuntimeError):
        ephemeral.exchange(PRIVATE.public_key())


def test_nothing_of_what_was_fetched_stays_beside_the_key() -> None:
    views: list[memoryview] = []

    def fetch(into: memoryview) -> int:
        into[:32] = MODEL_KEY
        views.append(into[:])
        return 32

    with unwrap(KeptKey(fetch, Ident("id-1"), 0), key(), secured()) as released:
        assert bytes(released.secret.view()) == MODEL_KEY
        assert not any(views[0])


def test_the_ephemeral_key_is_destroyed_when_unwrap_fails() -> None:
    ephemeral = key()
    with pytest.raises(KeyUnwrapError):
        unwrap(SealedKey(b"{}", Ident("id-1"), 1), ephemeral, secured())
    with pytest.raises(RuntimeError):
        ephemeral.exchange(PRIVATE.public_key())


def test_nothing_is_unwrapped_before_the_gate() -> None:
    with pytest.raises(RuntimeError):
        unwrap(SealedKey(SEALED, Ident("id-1"), 1), key(), None)  # type: ignore[arg-type]


def test_two_handshakes_have_two_keys() -> None:
    first, second = EphemeralKey.generate().public, EphemeralKey.generate().public
    assert isinstance(first, TeePublicKey)
    assert first != second
    assert (len(first.x), len(first.y)) == (32, 32)


def test_wiping_zeroes_the_memory_under_every_view() -> None:
    secret = SecretBuffer(32)
    view = secret.view()
    view[:] = MODEL_KEY
    secret.wipe()
    secret.wipe()
    assert bytes(view) == bytes(32)


def test_secrets_print_as_their_size_and_are_neither_copied_nor_pickled() -> None:
    secret, ephemeral = SecretBuffer(32), key()
    assert repr(secret) == str(secret) == "<secret, 32 bytes>"
    assert repr(ephemeral) == "<ephemeral key>"
    for value in (secret, ephemeral):
        with pytest.raises(TypeError):
            pickle.dumps(value)
        with pytest.raises(TypeError):
            copy.copy(value)
    with pytest.raises(TypeError):
        pickle.dumps(ReleasedKey(secret, Ident("id"), 1))


def test_a_forked_child_sees_zeros() -> None:
    secret = SecretBuffer(32)
    secret.view()[:] = MODEL_KEY
    child = os.fork()
    if child == 0:
        os._exit(0 if bytes(secret.view()) == bytes(32) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bytes(secret.view()) == MODEL_KEY


def flags_of(secret: SecretBuffer) -> set[str]:
    """VmFlags of exactly the mapping it lies in; proc_pid_smaps(5)."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(secret.view()))
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError("a secret without memory")


def test_secret_memory_is_locked_and_in_no_core_and_in_no_child() -> None:
    if os.geteuid() != 0 and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < 2 * mmap.PAGESIZE:
        pytest.skip("RLIMIT_MEMLOCK lets this user lock nothing")
    secret = SecretBuffer(32)
    secret.view()[:] = MODEL_KEY
    assert secret.locked
    assert flags_of(secret) >= {"lo", "dd", "wf"}


def test_secret_memory_that_cannot_be_locked_says_so_and_is_still_in_no_core() -> None:
    def scenario() -> tuple[bool, set[str]]:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        # Root may lock without limit: not without capabilities.
        hardening.confine_child(None, None, os.getppid(), {int(number) for number in os.listdir("/proc/self/fd")})
        secret = SecretBuffer(32)
        return secret.locked, flags_of(secret) & {"lo", "dd", "wf"}

    assert in_child(scenario) == (False, {"dd", "wf"})


# --- credentials of the model's store -----------------------------------------------------------------------------------

CREDENTIALS = b'{"user": "guest", "secret": "correct horse"}'


def test_credentials_open_and_leave_the_key_pair_for_the_model_key() -> None:
    pair = key()
    assert open_credentials(SealedCredentials(sealed_by_joserfc(CREDENTIALS)), pair) == StoreCredentials(
        "guest", "correct horse"
    )
    longest = CREDENTIALS.ljust(MAX_CREDENTIALS_BYTES)
    assert open_credentials(SealedCredentials(sealed_by_jwcrypto(longest)), pair).user == "guest"
    with unwrap(SealedKey(SEALED, Ident("id"), 1), pair, secured()) as released:
        assert bytes(released.secret.view()) == MODEL_KEY


def kept(resource: bytes, seen: list[memoryview] | None = None) -> KeptCredentials:
    def fetch(into: memoryview) -> int:
        into[: len(resource)] = resource
        if seen is not None:
            seen.append(into[: len(resource)])
        return len(resource)

    return KeptCredentials(fetch)


def test_kept_credentials_are_fetched() -> None:
    assert open_credentials(kept(CREDENTIALS), key()) == StoreCredentials("guest", "correct horse")


@pytest.mark.parametrize("resource", [CREDENTIALS, b"no credentials"])
def test_credentials_leave_nothing_in_the_memory_they_were_opened_in(resource: bytes) -> None:
    seen: list[memoryview] = []
    with suppress(StoreCredentialsError):
        open_credentials(kept(resource, seen), key())
    assert [bytes(view) for view in seen] == [bytes(len(resource))]


def sealed_badly(name: str) -> bytes:
    """Credentials of which one member was changed on the way."""
    members: Members = json.loads(sealed_by_joserfc(CREDENTIALS))
    data = bytearray(parse_b64url(members[name]))
    data[0] ^= 1
    members[name] = pack_b64url(bytes(data))
    return json.dumps(members).encode()


def bad_credentials() -> dict[str, tuple[SealedCredentials | KeptCredentials, CredentialsProblem, UnwrapCheck | None]]:
    too_long = CREDENTIALS.ljust(MAX_CREDENTIALS_BYTES + 1)
    return {
        "no JWE": (SealedCredentials(b"{}"), CredentialsProblem.SEALED, UnwrapCheck.FORMAT),
        "another key pair": (SealedCredentials(sealed_badly("encrypted_key")), CredentialsProblem.SEALED, UnwrapCheck.KEY_WRAP),
        "altered": (SealedCredentials(sealed_badly("ciphertext")), CredentialsProblem.SEALED, UnwrapCheck.CONTENT),
        "empty": (SealedCredentials(sealed_by_joserfc(b"")), CredentialsProblem.LENGTH, None),
        "too long": (SealedCredentials(sealed_by_joserfc(too_long)), CredentialsProblem.LENGTH, None),
        "another resource": (SealedCredentials(sealed_by_joserfc(bytes(300))), CredentialsProblem.FORM, None),
        "kept, and another resource": (kept(bytes(300)), CredentialsProblem.FORM, None),
    }


@pytest.mark.parametrize("case", bad_credentials())
def test_what_is_no_credentials_is_told_by_its_problem_and_never_by_its_bytes(case: str) -> None:
    sealed, problem, check = bad_credentials()[case]
    with pytest.raises(StoreCredentialsError) as raised:
        open_credentials(sealed, key())
    assert (raised.value.problem, raised.value.check) == (problem, check)
    assert raised.value.__cause__ is None
    assert (raised.value.exit_status, raised.value.retryable) == (17, False)


def test_a_model_key_in_the_place_of_credentials_stays_sealed() -> None:
    """Whoever passes messages on could put it there. It is refused by its length, before anything is decrypted."""
    altered = json.loads(SEALED)
    altered["tag"] = pack_b64url(bytes(16))  # what shows when it is decrypted
    for jwe in (SEALED, json.dumps(altered).encode()):
        with pytest.raises(StoreCredentialsError) as raised:
            open_credentials(SealedCredentials(jwe), key())
        assert raised.value.problem is CredentialsProblem.LENGTH


@pytest.mark.parametrize("case", bad_credentials())
def test_the_ephemeral_key_is_destroyed_when_credentials_do_not_open(case: str) -> None:
    pair = key()
    with pytest.raises(StoreCredentialsError):
        open_credentials(bad_credentials()[case][0], pair)
    with pytest.raises(RuntimeError):
        pair.exchange(PRIVATE.public_key())


def test_no_pair_and_no_memory_are_left_when_a_fetch_fails() -> None:
    def fetch(_: memoryview) -> int:
        raise KeyError

    pair = key()
    with pytest.raises(KeyError):
        open_credentials(KeptCredentials(fetch), pair)
    with pytest.raises(RuntimeError):
        pair.exchange(PRIVATE.public_key())

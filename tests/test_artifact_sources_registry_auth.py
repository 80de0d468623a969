"""Challenges as RFC 9110 writes them, and as nobody should. What follows from them: test_artifact_sources_oci.py."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.artifact.sources.registry_auth import Challenge, parse_challenges, parse_token_answer
from agent.errors import ArtifactUnavailableError, StoreProblem


@pytest.mark.parametrize(
    ("value", "challenges"),
    [
        ('Basic realm="x"', [("basic", {"realm": "x"})]),
        ("Basic", [("basic", {})]),
        ("BASIC Realm=x", [("basic", {"realm": "x"})]),
        (
            'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull"',
            [
                (
                    "bearer",
                    {"realm": "https://auth.docker.io/token", "service": "registry.docker.io", "scope": "repository:a/b:pull"},
                )
            ],
        ),
        ('Bearer realm = "a,b" , service= "c\\"d"', [("bearer", {"realm": "a,b", "service": 'c"d'})]),
        ("Negotiate, Basic realm=a, charset=UTF-8", [("negotiate", {}), ("basic", {"realm": "a", "charset": "UTF-8"})]),
        ("Negotiate YWJj==, Basic realm=a", [("negotiate", {}), ("basic", {"realm": "a"})]),
        (",, Basic realm=a ,, ,Bearer realm=b,", [("basic", {"realm": "a"}), ("bearer", {"realm": "b"})]),
        ('Basic realm=""', [("basic", {"realm": ""})]),
        ("basic realm=", [("basic", {})]),  # by the grammar these are a token68
        ("Basic realm", [("basic", {})]),
    ],
)
def test_challenges_are_read(value: str, challenges: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(value) == tuple(Challenge(scheme, parameters) for scheme, parameters in challenges)


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        ",",
        '"x"',
        "=x",
        "Basic a b",
        'Basic realm="x',
        'Basic realm="x"y',
        'Basic realm="x" service="y"',
        'Basic realm="x\ny"',
        'Basic realm="x\\',
        "Basic realm=x, realm=y",
        "Basic realm=x, REALM=y",
        "Basic realm==x",
        "Bearer realm=https://x",
        "Bearer realm=x;service=y",
        "B\x00sic realm=x",
        "Básic realm=x",
        ", ".join(["Basic realm=x"] * 9),
        "Basic realm=" + "x" * 8200,
    ],
)
def test_a_challenge_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ArtifactUnavailableError) as caught:
        parse_challenges(value)
    assert caught.value.problem is StoreProblem.BAD_ANSWER


@given(st.text(alphabet='ab=,"\\ \t;/\x00\xe9', max_size=60) | st.text(max_size=60))
def test_any_text_is_challenges_or_our_error(value: str) -> None:
    with suppress(ArtifactUnavailableError):
        assert parse_challenges(value)


@pytest.mark.parametrize(
    ("answer", "life_s"),
    [
        (b'{"token": "a.b-c_d~e+f/g=="}', 60),
        (b'{"access_token": "a.b-c_d~e+f/g==", "expires_in": 300, "issued_at": "2026-01-01T00:00:00Z"}', 300),
        (b'{"token": "a.b-c_d~e+f/g==", "access_token": "x", "expires_in": 999999}', 3600),
        (b'{"token": "a.b-c_d~e+f/g==", "expires_in": -5}', 0),
    ],
)
def test_a_token_and_its_life_are_read(answer: bytes, life_s: int) -> None:
    assert parse_token_answer(answer) == ("a.b-c_d~e+f/g==", life_s)

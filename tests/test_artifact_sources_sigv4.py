"""The signature against what AWS publishes of it. Whole requests: test_artifact_sources_s3.py."""

from datetime import UTC, datetime

from agent.artifact.sources.sigv4 import encode_path, sign_get

WHEN = datetime(2013, 5, 24, tzinfo=UTC)
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


def test_the_published_example_of_a_ranged_get() -> None:
    """Amazon S3 API Reference, "Signature Calculations for the Authorization Header", example "GET Object"."""
    headers = sign_get(
        "examplebucket.s3.amazonaws.com",
        "/test.txt",
        {"Range": "bytes=0-9"},
        WHEN,
        "us-east-1",
        "AKIAIOSFODNN7EXAMPLE",
        SECRET,
    )
    assert headers == {
        "Host": "examplebucket.s3.amazonaws.com",
        "x-amz-content-sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "x-amz-date": "20130524T000000Z",
        "Authorization": "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,"
        "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,"
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
    }


def test_a_session_token_is_sent_and_signed() -> None:
    headers = sign_get("h", "/", {}, WHEN, "r", "id", SECRET, "token")
    assert headers["x-amz-security-token"] == "token"
    assert "SignedHeaders=host;x-amz-content-sha256;x-amz-date;x-amz-security-token," in headers["Authorization"]


def test_a_path_is_encoded_byte_by_byte() -> None:
    """The same page, "UriEncode()": A-Z a-z 0-9 - . _ ~ stay, and / in an object's key."""
    assert encode_path("/a b/ü~-._=+&%") == "/a%20b/%C3%BC~-._%3D%2B%26%25"

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import EXAMPLE, EXPLAIN, Selection, keys, parse
from agent.config_source import MAX_CONFIG_BYTES
from agent.errors import AgentError, Asked, ConfigError, ConfigNotMeasuredError, ConfigProblem

SIMULATED = EXAMPLE.replace('attester = "snp"', 'attester = "simulated-snp"') + '[simulation]\nmachine = "/machine"\n'


def failure(text: str) -> tuple[ConfigProblem, str | None]:
    with pytest.raises(ConfigError) as caught:
        parse(text.encode())
    return caught.value.problem, caught.value.key


def test_the_example_is_valid_and_its_digest_covers_every_byte() -> None:
    measured = parse(EXAMPLE.encode())
    assert measured.config.broker.key_uri == "kbs:///models/my-model/1"
    assert measured.digest == hashlib.sha256(EXAMPLE.encode()).digest()
    assert parse(EXAMPLE.encode() + b"\n").digest != measured.digest


def test_every_key_is_explained_and_nothing_else() -> None:
    assert set(EXPLAIN) == set(keys())


def change(old: str, new: str, text: str = EXAMPLE) -> str:
    assert old in text
    return text.replace(old, new)


ENDPOINTS = 'endpoints = ["kbs.example.com:8443"]   # several addresses of one broker, tried in turn'
NAME = 'server_name = "kbs.example.com"'
CA = """\"\"\"
-----BEGIN CERTIFICATE-----
the CA that signed the broker's certificate
-----END CERTIFICATE-----
\"\"\"
"""


def trustee(lines: str) -> str:
    return change(ENDPOINTS, lines)


def without_tls() -> str:
    """Sample evidence for a KBS on this machine."""
    text = change(NAME, "", trustee('url = "http://127.0.0.1:8080"'))
    text = change('attester = "snp"', 'attester = "sample"', change(f"ca_pem = {CA}", "", text))
    return text + '[simulation]\nmachine = "/machine"\n'


NO_URLS = [
    *("", "kbs:8080", "https://", "https://kbs/", "https://kbs/kbs/v0", "https://u@kbs", "https://kbs?x", "ftp://kbs"),
    *("https://kbs..com", "https://kbs:", "https://kbs:123456", "https://kbs\\n", "https://exämple"),
    *("https://[::::]:8080", "https://[1]", "https://[1:2:3:4:5:6:7:8:9]", "https://kbs:0"),
]
NO_RESOURCES = [
    *("", "kbs:///a/b", "kbs:///a/b/c/d", "kbs:///a/../c", "kbs://host/a/b/c", "kbs+:///a", "kbs+P:///a", "kbs+x:///"),
    *(
        "kbs+x:///a//b",
        "kbs+x:///a?",
        "kbs+x:///a?b#c",
        "kbs+x:///a?b c",
        "kbs+x:///a?%2",
        "kbs:///a/b/c\\n",
        "https://x/a/b/c",
    ),
]
BAD = ConfigProblem.BAD_VALUE
NEEDS = ConfigProblem.NEEDS_OTHER_KEY
CERTIFICATE = "-----BEGIN CERTIFICATE-----"
COCO = EXAMPLE.replace('attester = "snp"', 'attester = "coco"')
CDH = re.sub(r"(?s)\[broker\].*?(?=\[artifact\])", '[broker]\ncdh = true\nkey_uri = "kbs:///models/my-model/1"\n', COCO)
NOT_LOOPBACK = [
    *("http://127.0.0.1", "https://127.0.0.1:8006", "http://localhost:8006", "http://10.0.0.1:8006", "http://0.0.0.0:8006"),
    *("http://127.0.0.1:8006/", "http://127.0.0.1:0", "http://127.0.0.1:65536", "http://u@127.0.0.1:8006", "http://[::2]:8006"),
]


@pytest.mark.parametrize(
    ("text", "problem", "key"),
    [
        ("", ConfigProblem.WRONG_SCHEMA, "schema"),
        (change("keyturn/v1", "keyturn/v2"), ConfigProblem.WRONG_SCHEMA, "schema"),
        ("schema =", ConfigProblem.NOT_TOML, None),
        ("schema = " + "1" * 5000, ConfigProblem.NOT_TOML, None),
        (EXAMPLE + "[other]\n", ConfigProblem.UNKNOWN_KEY, "other"),
        (change("port = 8080", "prot = 8080"), ConfigProblem.UNKNOWN_KEY, "server.prot"),
        (change("port = 8080", ""), ConfigProblem.MISSING_KEY, "server.port"),
        (change("port = 8080", 'port = "8080"'), ConfigProblem.WRONG_TYPE, "server.port"),
        (change("port = 8080", "port = 65536"), BAD, "server.port"),
        (change("count = 1 ", "count = 17 "), BAD, "gpu.count"),
        (change("count = 1 ", "count = -1 "), BAD, "gpu.count"),
        (change("count = 1 ", "count = 8\nswitches = 3 "), BAD, "gpu.switches"),
        (change("count = 1 ", "count = 4\nswitches = 4 "), NEEDS, "gpu.count"),
        (change("count = 1 ", 'count = 8\nswitches = 4\narchitecture = "blackwell" '), NEEDS, "gpu.architecture"),
        (change("kbs.example.com:8443", "kbs.example.com"), BAD, "broker.endpoints[0]"),
        (change("kbs.example.com:8443", "kbs.example.com:65536"), BAD, "broker.endpoints[0]"),
        (change("kbs.example.com:8443", "kbs..com:8443"), BAD, "broker.endpoints[0]"),
        (change("kbs.example.com:8443", "[::::]:8443"), BAD, "broker.endpoints[0]"),
        (change("kbs.example.com:8443", "k" * 64 + ":8443"), BAD, "broker.endpoints[0]"),
        (change("-----BEGIN CERTIFICATE-----", "-----BEGIN PUBLIC KEY-----"), BAD, "broker.ca_pem"),
        (change("-----BEGIN CERTIFICATE-----", "-----BEGIN CERTIFICATE-----ä"), BAD, "broker.ca_pem"),
        (change("kbs:///models/my-model/1", "kbs:///models/../1"), BAD, "broker.key_uri"),
        (change("kbs:///models/my-model/1", "https://models/my-model/1"), BAD, "broker.key_uri"),
        (change('manifest_digest = "sha256:', 'manifest_digest = "sha512:'), BAD, "artifact.manifest_digest"),
        (change("https://models.example.com/my-model", "ftp://models"), BAD, "artifact.source"),
        (change('attester = "snp"', 'attester = "simulated-snp"'), NEEDS, "simulation.machine"),
        (change('attester = "snp"', 'attester = "simulated-tdx"'), NEEDS, "simulation.machine"),
        (EXAMPLE + '[simulation]\nmachine = "/machine"\n', NEEDS, "simulation.machine"),
        (change("timeout_s = 180", "route_timeout_s = 3601"), BAD, "broker.route_timeout_s"),
        (change("timeout_s = 180", "route_timeout_s = -1"), BAD, "broker.route_timeout_s"),
        (change("[tee]", "[tee]\nwait_s = 601"), BAD, "tee.wait_s"),
        (change("[tee]", "[tee]\nwait_s = -1"), BAD, "tee.wait_s"),
        (change("[tee]", "[tee]\nwait_s = 1.5"), ConfigProblem.WRONG_TYPE, "tee.wait_s"),
        *((change("[tee]", f'[tee]\ncoco_url = "{url}"'), BAD, "tee.coco_url") for url in NOT_LOOPBACK),
        (change("cdh = true", "", CDH), ConfigProblem.MISSING_KEY, "broker.endpoints"),
        (change("cdh = true", "cdh = false", CDH), ConfigProblem.MISSING_KEY, "broker.endpoints"),
        (change("[broker]", "[broker]\ncdh = true", COCO), NEEDS, "broker.cdh"),
        (change('attester = "coco"', 'attester = "snp"', CDH), NEEDS, "broker.cdh"),
        (change("cdh = true", 'cdh = true\nserver_name = "kbs.example.com"', CDH), NEEDS, "broker.server_name"),
        (change("cdh = true", f"cdh = true\nca_pem = '{CERTIFICATE}'", CDH), NEEDS, "broker.ca_pem"),
        (change('server_name = "kbs.example.com"', ""), ConfigProblem.MISSING_KEY, "broker.server_name"),
        (re.sub(r'(?s)ca_pem = """.*?"""', "", EXAMPLE), ConfigProblem.MISSING_KEY, "broker.ca_pem"),
        (re.sub(r"(?s)token_keys = .*?\]\n", "", EXAMPLE), ConfigProblem.MISSING_KEY, "broker.token_keys"),
        (change('attester = "snp"', 'attester = "simulated-coco"'), NEEDS, "simulation.machine"),
        (change(ENDPOINTS, ENDPOINTS + '\nurl = "https://kbs"'), NEEDS, "broker.url"),
        (change(ENDPOINTS, ENDPOINTS + '\nresource_uri = "kbs:///a/b/c"'), NEEDS, "broker.resource_uri"),
        (change(ENDPOINTS, ENDPOINTS + '\nprotocol_version = "0.4.0"'), NEEDS, "broker.protocol_version"),
        (trustee('url = "https://kbs"\ntokens = "trustee"'), NEEDS, "broker.tokens"),
        (change(ENDPOINTS, ENDPOINTS + '\ntokens = "ear"'), BAD, "broker.tokens"),
        (change(ENDPOINTS, ""), ConfigProblem.MISSING_KEY, "broker.endpoints"),
        (change('attester = "snp"', 'attester = "sample"'), NEEDS, "simulation.machine"),
        (SIMULATED.replace("simulated-snp", "sample"), NEEDS, "tee.attester"),
        (trustee('url = "http://kbs"'), NEEDS, "broker.url"),
        (trustee('url = "https://kbs:0"'), BAD, "broker.url"),
        (trustee('url = "https://kbs:65536"'), BAD, "broker.url"),
        *((trustee(f'url = "{url}"'), BAD, "broker.url") for url in NO_URLS),
        *((trustee(f'url = "https://kbs"\nresource_uri = "{uri}"'), BAD, "broker.resource_uri") for uri in NO_RESOURCES),
        *(
            (trustee(f'url = "https://kbs"\nprotocol_version = "{version}"'), BAD, "broker.protocol_version")
            for version in ("", "1", "0.4", "v0.4.0", "0.4.0-rc1", "=0.4.0", "0.4.0\\n")
        ),
        (change(f"ca_pem = {CA}", "", trustee('url = "https://kbs"')), ConfigProblem.MISSING_KEY, "broker.ca_pem"),
        (change(NAME, "", trustee('url = "https://kbs"')), ConfigProblem.MISSING_KEY, "broker.server_name"),
        (without_tls().replace('url = "http://1', 'server_name = "kbs"\nurl = "http://1'), NEEDS, "broker.server_name"),
        (change('destination = "auto"', "unsafe_allow_swap = true"), NEEDS, "artifact.unsafe_allow_swap"),
        (change('destination = "auto"', 'destination = "directory"'), NEEDS, "artifact.directory"),
        (change('destination = "auto"', 'directory = "/dev/shm/x"'), NEEDS, "artifact.directory"),
        (change('destination = "auto"', 'destination = "memfd"\nafter_ready = "release"'), NEEDS, "artifact.after_ready"),
        (change('destination = "auto"', 'after_ready = "release"').partition("[server]")[0], NEEDS, "artifact.after_ready"),
        (change('destination = "auto"', 'mirrors = ["ftp://x"]'), BAD, "artifact.mirrors[0]"),
        (change("[server]", "[server]\nuid = 0"), BAD, "server.uid"),
        (change("[server]", '[server]\nenvironment = {"A=B" = "1"}'), BAD, None),
    ],
)
def test_every_mistake_names_its_key(text: str, problem: ConfigProblem, key: str | None) -> None:
    found = failure(text)
    assert found[0] == problem
    assert key is None or found[1] == key


@pytest.mark.parametrize(
    "url", ["https://kbs.example.com", "https://kbs.example.com:8080", "https://10.0.0.1", "https://[fd00::1]:443"]
)
def test_a_url_in_place_of_endpoints_is_a_trustee_kbs(url: str) -> None:
    broker = parse(trustee(f'url = "{url}"').encode()).config.broker
    assert (broker.url, broker.endpoints, broker.resource_uri, broker.protocol_version) == (url, None, None, None)


@pytest.mark.parametrize(
    "uri",
    [
        "kbs:///models/my-model/1",
        "kbs:///models/my-model/1?version=2",
        "kbs+external:///vault/secret/models/key?version=2&x=%20~",
        "kbs+pkcs11:///key",
    ],
)
def test_the_key_may_lie_elsewhere_at_trustee_and_in_a_plugin(uri: str) -> None:
    broker = parse(trustee(f'url = "https://kbs"\nresource_uri = "{uri}"').encode()).config.broker
    assert (broker.resource_uri, broker.key_uri) == (uri, "kbs:///models/my-model/1")


def test_sample_evidence_and_plain_http_are_simulations() -> None:
    config = parse(without_tls().encode()).config
    assert (config.tee.attester, config.tee.simulated, config.broker.url) == ("sample", True, "http://127.0.0.1:8080")
    assert not parse(EXAMPLE.encode()).config.tee.simulated


SIGNED = """provider_keys = ["-----BEGIN PUBLIC KEY-----"]
tag = "stable"
name = "my-model"
#"""


KSERVE = """format = "kserve-jwe"
name = "my-model"
jwe_files = ["a/b.bin.jwe"]
plain_files = { "config.json" = "sha256:%s" }
#""" % ("0" * 64)


CREDENTIALS = 'credentials_uri = "kbs:///models/store/1"\nmanifest_digest ='


def with_credentials(source: str, text: str = CREDENTIALS, more: str = "") -> str:
    return change("manifest_digest =", f"{more}{text}", change("https://models.example.com/my-model", source))


def test_credentials_from_the_broker_are_for_a_closed_store_and_a_pinned_manifest() -> None:
    bucket = 'endpoint = "{}"\n'
    for good in (
        with_credentials("oci://registry.example.com/x"),
        with_credentials("s3://models/x"),
        with_credentials("s3://models/x", more=bucket.format("https://s3.example.com")),
        with_credentials("s3://models/x", more=bucket.format("http://127.0.0.1:9000")),
        with_credentials("oci+http://localhost:5000/x"),
        with_credentials("oci+http://[::1]:5000/x"),
    ):
        assert parse(good.encode()).config.artifact.credentials_uri == "kbs:///models/store/1"
    signed = 'credentials_uri = "kbs:///models/store/1"\n' + SIGNED
    in_list = 'credentials_uri = "kbs:///models/store/1"\n' + KSERVE
    for bad in (
        with_credentials("/models/x"),
        with_credentials("https://models.example.com/x"),
        with_credentials("oci://registry.example.com/x", more='user = "u"\nsecret = "s"\n'),
        with_credentials("oci://registry.example.com/x", signed),
        with_credentials("s3://models/x", in_list).replace("min_version = 1 ", "#"),
        with_credentials("s3://models/x", CREDENTIALS.replace("store", "my-model")),  # the model key
        with_credentials("oci+http://registry.example.com/x"),
        with_credentials("oci+http://localhost.example.com/x"),
        with_credentials("s3://models/x", more=bucket.format("http://s3.example.com")),
        with_credentials("s3://models/x", more=bucket.format("http://127.0.0.1.example.com")),
    ):
        assert failure(bad) == (ConfigProblem.NEEDS_OTHER_KEY, "artifact.credentials_uri"), bad
    elsewhere = change(
        ENDPOINTS, 'url = "https://kbs.example.com"\nresource_uri = "kbs:///models/store/1"', with_credentials("s3://m/x")
    )
    for text in (elsewhere, elsewhere.replace('store/1"', 'store/1?version=2"', 1)):
        assert failure(text) == (ConfigProblem.NEEDS_OTHER_KEY, "artifact.credentials_uri")
    assert failure(with_credentials("s3://m/x", CREDENTIALS.replace("/1", ""))) == (
        ConfigProblem.BAD_VALUE,
        "artifact.credentials_uri",
    )


def test_a_kserve_model_does_not_lie_in_a_registry() -> None:
    for text in (kserve(KSERVE.replace("format", 'mirrors = ["oci://host/x"]\nformat')),):
        with pytest.raises(ConfigError) as caught:
            parse(text.encode())
        assert caught.value.key == "artifact.source"


def test_a_signed_model_has_keys_and_keys_have_a_signed_model() -> None:
    name, keys = 'model_signature = "model.sig"\n', 'model_signature_keys = ["-----BEGIN PUBLIC KEY-----"]\n'
    artifact = parse(change("manifest_digest =", f"{name}{keys}manifest_digest =").encode()).config.artifact
    assert (artifact.model_signature, len(artifact.model_signature_keys)) == ("model.sig", 1)
    for text in (name, keys):
        with pytest.raises(ConfigError) as caught:
            parse(change("manifest_digest =", f"{text}manifest_digest =").encode())
        assert (caught.value.problem, caught.value.key) == (ConfigProblem.NEEDS_OTHER_KEY, "artifact.model_signature")
    with pytest.raises(ConfigError) as caught:
        parse(kserve(name + keys + KSERVE).encode())
    assert caught.value.key == "artifact.model_signature"


def kserve(text: str) -> str:
    return change("manifest_digest =", text).replace("min_version = 1 ", "#")


def test_a_kserve_model_is_its_list_and_nothing_else() -> None:
    artifact = parse(kserve(KSERVE).encode()).config.artifact
    assert (artifact.jwe_files, list(artifact.plain_files)) == (("a/b.bin.jwe",), ["config.json"])
    for text, key in (
        (kserve(KSERVE.removesuffix("#") + "manifest_digest ="), "artifact.manifest_digest"),
        (kserve('jwe_files = ["a.jwe"]\nmanifest_digest ='), "artifact.format"),
        (kserve("plain_files = {x = 'sha256:%s'}\nmanifest_digest =" % ("0" * 64)), "artifact.format"),
        (kserve(KSERVE.replace('name = "my-model"', "")), "artifact.name"),
        (kserve(KSERVE.replace('["a/b.bin.jwe"]', "[]")), "artifact.jwe_files"),
        (kserve(KSERVE.replace('["a/b.bin.jwe"]', '["a.jwe", "a.jwe"]')), "artifact.plain_files"),
        (kserve(KSERVE.replace("a/b.bin.jwe", "config.json.jwe")), "artifact.plain_files"),
        (kserve(KSERVE.replace("format", "min_version = 2\nformat")), "artifact.min_version"),
        (kserve(KSERVE.replace("format", 'tag = "x"\nformat')), "artifact.tag"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse(text.encode())
        assert (caught.value.problem, caught.value.key) == (ConfigProblem.NEEDS_OTHER_KEY, key)
    for name in ("../a.jwe", "/a.jwe", "a//b.jwe", "a.bin", ".a.jwe", "a b.jwe", "%2e.jwe"):
        with pytest.raises(ConfigError):
            parse(kserve(KSERVE.replace("a/b.bin.jwe", name)).encode())


ENTRY = """[[artifact.allowed]]
uri = "keyturn://a"
source = "https://models.example.com/a"
manifest_digest = "sha256:%s"
""" % ("1" * 64)
SECOND = f"""{ENTRY.replace("//a", "//b").replace("1" * 64, "2" * 64)}
key_uri = "kbs:///models/b/2"
name = "b"
"""


def allowing(*entries: str, common: str = 'destination = "directory"\ndirectory = "/mnt/models"') -> str:
    return EXAMPLE[: EXAMPLE.index("[artifact]")] + f"[artifact]\nmin_version = 1\n{common}\n" + "".join(entries)


def test_an_allowed_model_is_an_entry_over_what_all_of_them_share() -> None:
    measured = parse(allowing(ENTRY, SECOND).encode())
    first, second = measured.allowed
    assert measured.config == first
    assert (first.artifact.source, first.artifact.min_version) == ("https://models.example.com/a", 1)
    assert (first.broker.key_uri, second.broker.key_uri) == ("kbs:///models/my-model/1", "kbs:///models/b/2")
    assert (second.artifact.name, second.artifact.directory, second.artifact.uri) == ("b", "/mnt/models", "keyturn://b")
    chosen = measured.select(Selection("keyturn://b", "kbs:///models/b/2", "True"))
    assert (chosen.config, chosen.digest) == (second, measured.digest)
    assert chosen.select(None).config == second


def test_where_several_models_are_allowed_one_has_to_be_asked_for() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(allowing(ENTRY, SECOND).encode()).select(None)
    assert (caught.value.problem, caught.value.key) == (ConfigProblem.UNSELECTED, "artifact.allowed")
    assert parse(allowing(ENTRY).encode()).select(None).config.artifact.uri == "keyturn://a"
    assert parse(EXAMPLE.encode()).select(None).config.artifact.uri is None


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        *((Selection(uri), Asked.URI) for uri in ("keyturn://c", "keyturn://a/", "KEYTURN://a", "keyturn://", "")),
        *(
            (Selection(uri), Asked.URI)
            for uri in ("keyturn://A", "keyturn://%61", "keyturn://a\n", " keyturn://a", "keyturn://a?")
        ),
        *((Selection(uri), Asked.URI) for uri in ("keyturn://a#", "keyturn://./a", "keyturn://\uff41", "keyturn://a\udcff")),
        (Selection("keyturn://a", "KBS:///models/my-model/1"), Asked.RESOURCE_ID),
        (Selection("keyturn://a", "kbs:///models/b/2"), Asked.RESOURCE_ID),
        (Selection("keyturn://b", "kbs:///models/my-model/1"), Asked.RESOURCE_ID),
        (Selection("keyturn://a", ""), Asked.RESOURCE_ID),
        *((Selection("keyturn://a", None, said), Asked.CONFIDENTIAL) for said in ("false", "", "1")),
    ],
    ids=str,
)
def test_what_is_asked_for_must_be_an_entry_in_every_word(asked: Selection, why: Asked) -> None:
    with pytest.raises(ConfigNotMeasuredError) as caught:
        parse(allowing(ENTRY, SECOND).encode()).select(asked)
    assert caught.value.asked is why
    assert caught.value.exit_status == 10


def test_a_very_long_word_is_no_entry_either() -> None:
    with pytest.raises(ConfigNotMeasuredError):
        parse(allowing(ENTRY).encode()).select(Selection("keyturn://a" * 100_000))


def test_where_nothing_is_allowed_nothing_can_be_asked_for() -> None:
    with pytest.raises(ConfigNotMeasuredError):
        parse(EXAMPLE.encode()).select(Selection("https://models.example.com/my-model"))


def test_every_mistake_in_an_entry_names_it() -> None:
    server = EXAMPLE[EXAMPLE.index("[server]") :]
    for text, problem, key in (
        (allowing(ENTRY, ENTRY), ConfigProblem.BAD_VALUE, "artifact.allowed[1].uri"),
        (allowing(ENTRY, SECOND.replace("name =", "nmae =")), ConfigProblem.UNKNOWN_KEY, "artifact.allowed[1].nmae"),
        (allowing(ENTRY.replace("uri =", "name =")), ConfigProblem.BAD_VALUE, "artifact.allowed[0].name"),
        (allowing(ENTRY.replace('uri = "keyturn://a"', "")), ConfigProblem.MISSING_KEY, "artifact.allowed[0].uri"),
        (allowing(ENTRY.replace("keyturn://a", "my model")), ConfigProblem.BAD_VALUE, "artifact.allowed[0].uri"),
        (allowing(ENTRY.replace("keyturn://a", "x://a b")), ConfigProblem.BAD_VALUE, "artifact.allowed[0].uri"),
        (allowing(ENTRY, SECOND.replace("kbs:", "kbs")), ConfigProblem.BAD_VALUE, "artifact.allowed[1].key_uri"),
        (allowing(ENTRY + 'resource_uri = "kbs:///a/b/c"'), ConfigProblem.NEEDS_OTHER_KEY, "artifact.allowed[0].resource_uri"),
        (allowing(ENTRY + "allowed = []"), ConfigProblem.UNKNOWN_KEY, "artifact.allowed[0].allowed"),
        (allowing(ENTRY + "timeout_s = 0"), ConfigProblem.BAD_VALUE, "artifact.allowed[0].timeout_s"),
        (allowing(ENTRY.replace("source =", "#")), ConfigProblem.MISSING_KEY, "artifact.source"),
        (allowing(ENTRY, common='destination = "tmpfs"'), ConfigProblem.NEEDS_OTHER_KEY, "artifact.allowed"),
        (allowing(ENTRY, server), ConfigProblem.NEEDS_OTHER_KEY, "artifact.allowed"),
        (allowing(ENTRY, common='uri = "x://y"'), ConfigProblem.NEEDS_OTHER_KEY, "artifact.uri"),
        (allowing(common="allowed = []"), ConfigProblem.BAD_VALUE, "artifact.allowed"),
        (allowing(common="allowed = 1"), ConfigProblem.WRONG_TYPE, "artifact.allowed"),
        (allowing(common="allowed = [1]"), ConfigProblem.WRONG_TYPE, "artifact.allowed"),
        (allowing(*(ENTRY.replace("//a", f"//a{i}") for i in range(65))), ConfigProblem.BAD_VALUE, "artifact.allowed"),
        (change("manifest_digest =", 'uri = "x://y"\nmanifest_digest ='), ConfigProblem.NEEDS_OTHER_KEY, "artifact.uri"),
    ):
        assert failure(text) == (problem, key)
    assert len(parse(allowing(*(ENTRY.replace("//a", f"//a{i}") for i in range(64))).encode()).allowed) == 64


def test_a_volume_needs_no_memory_and_a_server_of_ours() -> None:
    def with_keys(text: str) -> str:
        return change("manifest_digest =", f"{text}manifest_digest =")

    artifact = parse(with_keys('format = "volume"\ndevice = "/dev/disk/by-id/virtio-model"\n').encode()).config.artifact
    assert (artifact.format, artifact.device) == ("volume", "/dev/disk/by-id/virtio-model")
    for text, key in (
        (with_keys('device = "/dev/vda"\n'), "artifact.device"),
        (with_keys('format = "volume"\nafter_ready = "release"\n'), "artifact.after_ready"),
        (with_keys('format = "volume"\n').replace('destination = "auto" ', 'destination = "tmpfs" '), "artifact.destination"),
        (
            with_keys('format = "volume"\nmodel_signature = "s"\nmodel_signature_keys = ["-----BEGIN PUBLIC KEY-----"]\n'),
            "artifact.model_signature",
        ),
        (with_keys('format = "volume"\n').partition("[server]")[0], "artifact.format"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse(text.encode())
        assert (caught.value.problem, caught.value.key) == (ConfigProblem.NEEDS_OTHER_KEY, key)
    for device in ("vda", "/etc/shadow", "/dev/", "/dev/vd a"):
        with pytest.raises(ConfigError):
            parse(with_keys(f'format = "volume"\ndevice = "{device}"\n').encode())


def test_a_model_is_named_by_digest_or_by_signature() -> None:
    signed = change("manifest_digest =", SIGNED)
    artifact = parse(signed.encode()).config.artifact
    assert (artifact.tag, artifact.name, artifact.manifest_digest) == ("stable", "my-model", None)
    with pytest.raises(RuntimeError, match="identified"):
        _ = artifact.digest
    for text, key in (
        (change("manifest_digest =", "#"), "artifact.manifest_digest"),
        (change("manifest_digest =", SIGNED.removesuffix("#") + "manifest_digest ="), "artifact.manifest_digest"),
        (change('tag = "stable"', "", signed), "artifact.tag"),
        (change("manifest_digest =", 'tag = "stable"\nmanifest_digest ='), "artifact.tag"),
        (change('name = "my-model"\n', "", signed), "artifact.name"),
    ):
        assert failure(text)[:2] == (NEEDS, key)
    for text, key in (
        (change('"stable"', '"a/b"', signed), "artifact.tag"),
        (change('"my-model"\n', '".."\n', signed), "artifact.name"),
    ):
        assert failure(text)[:2] == (BAD, key)


def test_credentials_belong_to_registries_and_buckets() -> None:
    def artifact(source: str, *keys: str) -> str:
        return change('source = "https://models.example.com/my-model"', "\n".join([f'source = "{source}"', *keys]))

    user, secret, token = 'user = "u"', 'secret = "s"', 'session_token = "t"'
    endpoint, region = 'endpoint = "https://{bucket}.s3.example.com"', 'region = "eu-1"'
    good: list[tuple[str, tuple[str, ...]]] = [
        ("oci://host:5000/a/b", ()),
        ("oci+http://host/a", (user, secret)),  # whether they may go there is up to the source
        ("s3://bucket/a", ()),
        ("s3://bucket/a", (user, secret, token, endpoint, region)),
    ]
    for source, lines in good:
        assert parse(artifact(source, *lines).encode()).config.artifact.source == source
    bad: list[tuple[str, tuple[str, ...], str]] = [
        ("https://host/a", (user, secret), "artifact.secret"),
        ("/models", (user, secret), "artifact.secret"),
        ("oci://host/a", (user,), "artifact.secret"),
        ("s3://bucket", (secret,), "artifact.secret"),
        ("oci://host/a", (user, secret, token), "artifact.session_token"),
        ("s3://bucket", (token,), "artifact.session_token"),
        ("oci://host/a", (endpoint,), "artifact.endpoint"),
        ("https://host/a", (region,), "artifact.region"),
    ]
    for source, lines, key in bad:
        assert failure(artifact(source, *lines)) == (NEEDS, key)
    malformed: list[tuple[tuple[str, ...], str]] = [
        (('endpoint = "s3.example.com"',), "artifact.endpoint"),
        (('region = "EU"',), "artifact.region"),
        ((r'user = "a\nb"', secret), "artifact.user"),
        ((user, 'secret = ""'), "artifact.secret"),
    ]
    for lines, key in malformed:
        assert failure(artifact("s3://bucket", *lines)) == (BAD, key)


def test_a_mistake_is_told_without_its_value() -> None:
    text = change("[server]", '[server]\nenvironment = {API_KEY = ["hunter2"]}')
    with pytest.raises(ConfigError) as caught:
        parse(text.encode())
    assert "hunter2" not in str(caught.value) + repr(caught.value)
    assert caught.value.__suppress_context__


def test_syntax_errors_tell_the_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(b'schema = "keyturn/v1"\n[gpu\n')
    assert caught.value.line == 2


def test_a_large_file_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(b"#" * (MAX_CONFIG_BYTES + 1))
    assert caught.value.problem is ConfigProblem.TOO_LARGE


def test_simulation_is_chosen_by_name() -> None:
    assert parse(SIMULATED.encode()).config.tee.attester == "simulated-snp"
    assert parse(SIMULATED.replace("ed-snp", "ed-tdx").encode()).config.tee.attester == "simulated-tdx"


def test_evidence_through_coco_is_chosen_by_name_and_asked_for_on_the_loopback() -> None:
    tee = parse(change('attester = "snp"', 'attester = "coco"').encode()).config.tee
    assert (tee.through_coco, tee.coco_url) == (True, "http://127.0.0.1:8006")
    assert parse(SIMULATED.replace("ed-snp", 'ed-coco"\ncoco_url = "http://[::1]:1').encode()).config.tee.through_coco
    assert not parse(EXAMPLE.encode()).config.tee.through_coco


def test_a_guests_own_components_need_neither_address_nor_ca_and_a_pinned_key_is_welcome() -> None:
    broker = parse(CDH.encode()).config.broker
    assert (broker.cdh, broker.endpoints, broker.server_name, broker.ca_pem, broker.token_keys) == (True, *[None] * 4)
    pinned = "cdh = true\ntoken_keys = ['-----BEGIN PUBLIC KEY-----']"
    assert parse(change("cdh = true", pinned, CDH).encode()).config.broker.token_keys


def test_a_real_attester_may_take_a_simulated_verdict_when_told_so() -> None:
    assert parse(EXAMPLE.encode()).config.broker.allow_simulated is False
    config = parse(change("timeout_s = 180", "allow_simulated = true").encode()).config
    assert (config.tee.attester, config.broker.allow_simulated) == ("snp", True)


def test_eight_hoppers_may_have_four_switches() -> None:
    assert parse(EXAMPLE.encode()).config.gpu.switches == 0
    for more in ("", 'architecture = "hopper"'):
        assert parse(change("count = 1 ", f"count = 8\nswitches = 4\n{more} ").encode()).config.gpu.switches == 4


def test_waits_have_a_default_and_zero_is_no_wait() -> None:
    config = parse(EXAMPLE.encode()).config
    assert (config.tee.wait_s, config.broker.route_timeout_s) == (10, 300)
    text = change("timeout_s = 180", "route_timeout_s = 0", change("[tee]", "[tee]\nwait_s = 0"))
    config = parse(text.encode()).config
    assert (config.tee.wait_s, config.broker.route_timeout_s) == (0, 0)


@pytest.mark.parametrize("digest", [b"", b"i" * 48])
def test_a_digest_found_with_the_configuration_is_kept_as_it_is(digest: bytes) -> None:
    assert parse(EXAMPLE.encode(), digest).digest == digest


@given(st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_a_config_error(data: bytes) -> None:
    with pytest.raises(AgentError):
        parse(data)


@given(st.sampled_from(re.findall(r'^[a-z_]+ = [^\n"]+', EXAMPLE, re.MULTILINE) or [""]), st.text(max_size=20))
def test_any_value_for_a_key_is_taken_or_a_config_error(line: str, value: str) -> None:
    try:
        parse(EXAMPLE.replace(line, line.split("=", maxsplit=1)[0] + "= " + value).encode("utf-8", "surrogatepass"))
    except ConfigError as error:
        assert len(str(error)) < 300

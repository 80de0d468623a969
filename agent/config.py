"""The configuration: one schema, one parser. `MeasuredConfig` is covered by evidence and may decide anything.

Owns the schema and the digest; reads no environment and no file but the one it is given. What the host says (paths of the
status file, addresses of the health port, log view) are `HostHints`, flags that decide nothing.
The digest over these bytes, or over the initdata document they stand in, must once fitted equal HOST_DATA (SEV-SNP) or
MRCONFIGID (TDX) of the guest's own report (`evidence/collect.py` checks it).
"""

import hashlib
import ipaddress
import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from agent.closed import Ident
from agent.config_source import MAX_CONFIG_BYTES
from agent.errors import Asked, ConfigError, ConfigNotMeasuredError, ConfigProblem

SCHEMA = "keyturn/v1"
GPUS_OF_PROTECTED_PCIE = 8
MAX_ALLOWED = 64
"""Entries of `artifact.allowed`."""

_Parsed = TypeVar("_Parsed")
_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_Endpoint = Annotated[str, msgspec.Meta(pattern=rf"^(\[[0-9a-fA-F:]+\]|{_LABEL}(\.{_LABEL})*):[0-9]{{1,5}}\Z", max_length=260)]
_DnsName = Annotated[str, msgspec.Meta(pattern=rf"^{_LABEL}(\.{_LABEL})*\Z", max_length=253)]
_KeyUri = Annotated[
    str, msgspec.Meta(pattern=r"^kbs:///[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*){2}\Z", max_length=128)
]
_KbsUrl = Annotated[
    str, msgspec.Meta(pattern=rf"^https?://(\[[0-9a-fA-F:]+\]|{_LABEL}(\.{_LABEL})*)(:[0-9]{{1,5}})?\Z", max_length=270)
]
_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_ResourceUri = Annotated[
    str,
    msgspec.Meta(
        # Trustee's resource has three segments; what another plugin's path means, and a query, is the plugin's.
        pattern=rf"^kbs(:///{_SEGMENT}(/{_SEGMENT}){{2}}|\+[a-z0-9-]+:///{_SEGMENT}(/{_SEGMENT}){{0,7}})"
        r"(\?([A-Za-z0-9_.~&=+-]|%[0-9A-Fa-f]{2})+)?\Z",
        max_length=512,
    ),
]
_SemVer = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,4}(\.[0-9]{1,4}){2}\Z")]
_Digest = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
_Certificate = Annotated[str, msgspec.Meta(pattern=r"^\s*-----BEGIN CERTIFICATE-----[!-~\s]*\Z", max_length=64 << 10)]
_PublicKey = Annotated[str, msgspec.Meta(pattern=r"^\s*-----BEGIN PUBLIC KEY-----[!-~\s]*\Z", max_length=8 << 10)]
_Credential = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]+\Z", max_length=8 << 10)]
# An address, not a name: whoever writes /etc/hosts does not choose who answers.
_LoopbackUrl = Annotated[str, msgspec.Meta(pattern=r"^http://(127(\.[0-9]{1,3}){3}|\[::1\]):[0-9]{1,5}\Z")]
_IN_THE_OPEN = re.compile(r"(oci\+)?http://(?!(localhost|127(\.[0-9]{1,3}){3}|\[::1\])([:/]|\Z))")
# Clean and relative, and the same in a URL.
_FILE = r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}(/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}){0,7}"
_FileName = Annotated[str, msgspec.Meta(pattern=rf"^{_FILE}\Z", max_length=512)]
_JweName = Annotated[str, msgspec.Meta(pattern=rf"^{_FILE}\.jwe\Z", max_length=512)]
_StorageUri = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9+.-]{0,31}://[!-~]+\Z", max_length=2048)]
_Mirror = Annotated[str, msgspec.Meta(pattern=r"^(/|https?://|oci(\+http)?://)[^\s\x00]+\Z", max_length=2048)]
_Path = Annotated[str, msgspec.Meta(pattern=r"^/[^\x00]*\Z", max_length=4096)]
_Text = Annotated[str, msgspec.Meta(pattern=r"^[^\x00]*\Z", max_length=32 << 10)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Unknown keys are errors in every section."""


class TeeConfig(_Section, frozen=True, kw_only=True):
    attester: Literal["snp", "tdx", "coco", "simulated-snp", "simulated-tdx", "simulated-coco", "sample"]
    coco_url: _LoopbackUrl = "http://127.0.0.1:8006"
    wait_s: Annotated[int, msgspec.Meta(ge=0, le=600)] = 10
    runtime_measurement: Literal["required", "if-supported"] = "if-supported"

    @property
    def through_coco(self) -> bool:
        """Evidence comes from CoCo's api-server-rest, real or simulated."""
        return self.attester.endswith("coco")

    @property
    def simulated(self) -> bool:
        """Evidence proves nothing about this machine."""
        return self.attester.startswith("simulated-") or self.attester == "sample"


class SimulationConfig(_Section, frozen=True, kw_only=True):
    machine: _Path
    report_root: _Path | None = None


class GpuConfig(_Section, frozen=True, kw_only=True):
    count: Annotated[int, msgspec.Meta(ge=0, le=16)]
    switches: Literal[0, 4] = 0
    architecture: Literal["hopper", "blackwell"] | None = None
    ready_state: Literal["own", "preset"] = "own"


class BrokerConfig(_Section, frozen=True, kw_only=True):
    """Who gives the key: exactly one of `endpoints` (our broker), `url` (Trustee) and `cdh` (the guest's own components)."""

    endpoints: Annotated[tuple[_Endpoint, ...], msgspec.Meta(min_length=1, max_length=16)] | None = None
    url: _KbsUrl | None = None
    resource_uri: _ResourceUri | None = None
    protocol_version: _SemVer | None = None
    cdh: bool = False
    tokens: Literal["keyturn", "trustee"] = "keyturn"
    server_name: _DnsName | None = None
    ca_pem: _Certificate | None = None
    token_keys: Annotated[tuple[_PublicKey, ...], msgspec.Meta(min_length=1, max_length=8)] | None = None
    key_uri: _KeyUri
    timeout_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 180
    route_timeout_s: Annotated[int, msgspec.Meta(ge=0, le=3600)] = 300
    allow_simulated: bool = False


class ArtifactConfig(_Section, frozen=True, kw_only=True):
    source: Annotated[str, msgspec.Meta(pattern=r"^(/|https?://|oci(\+http)?://|s3://)[^\s\x00]+\Z", max_length=2048)]
    user: _Credential | None = None
    secret: _Credential | None = None
    session_token: _Credential | None = None
    credentials_uri: _KeyUri | None = None
    endpoint: Annotated[str, msgspec.Meta(pattern=r"^https?://[!-~]+\Z", max_length=512)] | None = None
    region: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]+\Z", max_length=63)] | None = None
    mirrors: Annotated[tuple[_Mirror, ...], msgspec.Meta(max_length=8)] = ()
    manifest_digest: _Digest | None = None
    provider_keys: Annotated[tuple[_PublicKey, ...], msgspec.Meta(max_length=8)] = ()
    tag: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")] | None = None
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")] | None = None
    min_version: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    model_signature: _FileName | None = None
    model_signature_keys: Annotated[tuple[_PublicKey, ...], msgspec.Meta(max_length=8)] = ()
    format: Literal["keyturn", "kserve-jwe", "volume"] = "keyturn"
    device: Annotated[str, msgspec.Meta(pattern=r"^/dev/[A-Za-z0-9_./:-]+\Z", max_length=256)] | None = None
    uri: _StorageUri | None = None  # of an entry of artifact.allowed, and of nothing else
    jwe_files: Annotated[tuple[_JweName, ...], msgspec.Meta(max_length=1024)] = ()
    plain_files: Annotated[dict[_FileName, _Digest], msgspec.Meta(max_length=1024)] = {}
    ca_pem: _Certificate | None = None
    destination: Literal["auto", "tmpfs", "memfd", "directory"] = "auto"
    directory: _Path | None = None
    after_ready: Literal["keep", "release"] = "keep"
    unsafe_allow_swap: bool = False
    headroom_mib: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 64
    timeout_s: Annotated[int, msgspec.Meta(ge=1, le=86400)] = 3600

    def __repr__(self) -> str:
        return f"ArtifactConfig(source={self.source.partition('?')[0]!r}, …)"  # credentials stand in no text

    @property
    def digest(self) -> str:
        """The manifest's. RuntimeError: it was not identified yet (`artifact.identify`)."""
        if self.manifest_digest is None:
            raise RuntimeError("a signed model is identified before it is used")
        return self.manifest_digest


class ServerConfig(_Section, frozen=True, kw_only=True):
    preset: Literal["llama-cpp", "vllm", "triton", "custom"]
    command: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=1024)] = ()
    environment: dict[Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z", max_length=256)], _Text] = {}
    host: Literal["127.0.0.1", "0.0.0.0", "::1", "::"] = "127.0.0.1"  # noqa: S104  # a server is there to be reached
    port: _Port
    model_id: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None
    health_path: Annotated[str, msgspec.Meta(pattern=r"^/[!-~]*\Z", max_length=256)] | None = None
    probe: Literal["completion", "embedding", "none"] | None = None
    uid: Annotated[int, msgspec.Meta(ge=1, le=2**31)] = 65532
    gid: Annotated[int, msgspec.Meta(ge=1, le=2**31)] = 65532
    unsafe_run_as_root: bool = False
    ready_timeout_s: Annotated[int, msgspec.Meta(ge=1, le=7200)] = 600
    stop_timeout_s: Annotated[int, msgspec.Meta(ge=1, le=600)] = 30
    max_restarts: Annotated[int, msgspec.Meta(ge=0, le=100)] = 3
    scratch_mib: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 1024
    output: Literal["count", "inherit"] = "count"
    egress: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=65535)], ...], msgspec.Meta(max_length=64)] = ()


class MeasuredConfig(_Section, frozen=True, kw_only=True):
    """Everything that may decide. Parsed once from the measured bytes; frozen."""

    schema: Literal["keyturn/v1"]
    tee: TeeConfig
    gpu: GpuConfig
    broker: BrokerConfig
    artifact: ArtifactConfig
    server: ServerConfig | None = None  # None: another container's, and nothing of ours runs it
    simulation: SimulationConfig | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """What whoever started the agent asks for: hints that have to match what is measured.

    Attributes:
        uri: the storage URI, as KServe says it; None: nobody asked for a model.
        resource_id: of the key, where KServe says it.
        confidential: whether the model is to be sealed, where KServe says it: `true`.
        command: the server and its arguments; none: whatever the configuration says.
    """

    uri: str | None = None
    resource_id: str | None = None
    confidential: str | None = None
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """A configuration, what HOST_DATA or MRCONFIGID must equal once fitted, and the initdata document at hand.

    The last two are `config_source.FoundConfig`'s.

    Attributes:
        config: with `artifact.allowed`, that of its first entry: what is not of `[artifact]` is the same in all of them.
        allowed: with `artifact.allowed`, one configuration for each entry.
    """

    config: MeasuredConfig
    digest: bytes
    initdata: bytes | None = field(default=None, repr=False)
    allowed: tuple[MeasuredConfig, ...] = ()

    def select(self, asked: Selection | None) -> "Measured":
        """The one configuration that a boot goes by.

        Args:
            asked: None, or without `uri`, where nobody asked: then there must be nothing to choose.

        Raises:
            ConfigNotMeasuredError: no entry of `artifact.allowed` is what was asked for.
            ConfigError: there are several, and nobody asked.
        """
        if asked is None or asked.uri is None:
            # refusal: test_where_several_models_are_allowed_one_has_to_be_asked_for
            if len(self.allowed) > 1:
                raise ConfigError(ConfigProblem.UNSELECTED, Ident("artifact.allowed"))
            return self
        config = next((config for config in self.allowed if config.artifact.uri == asked.uri), None)
        # refusal: test_what_is_asked_for_must_be_an_entry_in_every_word
        if config is None:
            raise ConfigNotMeasuredError(Asked.URI)
        # refusal: test_what_is_asked_for_must_be_an_entry_in_every_word
        if asked.resource_id not in (None, config.broker.resource_uri or config.broker.key_uri):
            raise ConfigNotMeasuredError(Asked.RESOURCE_ID)
        # refusal: test_what_is_asked_for_must_be_an_entry_in_every_word
        if asked.confidential is not None and asked.confidential.lower() != "true":
            raise ConfigNotMeasuredError(Asked.CONFIDENTIAL)
        return replace(self, config=config, allowed=(config,))


def parse(data: bytes, digest: bytes | None = None, initdata: bytes | None = None) -> Measured:
    """Parse the measured configuration.

    Args:
        data: the file, UTF-8 TOML, at most 1 MiB.
        digest: what HOST_DATA or MRCONFIGID must equal once fitted, `b""` for zeros; None: the SHA-256 of `data`.
        initdata: the document that `digest` is over, where it is one.

    Raises:
        ConfigError: with the key concerned; never with its value, which may be a secret.
    """
    tree = _tree(data, SCHEMA)
    digest = hashlib.sha256(data).digest() if digest is None else digest
    artifact = tree.get("artifact")
    if not isinstance(artifact, dict) or "allowed" not in artifact:
        return Measured(_checked(tree), digest, initdata)
    allowed = _allowed(tree, artifact)
    return Measured(allowed[0], digest, initdata, allowed)


def _allowed(tree: dict[str, Any], artifact: dict[str, Any]) -> tuple[MeasuredConfig, ...]:
    """Each entry laid over what is common to all, as a configuration of its own that has to hold alone."""
    entries = artifact["allowed"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(ConfigProblem.WRONG_TYPE, Ident("artifact.allowed"))
    # refusal: test_every_mistake_in_an_entry_names_it
    if not 0 < len(entries) <= MAX_ALLOWED:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("artifact.allowed"))
    # refusal: test_every_mistake_in_an_entry_names_it
    if "uri" in artifact:
        raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident("artifact.uri"))
    common = {key: value for key, value in artifact.items() if key != "allowed"}
    configs: list[MeasuredConfig] = []
    for index, entry in enumerate(entries):
        own = {key: value for key, value in entry.items() if key not in _OF_BROKER}
        laid = tree | {"artifact": common | own}
        if isinstance(tree.get("broker"), dict):
            laid["broker"] = tree["broker"] | {key: entry[key] for key in _OF_BROKER if key in entry}
        try:
            config = _checked(laid, entry=True)
            # refusal: test_every_mistake_in_an_entry_names_it
            if any(config.artifact.uri == other.artifact.uri for other in configs):
                raise ConfigError(ConfigProblem.BAD_VALUE, Ident("artifact.uri"))
        except ConfigError as error:
            section, _, key = str(error.key).partition(".")
            if key.partition(".")[0].partition("[")[0] in entry or (section, key) == ("artifact", "uri"):
                raise ConfigError(error.problem, Ident(f"artifact.allowed[{index}].{key}")) from None
            raise
        configs.append(config)
    return tuple(configs)


_OF_BROKER = ("key_uri", "resource_uri")
"""Keys of `[broker]` that an entry of `artifact.allowed` may have: another model, another key."""


def _checked(tree: dict[str, Any], *, entry: bool = False) -> MeasuredConfig:
    config = _convert(tree, MeasuredConfig)
    artifact = config.artifact
    # refusal: test_every_mistake_in_an_entry_names_it
    if entry != (artifact.uri is not None):
        raise ConfigError(ConfigProblem.MISSING_KEY if entry else ConfigProblem.NEEDS_OTHER_KEY, Ident("artifact.uri"))
    # What KServe asks for is left in KServe's folder, for KServe's server.
    # refusal: test_every_mistake_in_an_entry_names_it
    if entry and (config.server is not None or artifact.destination != "directory"):
        raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident("artifact.allowed"))
    _check_together(config)
    _check_volume(config)
    return config


def parse_toml(data: bytes, cls: type[_Parsed], schema: str) -> _Parsed:
    """A UTF-8 TOML document of at most 1 MiB as the msgspec type `cls`; its `schema` key must be `schema`.

    Raises:
        ConfigError: with the key concerned; never with its value.
    """
    return _convert(_tree(data, schema), cls)


def _tree(data: bytes, schema: str) -> dict[str, Any]:
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(ConfigProblem.TOO_LARGE)
    import tomllib  # only the worker and `config check` pay for it

    try:
        tree = tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(ConfigProblem.NOT_UTF8) from None
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line ([0-9]+)", str(error))
        raise ConfigError(ConfigProblem.NOT_TOML, None, int(line[1]) if line else None) from None
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        raise ConfigError(ConfigProblem.NOT_TOML) from None
    if tree.get("schema") != schema:
        raise ConfigError(ConfigProblem.WRONG_SCHEMA, Ident("schema"))
    return tree


def _convert(tree: dict[str, Any], cls: type[_Parsed]) -> _Parsed:
    try:
        return msgspec.convert(tree, cls)
    except msgspec.ValidationError as error:
        raise _translate(str(error)) from None  # its text can quote values


def _translate(text: str) -> ConfigError:
    where = re.search(r"at `\$\.?([^`]*)`$", text)
    path = where[1] if where else ""
    field = re.search(r"(?:unknown field|required field) `([^`]*)`", text)
    if field:
        path = f"{path}.{field[1]}" if path else field[1]
    if "unknown field" in text:
        problem = ConfigProblem.UNKNOWN_KEY
    elif "missing required field" in text:
        problem = ConfigProblem.MISSING_KEY
    elif re.match(r"Expected `[^`]*`, got `", text):
        problem = ConfigProblem.WRONG_TYPE
    else:
        problem = ConfigProblem.BAD_VALUE
    return ConfigError(problem, Ident.of_peer(path.replace("[...]", "[]")) if path else None)


def _check_together(config: MeasuredConfig) -> None:
    """Rules over more than one key."""

    def wrong(key: str) -> ConfigError:
        return ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident(key))

    simulated = config.tee.simulated
    # refusal: test_every_mistake_names_its_key
    if simulated != (config.simulation is not None):
        raise wrong("simulation.machine")
    # refusal: test_every_mistake_names_its_key
    if config.artifact.unsafe_allow_swap and not simulated:
        raise wrong("artifact.unsafe_allow_swap")
    # Protected PCIe is eight Hopper GPUs and the four NVSwitches between them, as a whole.
    # refusal: test_every_mistake_names_its_key
    if config.gpu.switches and config.gpu.count != GPUS_OF_PROTECTED_PCIE:
        raise wrong("gpu.count")
    # refusal: test_every_mistake_names_its_key
    if config.gpu.switches and config.gpu.architecture == "blackwell":
        raise wrong("gpu.architecture")
    if (config.artifact.destination == "directory") != (config.artifact.directory is not None):
        raise wrong("artifact.directory")
    artifact = config.artifact
    in_bucket = artifact.source.startswith("s3://")
    # refusal: test_credentials_belong_to_registries_and_buckets
    if (artifact.user is None) != (artifact.secret is None) or (
        artifact.user is not None and not in_bucket and not artifact.source.startswith("oci")
    ):
        raise wrong("artifact.secret")
    # refusal: test_credentials_belong_to_registries_and_buckets
    if artifact.session_token is not None and (artifact.user is None or not in_bucket):
        raise wrong("artifact.session_token")
    if artifact.credentials_uri is not None:
        _check_credentials_uri(artifact, config.broker)
    # refusal: test_credentials_belong_to_registries_and_buckets
    if artifact.endpoint is not None and not in_bucket:
        raise wrong("artifact.endpoint")
    # refusal: test_credentials_belong_to_registries_and_buckets
    if artifact.region is not None and not in_bucket:
        raise wrong("artifact.region")
    # Its server holds a memfd, and what another container serves is not ours to release.
    # refusal: test_every_mistake_names_its_key
    if config.artifact.after_ready == "release" and (config.artifact.destination == "memfd" or config.server is None):
        raise wrong("artifact.after_ready")
    # refusal: test_a_signed_model_has_keys_and_keys_have_a_signed_model
    if (config.artifact.model_signature is not None) != bool(config.artifact.model_signature_keys):
        raise wrong("artifact.model_signature")
    by_signature = bool(config.artifact.provider_keys)
    if config.artifact.format == "kserve-jwe":
        _check_kserve(config.artifact)
    # refusal: test_a_kserve_model_is_its_list_and_nothing_else
    elif config.artifact.jwe_files or config.artifact.plain_files:
        raise wrong("artifact.format")
    # refusal: test_a_model_is_named_by_digest_or_by_signature
    elif by_signature == (config.artifact.manifest_digest is not None):
        raise wrong("artifact.manifest_digest")
    # refusal: test_a_model_is_named_by_digest_or_by_signature
    if by_signature != (config.artifact.tag is not None):
        raise wrong("artifact.tag")
    # A key signs all models of its provider: the name says which one is meant.
    # refusal: test_a_model_is_named_by_digest_or_by_signature
    if by_signature and config.artifact.name is None:
        raise wrong("artifact.name")
    # refusal: test_every_mistake_names_its_key
    if config.tee.attester == "sample" and config.broker.url is None:  # only Trustee knows it
        raise wrong("tee.attester")
    # refusal: test_every_mistake_names_its_key
    if (config.broker.url or "").startswith("http:") and not simulated:
        raise wrong("broker.url")
    _check_broker(config.broker, through_coco=config.tee.through_coco)
    addresses = {f"broker.endpoints[{index}]": endpoint for index, endpoint in enumerate(config.broker.endpoints or ())}
    addresses |= {"broker.url": config.broker.url} if config.broker.url else {}
    for key, address in (addresses | {"tee.coco_url": config.tee.coco_url}).items():
        port, in_brackets = re.search(r":([0-9]+)\Z", address), re.search(r"\[(.*)\]", address)
        # refusal: test_every_mistake_names_its_key
        if (port and not 1 <= int(port[1]) <= 65535) or (in_brackets and not _is_ipv6(in_brackets[1])):
            raise ConfigError(ConfigProblem.BAD_VALUE, Ident(key))


def _check_credentials_uri(artifact: ArtifactConfig, broker: BrokerConfig) -> None:
    """Of credentials that come with the verdict."""
    store = artifact.source if artifact.endpoint is None else artifact.endpoint
    rules = (
        artifact.source.startswith(("oci", "s3:")) and artifact.user is None,
        # Evidence says what will be loaded, and what a tag means only the store knows, which is still closed then.
        artifact.manifest_digest is not None,
        # They are opened before the gate, and the model key never is.
        artifact.credentials_uri not in (broker.key_uri, (broker.resource_uri or "").partition("?")[0]),
        # Before anybody is asked for them: they go over TLS, or stay inside this guest (`artifact.sources.check_secrecy`).
        not _IN_THE_OPEN.match(store),
    )
    # refusal: test_credentials_from_the_broker_are_for_a_closed_store_and_a_pinned_manifest
    if not all(rules):
        raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident("artifact.credentials_uri"))


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _check_kserve(artifact: ArtifactConfig) -> None:
    """A list of files takes the place of a manifest, so nothing that names one may stand beside it."""
    paths = [*(name.removesuffix(".jwe") for name in artifact.jwe_files), *artifact.plain_files]
    rules = {
        "source": not any(
            store.startswith("oci") for store in (artifact.source, *artifact.mirrors)
        ),  # blobs have no paths there
        "manifest_digest": artifact.manifest_digest is None,
        "provider_keys": not artifact.provider_keys,
        "tag": artifact.tag is None,
        "min_version": artifact.min_version == 0,
        "model_signature": artifact.model_signature is None,
        "name": artifact.name is not None,
        "jwe_files": bool(artifact.jwe_files),
        "plain_files": len(set(paths)) == len(paths),
    }
    for key, holds in rules.items():
        # refusal: test_a_kserve_model_is_its_list_and_nothing_else
        if not holds:
            raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident(f"artifact.{key}"))


def _check_volume(config: MeasuredConfig) -> None:
    """A volume is mounted where it lies: nothing about memory for its files may stand beside it."""
    artifact = config.artifact
    is_volume = artifact.format == "volume"
    rules = {
        "device": is_volume or artifact.device is None,
        "destination": not is_volume or artifact.destination == "auto",
        "after_ready": not is_volume or artifact.after_ready == "keep",
        "model_signature": not is_volume or artifact.model_signature is None,
        "format": not is_volume or config.server is not None,  # a mount of ours cannot be left to another container
    }
    for key, holds in rules.items():
        # refusal: test_a_volume_needs_no_memory_and_a_server_of_ours
        if not holds:
            raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident(f"artifact.{key}"))


def _check_broker(broker: BrokerConfig, *, through_coco: bool) -> None:
    """Each way to the key has its own keys, and no way has another's."""
    ways = {"endpoints": broker.endpoints is not None, "url": broker.url is not None, "cdh": broker.cdh}
    if not any(ways.values()):
        raise ConfigError(ConfigProblem.MISSING_KEY, Ident("broker.endpoints"))
    # refusal: test_every_mistake_names_its_key
    if sum(ways.values()) > 1 or (broker.cdh and not through_coco):
        raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident("broker.cdh" if broker.cdh else "broker.url"))
    for key in ("resource_uri", "protocol_version"):
        # refusal: test_every_mistake_names_its_key
        if getattr(broker, key) is not None and broker.url is None:
            raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident(f"broker.{key}"))
    # refusal: test_every_mistake_names_its_key
    if broker.tokens != "keyturn" and broker.endpoints is None:  # the other ways have tokens of one kind each
        raise ConfigError(ConfigProblem.NEEDS_OTHER_KEY, Ident("broker.tokens"))
    with_tls = not broker.cdh and not (broker.url or "").startswith("http:")
    for key in ("server_name", "ca_pem"):
        # refusal: test_every_mistake_names_its_key
        if (getattr(broker, key) is not None) != with_tls:
            problem = ConfigProblem.MISSING_KEY if with_tls else ConfigProblem.NEEDS_OTHER_KEY
            raise ConfigError(problem, Ident(f"broker.{key}"))
    # refusal: test_every_mistake_names_its_key
    if broker.token_keys is None and not broker.cdh:
        raise ConfigError(ConfigProblem.MISSING_KEY, Ident("broker.token_keys"))


EXAMPLE = f'''# Keyturn configuration. The SHA-256 of exactly these bytes is what the guest is launched with: HOST_DATA of
# SEV-SNP, or with 16 zero bytes after it MRCONFIGID of TDX.
schema = "{SCHEMA}"

[tee]
attester = "snp"                 # the CPU TEE: "snp" or "tdx"; "coco" in a container of a CoCo guest

[gpu]
count = 1                        # evidence of exactly this many distinct GPUs, 0 for none
ready_state = "own"              # the agent sets the ready state; "preset": this image's init has set it before

[broker]
endpoints = ["kbs.example.com:8443"]   # several addresses of one broker, tried in turn
# For a Trustee KBS, instead: url = "https://kbs.example.com:8080"; where its key lies elsewhere than key_uri says, also
# resource_uri = "kbs:///models/my-model/1"; and token_keys are its attestation service's.
server_name = "kbs.example.com"        # the name its certificate must carry
key_uri = "kbs:///models/my-model/1"
timeout_s = 180                        # for the whole handshake, retries included
ca_pem = """
-----BEGIN CERTIFICATE-----
the CA that signed the broker's certificate
-----END CERTIFICATE-----
"""
token_keys = ["""
-----BEGIN PUBLIC KEY-----
the authority's ES256 token key; `keyturn broker init` prints it
-----END PUBLIC KEY-----
"""]

[artifact]
source = "https://models.example.com/my-model"   # an OCI image layout: URL, absolute path, s3://…; or a registry: oci://…
# For a registry or bucket that wants credentials, which the key broker then gives: credentials_uri = "kbs:///models/store/1"
manifest_digest = "sha256:0000000000000000000000000000000000000000000000000000000000000000"  # `keyturn seal` prints it
min_version = 1                  # older model versions are refused
destination = "auto"             # own tmpfs, else a sealed memfd

[server]
preset = "llama-cpp"
command = ["/usr/bin/llama-server", "-m", "{{model}}", "--host", "{{host}}", "--port", "{{port}}", "--alias", "my-model"]
port = 8080
model_id = "my-model"            # must appear in /v1/models before the server counts as ready
probe = "completion"             # one request that must succeed before ready
'''

EXPLAIN = {
    "schema": "version of this schema; this agent reads keyturn/v1",
    "tee.attester": "which CPU TEE gives evidence: snp or tdx, through the first interface of it that this guest has "
    "(configfs-tsm, else the device node). coco: in a container of a Kata guest, where the TEE is not ours, what CoCo's "
    "api-server-rest gives. simulated-snp, simulated-tdx, simulated-coco by name on a machine without a TEE, "
    "and sample: Trustee's evidence of nothing. Never another in its place",
    "tee.coco_url": "where api-server-rest listens, for attester coco: http, an address of the loopback, a port; default "
    "http://127.0.0.1:8006. The guest must be started with agent.guest_components_rest_api=all",
    "tee.wait_s": "seconds to wait for the TEE's driver before there is no attester, 0..600, default 10",
    "tee.runtime_measurement": "if-supported (default): the release of the key goes into RTMR 3 where this guest can extend it "
    "(TDX, Linux 6.16), and the event release_measured says so. required: a guest that cannot ends before it asks for anything",
    "simulation.machine": "folder of the simulated machine; only with a simulated attester",
    "simulation.report_root": "where a configfs-tsm that answers for the simulated machine is mounted, as `keyturn demo --via "
    "configfs` does; default: the machine is asked inside the agent's process",
    "gpu.count": "how many GPUs must attest, 0..16; a missing, extra or doubled one is an error",
    "gpu.switches": "how many NVSwitches must attest, 0 or 4, default 0. 4, with gpu.count = 8, is protected PCIe: there GPUs "
    "talk to each other unencrypted, so that GPUs in that mode are refused without the NVSwitches between them",
    "gpu.architecture": "hopper or blackwell: every GPU must be of it; default: any that can attest",
    "gpu.ready_state": "own: the agent sets the GPU ready state after the verdict, and stops if it is already set. "
    "preset: this image's init sets it at boot (stock Kata does); events and status say so",
    "broker.endpoints": "host:port of each address of the one broker; they are tried in turn, and say nothing of who answers",
    "broker.url": "https://host[:port] of a Trustee KBS, in place of endpoints; http only with a simulated attester, and then "
    "without server_name and ca_pem. Its policy decides about the key; token_keys are its attestation service's",
    "broker.resource_uri": "where a Trustee KBS has the key, with url: kbs:///repository/type/tag, or "
    "kbs+plugin:///path?query of another plugin; default: key_uri, which stays what the model was sealed for",
    "broker.protocol_version": "KBS protocol that is spoken, with url; default 0.4.0, of every Trustee since v0.14",
    "broker.cdh": "true, in place of endpoints: in a container of a CoCo guest its confidential-data-hub gives the key, from "
    "the service in the guest's own cdh.toml, after the guest's attestation-agent attested. Only with attester coco; needs "
    "neither server_name nor ca_pem, and token_keys (the attestation service's) are optional: without them its token is not "
    "verified",
    "broker.tokens": "whose verdicts count, with endpoints: keyturn (default), our broker's; trustee, where it is a relay "
    "(`keyturn broker --upstream`) before a Trustee KBS: then token_keys are its attestation service's",
    "broker.server_name": "the DNS name the broker's certificate must carry, whatever address is dialled",
    "broker.ca_pem": "the only CA that is trusted for the broker",
    "broker.token_keys": "public keys (PEM, P-256) of the authority; a verdict not signed by one of them is refused",
    "broker.key_uri": "the model key: kbs:///repository/type/tag",
    "broker.timeout_s": "seconds for the whole handshake including retries, 1..3600, default 180",
    "broker.route_timeout_s": "seconds to wait for a route out of this guest before the broker is asked, 0..3600, default 300; "
    "in a Kata guest the network comes only after kata-agent",
    "broker.allow_simulated": "accept a verdict over simulated evidence: for boot tests on emulated silicon only; "
    "status and events say simulated",
    "artifact.source": "where the sealed model lies: absolute path or http(s) URL of an OCI image layout, "
    "oci://host[:port]/repository of a registry, or s3://bucket[/prefix] of a layout in a bucket. http and oci+http go without "
    "TLS: the network then sees names and sizes; every byte is authenticated all the same. The query of an https URL goes with "
    "every request, for stores that sign a prefix (shared access signatures); S3 presigns one object and a layout has many, so "
    "a bucket takes artifact.user or artifact.credentials_uri",
    "artifact.user": "user name at the registry, or access key id of the bucket; default: asked for without credentials. The "
    "host reads this configuration, so they are to keep others from the store, not the host: let them read this model and "
    "nothing else, or leave them to the key broker, artifact.credentials_uri",
    "artifact.secret": "the password, or the secret access key. It goes over TLS only, but for a store on this machine; to the "
    "registry or its https token service, or not at all, as a signature, to a bucket; never along a redirect to another host",
    "artifact.session_token": "session token of temporary credentials for a bucket",
    "artifact.credentials_uri": "in place of these three, kbs:///repository/type/tag at the key broker. They are one JSON "
    'object, {"user": …, "secret": …} and perhaps "session_token", of at most 4 KiB: the host never sees them, and they may '
    "change without a new configuration. They come after the verdict, and only then is the store read; so the manifest must be "
    "pinned by artifact.manifest_digest, as evidence says which one it is. It is not broker.key_uri. The policy row of the key "
    "names it too (`credentials_uri`), and Trustee's policy allows it (`keyturn policy`)",
    "artifact.endpoint": "URL of the bucket's service: https://s3.example.com (the bucket becomes the first part of the path) "
    "or https://{bucket}.s3.example.com; default: AWS, https://{bucket}.s3.{region}.amazonaws.com",
    "artifact.region": "region of the bucket, default us-east-1; a clock 15 minutes off is refused as bad credentials are",
    "artifact.mirrors": "other places with the same blobs (paths, http(s) and oci URLs), tried in this order when one does not "
    "deliver, default none; asked without credentials, which are for artifact.source alone. Everything is authenticated "
    "wherever it comes from",
    "artifact.manifest_digest": "SHA-256 of the manifest; printed by `keyturn seal`. Either this or artifact.provider_keys",
    "artifact.provider_keys": "public keys (PEM; P-256, P-384, Ed25519) of which one must have signed the manifest under "
    "artifact.tag (`keyturn seal --sign`): a new release then needs no new configuration. The oldest one to accept is "
    "artifact.min_version or the verdict's floor, so keep one of them up to date",
    "artifact.tag": "with artifact.provider_keys: the name of the manifest in the store, such as my-model-v3 or stable",
    "artifact.name": "the model name that must stand in the manifest; with artifact.provider_keys it has to be given",
    "artifact.min_version": "the lowest model version to accept, default 0; the signed verdict can raise it",
    "artifact.model_signature": "path in the sealed model of an OpenSSF bundle (`model_signing sign key`): all files must "
    "be the signed ones. Costs a SHA-256 over the plaintext; default: none is looked for",
    "artifact.model_signature_keys": "public keys (PEM; P-256, P-384) of which one must have signed artifact.model_signature",
    "artifact.format": "kserve-jwe: a model as KServe's confidential serving keeps it, files of that kind of JWE below "
    "artifact.source. It has no manifest and no version, so all its files are listed here. volume: an encrypted disk of this "
    "guest, opened page by page by the kernel as it is read; artifact.source has its manifest. Needs root, the guest's own "
    "/dev, dm-crypt, dm-verity, EROFS, and [server]. Default: keyturn, FORMAT.md",
    "artifact.device": "with format = volume: path of the disk, such as /dev/xvda; default: the one whose LUKS2 header has the "
    "manifest's UUID",
    "artifact.allowed": "[[artifact.allowed]], for `keyturn load` as KServe's storage initializer: the models that a pod may "
    "ask for, 1..64. An entry has uri, any other keys of [artifact], and key_uri and resource_uri of [broker]; they take the "
    "place of what stands there. What is asked for and is no entry is refused. Only with destination = directory and without "
    "[server]",
    "artifact.uri": "only in an entry of artifact.allowed: the storageUri by which KServe asks for this model, such as "
    "keyturn://my-model; compared whole. It opens nothing: source says where the model lies. The files then lie in "
    "artifact.directory itself, where KServe's servers look for them",
    "artifact.jwe_files": "with format = kserve-jwe: the sealed files, such as weights/model.gguf.jwe; they are loaded without "
    "the .jwe",
    "artifact.plain_files": "with format = kserve-jwe: the files in clear and their SHA-256, path = sha256:…",
    "artifact.ca_pem": "the only CA for everything over https that the source is or leads to (a registry's token "
    "service, the storage it redirects to); several certificates may stand in it; default: the system's",
    "artifact.destination": "tmpfs: own detached tmpfs, needs CAP_SYS_ADMIN. memfd: sealed memory file, single-file models. "
    "directory: a given tmpfs, artifact.directory; plaintext there survives the agent's death. auto: tmpfs, else memfd",
    "artifact.directory": "an empty folder on tmpfs, for destination = directory",
    "artifact.after_ready": "keep: the model's files stay while the server runs. release: they are unlinked once it is ready, "
    "for servers that have copied the weights into GPUs; a server that crashes then is not started again. Not with a memfd",
    "artifact.unsafe_allow_swap": "go on although swap could carry weights to a disk; only with a simulated attester",
    "artifact.headroom_mib": "guest memory that must stay free beside the model, default 64",
    "artifact.timeout_s": "seconds for fetching and opening the whole model, default 3600",
    "server.preset": "with [server] the agent runs the server (`keyturn run`); without it the open model is left to another "
    "container (`keyturn load`). Readiness contract and environment of a known server: llama-cpp, vllm, triton, custom",
    "server.command": "the server's argv; {model} {model_dir} {model_id} {host} {port} {scratch} are filled in; "
    "the preset has a default",
    "server.environment": "the server's environment beside the preset's; nothing is inherited",
    "server.host": "address the server listens on: 127.0.0.1 (default), 0.0.0.0, ::1 or ::; readiness is asked on the loopback",
    "server.port": "the port the server listens on",
    "server.model_id": "an id that /v1/models must list before the server is ready; for triton a model of its repository",
    "server.health_path": "path of the health check; the preset has a default",
    "server.probe": "one request that must succeed before ready: completion, embedding, none; the preset has a default",
    "server.uid": "user id of the server when the agent is root, default 65532",
    "server.gid": "group id of the server when the agent is root, default 65532",
    "server.unsafe_run_as_root": "keep the server at uid 0 (without capabilities); for development machines",
    "server.ready_timeout_s": "seconds until the server must be ready, default 600",
    "server.stop_timeout_s": "seconds between SIGTERM and SIGKILL, default 30",
    "server.max_restarts": "how often a crashed server is started again within ten minutes, default 3",
    "server.scratch_mib": "size of the server's writable folder for caches, in guest memory, default 1024",
    "server.output": "count: what the server prints stays in the guest, only byte counts leave. "
    "inherit: it goes to the agent's output",
    "server.egress": "TCP ports the server may connect to, default none. Ports only: an entry holds for every address, and the "
    "loopback counts too, so a server whose own processes talk over TCP needs theirs here; 0 stands for all ports that the "
    "kernel gives out, which is where the processes of tensor parallelism meet. Landlock keeps it, from ABI 4 on (Linux 6.7); "
    "the event server_started says which ABI the kernel has, 0 for none. Listening is not restricted, nor is what is not "
    "connect(2) of plain TCP: UDP, MPTCP, TCP Fast Open. It stops what libraries do by themselves, not an attacker",
}
"""One sentence for each key; a test compares the keys with the schema."""


def keys() -> list[str]:
    """Every key of the schema as a dotted path."""
    found = []
    for section in msgspec.structs.fields(MeasuredConfig):
        kind = section.type
        for option in getattr(kind, "__args__", (kind,)):
            if isinstance(option, type) and issubclass(option, _Section):
                found += [f"{section.name}.{inner.name}" for inner in msgspec.structs.fields(option)]
                break
        else:
            found.append(section.name)
    return [*found, "artifact.allowed"]

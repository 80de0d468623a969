"""`keyturn broker` and `keyturn broker init`: the reference key broker, or with `--upstream` a relay before a Trustee KBS."""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import ssl
import sys
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agent import http_policy
from agent.closed import Ident
from agent.errors import AgentError, ArtifactUnavailableError, ConfigError, ConfigProblem
from agent.events import message_to_record

if TYPE_CHECKING:
    from agent.broker.audit import AuditLog
    from agent.broker.authority import Authority
    from agent.broker.policy import PolicyTable
    from agent.broker.relay import Relay, Upstream
    from agent.broker.service import BrokerServer, Tls

MAX_FILE_BYTES = (1 << 20) + 1  # the policy parser refuses more than 1 MiB
_REQUIRED = ("listen", "tls_cert", "tls_key", "audit")
_OF_AN_AUTHORITY = ("policy", "keys", "token_key")
_OPTIONS_OF_AN_AUTHORITY = ("endorsements", "tdx_collateral", "amd_crls", "unsafe_simulation_roots")
_OF_A_RELAY = ("upstream", "upstream_ca")
_OPTIONS_OF_A_RELAY = ("upstream_server_name",)
LOOK_EVERY_S = 10
"""How often a relay looks whether its KBS answers; the health service says what it saw last."""
_UPSTREAM = re.compile(r"https://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?/?")
_LISTEN = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")


def add_parser(verbs: Any, summary: str) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "broker",
        help=summary,
        description=f"{summary}. SIGHUP reads the policy again and reopens the audit log; SIGTERM drains. With --upstream it "
        "is a relay: guests speak gRPC to it, a Trustee KBS behind it decides and has the keys, and the health service says "
        'whether that answers. Guests need broker.tokens = "trustee", and the key of its attestation service in '
        "broker.token_keys.",
        allow_abbrev=False,
    )
    parser.add_argument("--listen", metavar="HOST:PORT", help="port 0 for any free one; the bound address is printed")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate chain, PEM, leaf first")
    parser.add_argument("--tls-key", metavar="FILE", help="its private key, PEM, mode 0600")
    parser.add_argument("--policy", metavar="FILE", help="policy, TOML")
    parser.add_argument(
        "--keys",
        metavar="DIR",
        help="model keys: <repository>/<type>/<tag>, 32 bytes each, mode 0600; so too the credentials of models' stores, JSON",
    )
    parser.add_argument("--token-key", metavar="FILE", help="P-256 private key that signs verdicts, PEM, mode 0600")
    parser.add_argument("--audit", metavar="FILE", help="audit log, appended to")
    parser.add_argument("--endorsements", metavar="DIR", help="AMD certificates (.pem, .der) for hosts that supply none")
    parser.add_argument(
        "--amd-crls",
        metavar="DIR",
        help="AMD's revocation lists (.crl), renewed by you; with it every guest's processor needs one that is current",
    )
    parser.add_argument(
        "--tdx-collateral",
        metavar="DIR",
        help="Intel's collateral for TDX platforms, <FMSPC>.json each; without it no TCB status is evaluated",
    )
    parser.add_argument(
        "--unsafe-simulation-roots",
        metavar="DIR",
        help="accept evidence of simulated silicon under the roots in DIR; its tokens and audit lines say so",
    )
    parser.add_argument("--upstream", metavar="URL", help="relay to the Trustee KBS at https://host[:port]")
    parser.add_argument("--upstream-ca", metavar="PEM", help="the CA of its certificate, the only one that is trusted for it")
    parser.add_argument(
        "--upstream-server-name", metavar="NAME", help="the DNS name in its certificate; default: the host of the URL"
    )
    parser.set_defaults(parser=parser)
    actions = parser.add_subparsers(dest="action", metavar="init")
    init = actions.add_parser("init", help="make keys, certificates and an example policy", allow_abbrev=False)
    init.add_argument("directory", metavar="DIR", help="a folder that is empty or not there yet")
    init.add_argument("--server-name", default="localhost", metavar="NAME", help="DNS name or IPv4 address, default localhost")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 after a drain."""
    if args.action == "init":
        return _init(Path(args.directory), args.server_name)
    _check_options(args)
    os.environ["GRPC_VERBOSITY"] = "NONE"  # gRPC's core would write what peers send to stderr
    # `cryptography` warns about oddities of the certificates that guests send: stderr is JSON lines, and not theirs to write.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"agent\.verify\.")
    return asyncio.run(_serve(args) if args.upstream is None else _serve_relay(args))


def _check_options(args: argparse.Namespace) -> None:
    """An authority and a relay have their own options, and neither takes the other's: it would say nothing there."""

    def given(*names: str) -> list[str]:
        return [name for name in names if getattr(args, name) is not None]

    def options(names: list[str]) -> str:
        return ", ".join(f"--{name.replace('_', '-')}" for name in names)

    relay = bool(given(*_OF_A_RELAY))
    others = given(*_OF_AN_AUTHORITY, *_OPTIONS_OF_AN_AUTHORITY) if relay else given(*_OPTIONS_OF_A_RELAY)
    if others and relay:
        args.parser.error(f"not with --upstream, where a Trustee KBS decides and has the keys: {options(others)}")
    if others:
        args.parser.error(f"only with --upstream: {options(others)}")
    required = _REQUIRED + (_OF_A_RELAY if relay else _OF_AN_AUTHORITY)
    if missing := [name for name in required if getattr(args, name) is None]:
        args.parser.error(f"the following arguments are required: {options(missing)}")


async def _serve(args: argparse.Namespace) -> int:
    from agent.broker.anchors import AmdCrls, TdxCollateral, TrustAnchors, load_endorsements, load_simulation_roots
    from agent.broker.authority import Authority
    from agent.broker.desk import AuthorityDesk
    from agent.broker.keystore import DirectoryKeyStore
    from agent.broker.service import BrokerServer
    from agent.broker.token import TokenKey

    anchors = TrustAnchors(
        load_simulation_roots(Path(args.unsafe_simulation_roots)) if args.unsafe_simulation_roots is not None else (),
        load_endorsements(Path(args.endorsements)) if args.endorsements is not None else (),
        TdxCollateral(_folder(args.tdx_collateral, "tdx-collateral")) if args.tdx_collateral is not None else None,
        AmdCrls(_folder(args.amd_crls, "amd-crls")) if args.amd_crls is not None else None,
    )
    token_key = TokenKey(_read(args.token_key, "token-key", private=True))
    policy = _load_policy(args.policy)
    tls = _load_tls(args.tls_cert, args.tls_key)
    host = _listen_host(args.listen)
    keys = DirectoryKeyStore(_folder(args.keys, "keys"))
    audit = _open_audit(args.audit)
    authority = Authority(policy, anchors, token_key, keys, audit, now=lambda: datetime.now(UTC))
    server = BrokerServer(AuthorityDesk(authority), _report)
    port = await server.start(args.listen, tls)

    stop = _obey_signals(lambda: _reload(authority, audit, args.policy))
    listening = {"event": "listening", "address": f"{host}:{port}", "simulation": bool(anchors.simulation_roots)}
    print(json.dumps(listening), flush=True)
    _say_policy("policy_loaded", policy)
    await stop.wait()
    await server.drain()
    audit.close()
    return 0


async def _serve_relay(args: argparse.Namespace) -> int:
    from agent.broker.relay import Relay
    from agent.broker.service import BrokerServer

    upstream = _load_upstream(args.upstream, args.upstream_ca, args.upstream_server_name)
    tls = _load_tls(args.tls_cert, args.tls_key)
    host = _listen_host(args.listen)
    audit = _open_audit(args.audit)
    relay = Relay(upstream, audit, now=lambda: datetime.now(UTC), report=_report)
    server = BrokerServer(relay, _report)
    port = await server.start(args.listen, tls)
    stop = _obey_signals(lambda: _reopen(audit))
    looking = asyncio.create_task(_look(relay, server))
    print(json.dumps({"event": "listening", "address": f"{host}:{port}", "upstream": upstream.url}), flush=True)
    await stop.wait()
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await looking
    await server.drain()
    audit.close()
    return 0


async def _look(relay: "Relay", server: "BrokerServer") -> None:
    """Keeps the health service true, and says so when the upstream comes or goes."""
    seen: bool | None = None
    while True:
        reachable = await relay.reachable()
        if reachable is not seen:
            await server.set_serving(reachable)
            print(json.dumps({"event": "upstream", "reachable": reachable}), file=sys.stderr, flush=True)
        seen = reachable
        await asyncio.sleep(LOOK_EVERY_S)


def _obey_signals(on_hangup: Callable[[], None]) -> asyncio.Event:
    """From now on: a hang-up is the caller's, and whatever asks to stop sets the event."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    return stop


def _reload(authority: "Authority", audit: "AuditLog", path: str) -> None:
    """The new policy as a whole, or the old one."""
    _reopen(audit)  # first: whatever is wrong with the policy, decisions go into the file that the operator looks at
    try:
        authority.policy = _load_policy(path)
        _say_policy("policy_loaded", authority.policy)
    except ConfigError as error:
        _report(error)
        _say_policy("policy_kept", authority.policy)


def _reopen(audit: "AuditLog") -> None:
    try:
        audit.reopen()
    except OSError:
        _report(ConfigError(ConfigProblem.NOT_FOUND, Ident("audit")))


def _open_audit(path: str) -> "AuditLog":
    from agent.broker.audit import AuditLog

    try:
        return AuditLog(Path(path))
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND, Ident("audit")) from error


def _listen_host(text: str) -> str:
    listen = _LISTEN.fullmatch(text)
    if listen is None:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("listen"))
    return listen[1]


def _load_upstream(url: str, ca: str, server_name: str | None) -> "Upstream":
    from agent.broker.relay import Upstream

    # refusal: test_an_upstream_without_tls_or_with_a_path_is_refused
    if not _UPSTREAM.fullmatch(url):
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("upstream"))
    try:
        address = urlsplit(url)
        _ = address.port  # each raises for one that is none
    except ValueError as error:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("upstream")) from error
    try:
        ca_pem = _read(ca, "upstream-ca").decode("ascii")
        http_policy.tls_context(ca_pem)  # names the mistake before there is a connection
    except (ValueError, ArtifactUnavailableError) as error:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("upstream-ca")) from error
    assert address.hostname is not None, "the pattern has one"
    return Upstream(url.rstrip("/"), ca_pem, server_name or address.hostname)


def _load_policy(path: str) -> "PolicyTable":
    from agent.broker.policy import parse_policy

    return parse_policy(_read(path, "policy"))


def _load_tls(certificate: str, key: str) -> "Tls":
    from agent.broker.service import Tls

    tls = Tls(_read(certificate, "tls-cert"), _read(key, "tls-key", private=True))
    try:
        # gRPC takes any pair and fails every connection; this names the mistake before there are any.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("tls-cert")) from error
    return tls


def _folder(path: str, key: str) -> Path:
    if not Path(path).is_dir():
        raise ConfigError(ConfigProblem.NOT_FOUND, Ident(key))
    return Path(path)


def _read(path: str, key: str, *, private: bool = False) -> bytes:
    try:
        with Path(path).open("rb") as stream:
            status = os.fstat(stream.fileno())
            # refusal: test_a_private_key_that_others_can_read_is_refused test_a_private_key_of_another_user_is_refused
            if private and (status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid())):
                raise ConfigError(ConfigProblem.BAD_VALUE, Ident(key))
            return stream.read(MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND, Ident(key)) from error


def _say_policy(event: str, policy: "PolicyTable") -> None:
    print(json.dumps({"event": event, "policy_version": policy.version, "rows": len(policy.rows)}), file=sys.stderr, flush=True)


def _report(error: AgentError) -> None:
    print(json.dumps(message_to_record(error)), file=sys.stderr, flush=True)


def _init(directory: Path, server_name: str) -> int:
    from agent.broker.bootstrap import create

    made = create(directory, server_name, datetime.now(UTC))
    files = " ".join(
        f"--{flag} {made.directory / name}"
        for flag, name in {
            "tls-cert": "tls.pem",
            "tls-key": "tls.key",
            "policy": "policy.toml",
            "keys": "keys",
            "token-key": "token.key",
            "audit": "audit.jsonl",
        }.items()
    )
    print(
        f"# Start it:\n#   keyturn broker --listen 0.0.0.0:8443 {files}\n"
        f"# Keep {made.directory / 'ca.key'} offline: it is needed again when the certificate ends in a year.\n"
        "# For the guest's configuration:\n"
        f'[broker]\nserver_name = "{made.server_name}"\n'
        f'ca_pem = """\n{made.ca_pem}"""\ntoken_keys = ["""\n{made.token_key_pem}"""]'
    )
    return 0

"""`keyturn broker` and `keyturn broker init`: the reference key broker."""

import argparse
import asyncio
import json
import os
import re
import signal
import ssl
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.closed import Ident
from agent.errors import AgentError, ConfigError, ConfigProblem
from agent.events import message_to_record

if TYPE_CHECKING:
    from agent.broker.audit import AuditLog
    from agent.broker.authority import Authority
    from agent.broker.policy import PolicyTable
    from agent.broker.service import Tls

MAX_FILE_BYTES = (1 << 20) + 1  # the policy parser refuses more than 1 MiB
_REQUIRED = ("listen", "tls_cert", "tls_key", "policy", "keys", "token_key", "audit")
_LISTEN = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")


def add_parser(verbs: Any, summary: str) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "broker",
        help=summary,
        description=f"{summary}. SIGHUP reads the policy again and reopens the audit log; SIGTERM drains.",
        allow_abbrev=False,
    )
    parser.add_argument("--listen", metavar="HOST:PORT", help="port 0 for any free one; the bound address is printed")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate chain, PEM, leaf first")
    parser.add_argument("--tls-key", metavar="FILE", help="its private key, PEM, mode 0600")
    parser.add_argument("--policy", metavar="FILE", help="policy, TOML")
    parser.add_argument("--keys", metavar="DIR", help="model keys: <repository>/<type>/<tag>, 32 bytes each, mode 0600")
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
    parser.set_defaults(parser=parser)
    actions = parser.add_subparsers(dest="action", metavar="init")
    init = actions.add_parser("init", help="make keys, certificates and an example policy", allow_abbrev=False)
    init.add_argument("directory", metavar="DIR", help="a folder that is empty or not there yet")
    init.add_argument("--server-name", default="localhost", metavar="NAME", help="DNS name or IPv4 address, default localhost")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 after a drain."""
    if args.action == "init":
        return _init(Path(args.directory), args.server_name)
    missing = [f"--{name.replace('_', '-')}" for name in _REQUIRED if getattr(args, name) is None]
    if missing:
        args.parser.error(f"the following arguments are required: {', '.join(missing)}")
    os.environ["GRPC_VERBOSITY"] = "NONE"  # gRPC's core would write what peers send to stderr
    # `cryptography` warns about oddities of the certificates that guests send: stderr is JSON lines, and not theirs to write.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"agent\.verify\.")
    return asyncio.run(_serve(args))


async def _serve(args: argparse.Namespace) -> int:
    from agent.broker.anchors import AmdCrls, TdxCollateral, TrustAnchors, load_endorsements, load_simulation_roots
    from agent.broker.audit import AuditLog
    from agent.broker.authority import Authority
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
    listen = _LISTEN.fullmatch(args.listen)
    if listen is None:
        raise ConfigError(ConfigProblem.BAD_VALUE, Ident("listen"))
    keys = DirectoryKeyStore(_folder(args.keys, "keys"))
    try:
        audit = AuditLog(Path(args.audit))
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND, Ident("audit")) from error
    authority = Authority(policy, anchors, token_key, keys, audit, now=lambda: datetime.now(UTC))
    server = BrokerServer(authority, _report)
    port = await server.start(args.listen, tls)

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: _reload(authority, audit, args.policy))
    listening = {"event": "listening", "address": f"{listen[1]}:{port}", "simulation": bool(anchors.simulation_roots)}
    print(json.dumps(listening), flush=True)
    _say_policy("policy_loaded", policy)
    await stop.wait()
    await server.drain()
    audit.close()
    return 0


def _reload(authority: "Authority", audit: "AuditLog", path: str) -> None:
    """The new policy as a whole, or the old one."""
    try:
        audit.reopen()  # first: whatever is wrong with the policy, decisions go into the file that the operator looks at
    except OSError:
        _report(ConfigError(ConfigProblem.NOT_FOUND, Ident("audit")))
    try:
        authority.policy = _load_policy(path)
        _say_policy("policy_loaded", authority.policy)
    except ConfigError as error:
        _report(error)
        _say_policy("policy_kept", authority.policy)


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

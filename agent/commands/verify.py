"""`keyturn verify`: evidence and receipts from files, checked offline by the broker's own verifiers, and what it says.

Owns files and output. What makes evidence genuine is `agent/verify`'s; whether what it says is good enough is for a policy, or
for whoever reads the output. Fetches nothing. The vendors' pinned roots are the only ones, unless simulated ones are named.
Most of this file is help and the names of claims.
"""

import argparse
import enum
import hashlib
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from agent.closed import Ident
from agent.commands.evidence import nonce_argument
from agent.errors import (
    ConfigError,
    ConfigProblem,
    EvidenceCheck,
    EvidenceFormat,
    EvidenceVerificationError,
    MalformedEvidenceError,
    SimulationRefusal,
    SimulationRefusedError,
)
from agent.evidence import SWITCH_ARCH, Evidence, GpuEvidence, GpuNonce, Tee
from agent.evidence.ccel import MAX_LOG_BYTES, SHA384, parse_event_log, parse_runtime_event, replay
from agent.evidence.cpu import certificate_chain, der_certificates
from agent.evidence.gpu_abi import MAX_CHAIN_BYTES, MAX_REPORT_BYTES
from agent.evidence.gpu_abi import parse_report as parse_gpu_report
from agent.evidence.snp_abi import (
    MAX_CERTIFICATE_TABLE_BYTES,
    PARSED_VERSIONS,
    REPORT_BYTES,
    GuestPolicy,
    SigningKey,
    SnpReport,
    TcbVersion,
    product_of,
)
from agent.evidence.snp_abi import parse_report as parse_snp_report
from agent.evidence.tdx_abi import (
    MAX_QUOTE_BYTES,
    TDREPORT_BYTES,
    TEE_TYPE_TDX,
    TdAttributes,
    TdBody,
    parse_tdreport,
    quote_length,
)
from agent.receipt import Statement, parse_receipt
from agent.report import MAX_RECEIPT_BYTES
from agent.verify.crl import MAX_CRL_BYTES, RevocationList, parse_crl
from agent.verify.nvidia import GPU_ARCHS, FspClaims, GpuClaims, SwitchClaims, verify_fsp, verify_gpu, verify_switch
from agent.verify.receipt import ReceiptClaims, verify_receipt
from agent.verify.snp import ACCEPTED_VERSIONS, SnpClaims, load_certificate, verify_snp
from agent.verify.tdx import TcbStatus, TdxClaims, check_event_log, verify_tdx
from agent.verify.tdx_collateral import MAX_COLLATERAL_BYTES, evaluate_tcb

EXIT_NOT_VERIFIED = 1
_MAX_UNIX = 253402300799  # the last second of the year 9999
_Roots = Sequence[x509.Certificate]


@dataclass(frozen=True, slots=True)
class _Finding:
    """What is genuine, and what it says.

    Attributes:
        headline: for people.
        record: every claim, by the names of the specification.
        shown: the claims that people are shown.
        missing: why this is less than verified; None when it is.
    """

    headline: str
    record: dict[str, object]
    shown: tuple[str, ...]
    missing: str | None = None


def add_parser(verbs: Any, summary: str) -> None:
    parser = verbs.add_parser(
        "verify",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Nothing is fetched, and no roots are trusted but the ones of AMD, "
        "Intel and NVIDIA in this program. Claims are printed only when they are genuine; whether they are good enough is "
        "yours to say.",
        epilog="Exit status: 0 verified; 1 genuine, but not all was verified, and stderr says what is missing; 12 not genuine, "
        "or malformed; 24 a receipt that is none. Example: keyturn verify snp report.bin --endorsement auxblob.bin --json",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="snp|tdx|nvidia|event-log|receipt")
    snp = kinds.add_parser(
        "snp",
        help="an SEV-SNP attestation report",
        description="Verify an SEV-SNP attestation report, version 2 to 5: a genuine AMD chip signed it, at the TCB it "
        "reports. A broker takes none of version 2, which does not name the processor. Revocation is checked with --crl.",
        epilog="The chain is VCEK (or VLEK), ASK (or ASVK) and ARK. Where the host has none for you AMD has: on a terminal, "
        "and without --endorsement, you are told where. Example: keyturn verify snp report.bin --endorsement vcek.der "
        "--endorsement cert_chain.pem",
        allow_abbrev=False,
    )
    snp.add_argument("file", metavar="REPORT", help="1184 bytes, - for standard input")
    _add_snp_options(snp)
    snp.set_defaults(examine=_snp)

    tdx = kinds.add_parser(
        "tdx",
        help="a TDX quote",
        description="Verify a TDX quote, version 4 or 5: Intel's Quoting Enclave made it, on a platform that Intel certified, "
        "for a TD that nobody debugs; and with collateral, what Intel says of the platform's TCB. A TCB that is revoked, or "
        "that Intel does not know, is a failure; OutOfDate and the other words are claims, printed as `tcb`.",
        epilog="Example: keyturn verify tdx quote.bin --collateral collateral.json --json",
        allow_abbrev=False,
    )
    tdx.add_argument("file", metavar="QUOTE", help="at most 128 KiB, zeros may follow the quote; - for standard input")
    tdx.add_argument("--ignore-trailing", action="store_true", help="anything may follow the quote; it is not looked at")
    _add_collateral(tdx)
    tdx.set_defaults(examine=_tdx)

    nvidia = kinds.add_parser(
        "nvidia",
        help="the attestation report of an NVIDIA GPU or NVSwitch",
        description="Verify the attestation report of an NVIDIA GPU, Hopper, Blackwell or Rubin, of such a GPU's security "
        "processor, or of an NVSwitch, LS10: a genuine device signed it, with the firmware that its key was made for. "
        "Measurements are printed and not compared with NVIDIA's. Revocation is not checked.",
        epilog="Without --nonce the report may be an old one. Example: keyturn verify nvidia gpu.bin --chain chain.pem --nonce "
        "931d8dd0add203ac3d8b4fbde75e115278eefcdceac5b87671a748f32364dfcb",
        allow_abbrev=False,
    )
    nvidia.add_argument("file", metavar="REPORT", help="SPDM request and response, binary; - for standard input")
    nvidia.add_argument("--chain", metavar="PEM", required=True, help="the device's five certificates, leaf first")
    nvidia.add_argument("--nonce", metavar="HEX", type=nonce_argument, help="the 32 bytes that the device was asked to sign")
    nvidia.set_defaults(examine=_nvidia)

    log = kinds.add_parser(
        "event-log",
        help="the event log of a TD",
        description="Replay the event log of a TD (ACPI table CCEL, with what CoCo appends), and compare the registers with "
        "those of a quote, verified as by `verify tdx --no-collateral`, or of a TDREPORT, which only its own processor could "
        "verify: take it yourself, inside the TD. Digests are what is verified: the data beside them is anybody's, but for "
        "events of the running system (runtime_event in --json), whose digest is over their text.",
        epilog="Example: keyturn verify event-log /sys/firmware/acpi/tables/data/CCEL --against quote.bin",
        allow_abbrev=False,
    )
    log.add_argument("file", metavar="CCEL", help="at most 4 MiB, - for standard input")
    log.add_argument("--against", metavar="FILE", help="quote or TDREPORT; without it the replayed registers are all there is")
    log.set_defaults(examine=_event_log)

    receipt = kinds.add_parser(
        "receipt",
        help="the receipt of a boot: which model was opened in which guest, under which policy",
        description="Verify the receipt of a boot: its key signed it, and evidence of a genuine guest covers that key and what "
        "was known when the model key was released. Any guest can make a receipt: whether this one is a guest that you know is "
        "for you to see, by its measurement. The rest is that guest's own word: stages and times. What GPUs said was "
        "for the authority to judge, which has a record under the same request id.",
        epilog="Where an agent has it: /receipt of its health port, receipt.cbor beside its status file, or beside the model "
        "that `keyturn load` left. Example: keyturn verify receipt receipt.cbor --no-collateral --json",
        allow_abbrev=False,
    )
    receipt.add_argument("file", metavar="RECEIPT", help="COSE_Sign1, at most 512 KiB; - for standard input")
    receipt.set_defaults(examine=_receipt)
    _add_snp_options(receipt)
    _add_collateral(receipt)

    for kind in (snp, tdx, nvidia, log, receipt):
        kind.add_argument(
            "--at", metavar="UNIX", type=_moment, help="the second at which certificates must be valid, default: now"
        )
        kind.add_argument("--json", action="store_true", help="print one JSON object, with the specification's names")
        kind.add_argument(
            "--unsafe-simulation-roots",
            metavar="DIR",
            help="trust the roots of simulated silicon in DIR too; such claims say simulated",
        )
        kind.set_defaults(usage_error=kind.error)


def _add_snp_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--endorsement",
        metavar="CERT",
        action="append",
        default=[],
        help="certificates: DER, PEM, or a host's table of them (configfs auxblob); may be given several times",
    )
    parser.add_argument(
        "--crl",
        metavar="FILE",
        action="append",
        help="AMD's revocation list, DER or PEM: its own, current, and without this chain; may be given several times",
    )


def _add_collateral(parser: argparse.ArgumentParser) -> None:
    collateral = parser.add_mutually_exclusive_group()
    collateral.add_argument(
        "--collateral",
        metavar="FILE",
        help="Intel's TCB information, QE identity and revocation lists for this platform, JSON as dcap-qvl has them",
    )
    collateral.add_argument(
        "--no-collateral",
        action="store_true",
        help="be content with a genuine quote: TCB and revocation are not looked at, and `tcb` says not_evaluated",
    )


def run(args: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")  # `cryptography` warns about oddities of certificates: stderr is not for it to write
    words = [word for value in vars(args).values() for word in (value if isinstance(value, list) else [value])]
    if words.count("-") > 1:
        args.usage_error("only one file can be standard input")
    finding: _Finding = args.examine(args, _simulation_roots(args.unsafe_simulation_roots), args.at or datetime.now(UTC))
    if args.json:
        print(json.dumps(finding.record))
    else:
        print(finding.headline)
        evidence = finding.record.get("evidence")  # of a receipt
        claims = {**(evidence if isinstance(evidence, dict) else {}), **finding.record}
        for name in finding.shown:
            print(f"  {name:<15} {_text(claims[name])}")
    if finding.missing is None:
        return 0
    print(f"keyturn: not verified: {finding.missing}", file=sys.stderr)
    return EXIT_NOT_VERIFIED


# --- SEV-SNP ----------------------------------------------------------------------------------------------------------


def _snp(args: argparse.Namespace, roots: _Roots, now: datetime) -> _Finding:
    evidence = Evidence(Tee.SNP, _read(args.file, REPORT_BYTES, "report"))
    claims = verify_snp(evidence, roots, _all_endorsements(args, evidence), now, _lists(args), PARSED_VERSIONS)
    report = claims.report
    return _Finding(
        f"verified: SEV-SNP report of {_silicon(claims.simulated)} {claims.product.value} chip, signed by its "
        f"{report.signing_key.name}{'; its host may read and write the guest' if report.policy.debug else ''}",
        _snp_record(claims),
        ("version", "chip_id", "measurement", "host_data", "report_data", "policy", "vmpl", "guest_svn", "reported_tcb"),
    )


def _all_endorsements(args: argparse.Namespace, evidence: Evidence) -> list[x509.Certificate]:
    """Those that were given, with a hint where more are wanted."""
    endorsements = [certificate for file in args.endorsement for certificate in _endorsements(file)]
    missing = not endorsements and not evidence.cert_chain and sys.stderr.isatty()
    if missing and (urls := kds_urls(parse_snp_report(evidence.report))):
        print(f"keyturn: hint: AMD's certificates for the chip that this report names: {' and '.join(urls)}", file=sys.stderr)
    return endorsements


def _lists(args: argparse.Namespace) -> list[RevocationList] | None:
    return None if args.crl is None else [parse_crl(_read(file, MAX_CRL_BYTES, "crl")) for file in args.crl]


def _snp_record(claims: SnpClaims) -> dict[str, object]:
    report = claims.report
    return {
        "tee": "snp",
        "product": claims.product.value,
        "simulated": claims.simulated,
        "revocation_checked": claims.revocation_checked,
        "version": report.version,
        "guest_svn": report.guest_svn,
        "policy": _policy(report.policy),
        "family_id": report.family_id.hex(),
        "image_id": report.image_id.hex(),
        "vmpl": report.vmpl,
        "signature_algo": report.signature_algorithm,
        "current_tcb": _tcb(report.current_tcb),
        "platform_info": hex(report.platform_info),
        "signing_key": report.signing_key.name,
        "mask_chip_key": report.mask_chip_key,
        "author_key_en": report.author_key_enabled,
        "report_data": report.report_data.hex(),
        "measurement": report.measurement.hex(),
        "host_data": report.host_data.hex(),
        "id_key_digest": report.id_key_digest.hex(),
        "author_key_digest": report.author_key_digest.hex(),
        "report_id": report.report_id.hex(),
        "report_id_ma": report.report_id_ma.hex(),
        "reported_tcb": _tcb(report.reported_tcb),
        "cpuid_fam_id": report.cpuid_family,
        "cpuid_mod_id": report.cpuid_model,
        "cpuid_step": report.cpuid_stepping,
        "chip_id": report.chip_id.hex(),
        "committed_tcb": _tcb(report.committed_tcb),
        "current_build": report.current_firmware.build,
        "current_minor": report.current_firmware.minor,
        "current_major": report.current_firmware.major,
        "committed_build": report.committed_firmware.build,
        "committed_minor": report.committed_firmware.minor,
        "committed_major": report.committed_firmware.major,
        "launch_tcb": _tcb(report.launch_tcb),
        "launch_mit_vector": _hex_or_none(report.launch_mitigations),
        "current_mit_vector": _hex_or_none(report.current_mitigations),
    }


def _endorsements(file: str) -> list[x509.Certificate]:
    data = _read(file, MAX_CERTIFICATE_TABLE_BYTES, "endorsement")
    if len(data) > MAX_CERTIFICATE_TABLE_BYTES:
        raise MalformedEvidenceError(EvidenceFormat.SNP_CHAIN, Ident("length"), len(data), MAX_CERTIFICATE_TABLE_BYTES)
    # A table begins with a GUID, a certificate with its DER tag and a length in two bytes.
    ders = der_certificates(data) if data.startswith((b"-----", b"\x30\x82")) else certificate_chain(data)
    return [load_certificate(der) for der in ders]


def kds_urls(report: SnpReport) -> tuple[str, ...]:
    """Where AMD has the VCEK, and its issuers. A VLEK is for the cloud provider to hand out.

    Spec: AMD 57230 "VCEK Certificate and KDS Interface", 4.
    """
    if report.version not in ACCEPTED_VERSIONS or report.signing_key is not SigningKey.VCEK:
        return ()
    base, tcb = f"https://kdsintf.amd.com/vcek/v1/{product_of(report).value}", report.reported_tcb
    chip_id, fmc = (report.chip_id, "") if tcb.fmc is None else (report.chip_id[:8], f"fmcSPL={tcb.fmc:02}&")
    levels = f"{fmc}blSPL={tcb.bootloader:02}&teeSPL={tcb.tee:02}&snpSPL={tcb.snp:02}&ucodeSPL={tcb.microcode:02}"
    return f"{base}/{chip_id.hex()}?{levels}", f"{base}/cert_chain"


def _policy(policy: GuestPolicy) -> dict[str, object]:
    return {
        "value": hex(policy),
        "abi_minor": policy.abi_minor,
        "abi_major": policy.abi_major,
        "smt": policy.smt,
        "migrate_ma": policy.migrate_ma,
        "debug": policy.debug,
        "single_socket": policy.single_socket,
    }


def _tcb(tcb: TcbVersion) -> dict[str, int]:
    fmc = {} if tcb.fmc is None else {"fmc": tcb.fmc}
    return {**fmc, "boot_loader": tcb.bootloader, "tee": tcb.tee, "snp": tcb.snp, "microcode": tcb.microcode}


# --- TDX --------------------------------------------------------------------------------------------------------------


def _tdx(args: argparse.Namespace, roots: _Roots, now: datetime) -> _Finding:
    quote = _read(args.file, MAX_QUOTE_BYTES, "quote")
    if args.ignore_trailing:
        quote = quote[: quote_length(quote)]
    evidence = Evidence(Tee.TDX, quote)
    claims, missing = _evaluated(args, verify_tdx(evidence, roots, now), evidence, now)
    evaluated = claims.tcb_status is not TcbStatus.NOT_EVALUATED  # a revoked one has been refused
    return _Finding(
        f"{'verified' if evaluated else 'TCB not evaluated'}: TDX quote of {_silicon(claims.simulated)} platform",
        _tdx_record(claims),
        ("version", "tcb", "advisory_ids", "fmspc", *_SHOWN_OF_TD),
        missing,
    )


def _evaluated(args: argparse.Namespace, claims: TdxClaims, evidence: Evidence, now: datetime) -> tuple[TdxClaims, str | None]:
    """With what Intel says of the platform's TCB; or what is missing for that."""
    collateral = None if args.collateral is None else _read(args.collateral, MAX_COLLATERAL_BYTES, "collateral")
    claims = evaluate_tcb(claims, evidence, collateral, now)
    if claims.tcb_status is not TcbStatus.NOT_EVALUATED or args.no_collateral:
        return claims, None
    if collateral is None:
        return claims, "TCB and revocation need --collateral; --no-collateral does without"
    return claims, "evaluating the TCB needs dcap-qvl, an extra of this package (keyturn[tdx])"


def _tdx_record(claims: TdxClaims) -> dict[str, object]:
    return {
        "tee": "tdx",
        "simulated": claims.simulated,
        "tcb": claims.tcb_status.value,
        "advisory_ids": list(claims.advisory_ids),
        "version": claims.quote_version,
        **_body(claims.td),
        "qe_isv_svn": claims.qe_isv_svn,
        "fmspc": claims.platform.fmspc.hex(),
        "pce_id": claims.platform.pce_id.hex(),
        "pce_svn": claims.platform.pce_svn,
        "cpu_svn": claims.platform.cpu_svn.hex(),
        "ppid_hash": claims.ppid_hash,
    }


_SHOWN_OF_TD = ("mr_td", "mr_config_id", "rtmr_0", "rtmr_1", "rtmr_2", "rtmr_3", "report_data", "td_attributes", "tee_tcb_svn")


def _body(td: TdBody) -> dict[str, object]:
    said = {field.name: getattr(td, field.name) for field in fields(TdBody) if field.name != "extension"}
    if td.extension is not None:
        said |= asdict(td.extension)
    record: dict[str, object] = {
        name: value.hex() if isinstance(value, bytes) else _hex_or_none(value) for name, value in said.items()
    }
    return record | {"td_attributes": _attributes(td.td_attributes)}


def _attributes(attributes: TdAttributes) -> dict[str, object]:
    return {
        "value": hex(attributes),
        "debug": attributes.debug,
        "servtd_ext": attributes.service_td_extensions,
        "sept_ve_disable": attributes.sept_ve_disable,
        "migratable": attributes.migratable,
        "pks": attributes.pks,
        "kl": attributes.key_locker,
        "perfmon": attributes.perfmon,
    }


# --- NVIDIA -----------------------------------------------------------------------------------------------------------


def _nvidia(args: argparse.Namespace, roots: _Roots, now: datetime) -> _Finding:
    report_bytes = _read(args.file, MAX_REPORT_BYTES, "report")
    chain = _read(args.chain, MAX_CHAIN_BYTES, "chain")
    report = parse_gpu_report(report_bytes)
    nonce = GpuNonce(args.nonce) if args.nonce else report.requester_nonce
    claims = _verify_nvidia(report_bytes, chain, nonce, roots, now)
    match claims:
        case GpuClaims():
            device = f"{claims.arch} GPU"
            said: dict[str, object] = {
                "arch": claims.arch,
                "driver_version": claims.driver_version,
                "fwid": None if report.fwid is None else report.fwid.hex(),
                "feature_flag": claims.feature_flag,
            }
        case FspClaims():
            device = f"{claims.arch} GPU's security processor (FSP), which says nothing of driver or confidential mode"
            said = {"arch": claims.arch, "fwid": claims.fwid.hex()}
        case SwitchClaims():
            device = f"{SWITCH_ARCH} NVSwitch"
            said = {"arch": SWITCH_ARCH, "pdi": claims.pdi.hex(), "gpu_pdis": [pdi.hex() for pdi in claims.gpu_pdis]}
    record = said | {
        "simulated": claims.simulated,
        "hwmodel": claims.hwmodel,
        "ueid": claims.ueid,
        "leaf_key_sha256": claims.leaf_key_sha256,
        "vbios_version": report.vbios_version,
        "project": report.project,
        "project_sku": report.project_sku,
        "chip_sku": report.chip_sku,
        "nonce": report.requester_nonce.hex(),
        "nonce_compared": args.nonce is not None,
        "measurements": [block.value.hex() for block in report.measurements],
        "measurement_indices": [block.index for block in report.measurements],
        "measurement_types": [block.kind for block in report.measurements],
    }
    return _Finding(
        f"verified: report of {_silicon(claims.simulated)} {device}{'' if args.nonce else ', of unknown age'}",
        record,
        ("hwmodel", "ueid", "vbios_version", *(name for name in said if name not in ("arch", "gpu_pdis")), "nonce"),
    )


def _verify_nvidia(
    report: bytes, chain: bytes, nonce: GpuNonce, roots: _Roots, now: datetime
) -> GpuClaims | FspClaims | SwitchClaims:
    """The certificates decide what the device is: what the Evidence of a guest claims beside them is not here."""
    for arch in GPU_ARCHS:
        for verify in (verify_gpu, verify_fsp):
            try:
                return verify(GpuEvidence(arch, "", report, chain), nonce, roots, now)
            except EvidenceVerificationError as error:
                if error.check is not EvidenceCheck.CERTIFICATE_CHIP_ID:
                    raise
    return verify_switch(GpuEvidence(SWITCH_ARCH, "", report, chain), nonce, roots, now)


# --- event log --------------------------------------------------------------------------------------------------------


def _event_log(args: argparse.Namespace, roots: _Roots, now: datetime) -> _Finding:
    log = parse_event_log(_read(args.file, MAX_LOG_BYTES, "event-log"))
    registers = replay(log)
    record: dict[str, object] = {
        "against": None,
        **{f"rtmr_{number}": register.hex() for number, register in enumerate(registers)},
        "events": [
            {
                "mr_index": event.mr_index,
                "event_type": event.event_type,
                "digest": dict(event.digests).get(SHA384, b"").hex(),
                "runtime_event": asdict(said) if (said := parse_runtime_event(event)) else None,
            }
            for event in log.events
        ],
    }
    headline = "replayed: event log"
    if args.against is not None:
        data = _read(args.against, MAX_QUOTE_BYTES, "against")
        if len(data) == TDREPORT_BYTES and data[0] == TEE_TYPE_TDX:
            td, record["against"] = parse_tdreport(data).body, "tdreport"
            headline = "verified: event log of this TDREPORT, whose origin cannot be verified"
        else:
            claims = verify_tdx(Evidence(Tee.TDX, data), roots, now)
            td = claims.td
            record |= {"against": "quote", "simulated": claims.simulated, "tcb": claims.tcb_status.value}
            headline = f"verified: event log of this quote of {_silicon(claims.simulated)} platform, TCB not evaluated"
        check_event_log(log, td)
    return _Finding(
        f"{headline}; {len(log.events)} events",
        record,
        tuple(f"rtmr_{number}" for number in range(len(registers))),
        "whose registers these are says only --against" if args.against is None else None,
    )


# --- receipt ----------------------------------------------------------------------------------------------------------


def _receipt(args: argparse.Namespace, roots: _Roots, now: datetime) -> _Finding:
    receipt = parse_receipt(_read(args.file, MAX_RECEIPT_BYTES, "receipt"))
    statement, evidence = receipt.statement, receipt.evidence
    endorsements = _all_endorsements(args, evidence) if evidence.tee is Tee.SNP else []
    verified = verify_receipt(receipt, roots, endorsements, now, _lists(args))
    missing, silicon = None, "sample evidence, which proves nothing"
    match verified.evidence:
        case SnpClaims() as claims:
            said, silicon = _snp_record(claims), f"a guest on {_silicon(claims.simulated)} {claims.product.value} chip"
        case TdxClaims() as claims:
            claims, missing = _evaluated(args, claims, evidence, now)
            said, silicon = _tdx_record(claims), f"a TD on {_silicon(claims.simulated)} platform"
        case None:
            said = {"tee": evidence.tee.value}
    missing = lacking(verified, simulation_trusted=bool(roots)) or missing
    plain = {field.name: getattr(statement, field.name) for field in fields(Statement)}
    record: dict[str, object] = {
        **{name: _json(value) for name, value in plain.items()},
        "simulated": verified.simulated,
        "statement_digest": statement.digest().hex(),
        "receipt_key_sha256": hashlib.sha256(receipt.key).hexdigest(),
        "made_at": datetime.fromtimestamp(receipt.made_at, UTC).isoformat() if receipt.made_at <= _MAX_UNIX else None,
        "rtmr_3": _json(receipt.rtmr_3),
        "unmeasured": _json(receipt.unmeasured),
        "logged": verified.logged,
        "stages_ms": {stage.value: ms for stage, ms in receipt.stages},
        "evidence": said,
    }
    model = f"model {statement.model_name} version {statement.model_version}"
    return _Finding(
        f"{'verified' if missing is None else 'not all verified'}: {model} was opened in {silicon}, under policy version "
        f"{statement.policy_version}",
        record,
        (*_SHOWN_OF_RECEIPT, *(name for name in _SHOWN_OF_ITS_EVIDENCE if name in said)),
        missing,
    )


_SHOWN_OF_RECEIPT = (
    *("manifest_digest", "key_uri", "key_id", "policy_version", "request_id", "mode", "not_held", "simulated", "gpus"),
    *("gpu_ready", "config_digest", "server_command_digest", "logged", "unmeasured", "made_at"),
)
_SHOWN_OF_ITS_EVIDENCE = (
    *("measurement", "policy", "vmpl", "guest_svn", "reported_tcb"),
    *("mr_td", "rtmr_0", "rtmr_1", "rtmr_2", "td_attributes", "tcb", "advisory_ids", "tee_tcb_svn"),
)


def lacking(verified: ReceiptClaims, *, simulation_trusted: bool) -> str | None:
    """Why a receipt of genuine evidence proves less than it seems to; None: it does not."""
    claims = verified.evidence
    if claims is None:
        return "sample evidence proves nothing"
    # refusal: test_a_receipt_of_a_guest_that_its_host_may_debug_is_not_verified
    if isinstance(claims, SnpClaims) and claims.report.policy.debug:  # a TD under debug has no claims
        return "its host may read and write the guest, and can have made this receipt"
    # refusal: test_genuine_evidence_does_not_make_up_for_simulated_devices
    if verified.simulated and not simulation_trusted:
        return "its guest says that not all of its silicon was genuine"
    return None


def _json(value: object) -> object:
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value.hex() if isinstance(value, bytes) else value


# --- files and output -------------------------------------------------------------------------------------------------


def _read(file: str, max_bytes: int, name: str) -> bytes:
    """At most one byte more than `max_bytes`, which then no parser takes."""
    try:
        if file == "-":
            return sys.stdin.buffer.read(max_bytes + 1)
        with Path(file).open("rb") as stream:
            return stream.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND, Ident(name)) from error


def _simulation_roots(directory: str | None) -> _Roots:
    if directory is None:
        return ()
    try:
        from agent.broker.anchors import load_simulation_roots
    except ModuleNotFoundError:  # a guest's bundle has no simulation
        raise SimulationRefusedError(SimulationRefusal.NOT_INSTALLED) from None
    return load_simulation_roots(Path(directory))


def _moment(text: str) -> datetime:
    if not (text.isascii() and text.isdigit()) or int(text) > _MAX_UNIX:
        raise argparse.ArgumentTypeError("seconds since 1970 are wanted")
    return datetime.fromtimestamp(int(text), UTC)


def _silicon(simulated: bool) -> str:
    return "a SIMULATED" if simulated else "a genuine"


def _hex_or_none(value: int | None) -> str | None:
    """64 bits are more than a JSON number holds everywhere."""
    return None if value is None else hex(value)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(name if item is True else f"{name} {item}" for name, item in value.items() if item is not False)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)

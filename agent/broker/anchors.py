"""What the broker's Verifier trusts and knows beside the vendors' pinned roots, and how that is read from files."""

import binascii
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from agent.closed import Ident
from agent.errors import BrokerFailureError, ConfigError, ConfigProblem, MalformedEvidenceError
from agent.verify.crl import MAX_CRL_BYTES, RevocationList, parse_crl
from agent.verify.roots import SIMULATED_MARK, UNREADABLE
from agent.verify.snp import load_certificate
from agent.verify.tdx_collateral import MAX_COLLATERAL_BYTES

SIMULATION_ROOT_FILES = ("ark.pem", "sgx-root.pem", "nvidia-root.pem")
MAX_FILE_BYTES = 64 << 10
_UNAVAILABLE = 14  # gRPC status
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")


@dataclass(frozen=True, slots=True)
class TdxCollateral:
    """Intel's word on patch levels: a folder of `<FMSPC>.json`, the QuoteCollateralV3 of the platforms with that FMSPC.

    Read for every quote, because Intel renews it every month. What is in it is judged by `verify/tdx_collateral.py`.
    """

    directory: Path

    def find(self, fmspc: bytes) -> bytes | None:
        """What there is for platforms with this FMSPC, one byte too long if it is longer than any may be; None for nothing.

        Raises:
            BrokerFailureError: it is there and cannot be read.
        """
        try:
            with (self.directory / f"{fmspc.hex()}.json").open("rb") as stream:
                return stream.read(MAX_COLLATERAL_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BrokerFailureError(_UNAVAILABLE, Ident("COLLATERAL_IO")) from error


@dataclass(frozen=True, slots=True)
class AmdCrls:
    """AMD's revocation lists: a folder of `.crl` files, DER or PEM, as its key distribution service gives them out.

    Read for every report, because each list has an end. No list at all is as good as none of the right root: nobody passes.
    """

    directory: Path

    def read(self) -> tuple[RevocationList, ...]:
        """Every list of the folder.

        Raises:
            BrokerFailureError: folder or file cannot be read.
            MalformedEvidenceError: a file is no list.
        """
        try:
            return tuple(parse_crl(_read_start(path)) for path in sorted(self.directory.iterdir()) if path.suffix == ".crl")
        except OSError as error:
            raise BrokerFailureError(_UNAVAILABLE, Ident("COLLATERAL_IO")) from error


def _read_start(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(MAX_CRL_BYTES + 1)


@dataclass(frozen=True, slots=True)
class TrustAnchors:
    """Attributes:
    simulation_roots: empty unless the broker was started with `--unsafe-simulation-roots`.
    endorsements: certificates of chips and their issuers, for guests whose host supplies none. They are not trusted:
        they must lead to a pinned root like any other.
    tdx_collateral: None: nobody evaluates the TCB of TDX platforms.
    amd_crls: None: nobody asks whether AMD took a chain back.
    """

    simulation_roots: tuple[x509.Certificate, ...] = ()
    endorsements: tuple[x509.Certificate, ...] = ()
    tdx_collateral: TdxCollateral | None = None
    amd_crls: AmdCrls | None = None


def load_simulation_roots(directory: Path) -> tuple[x509.Certificate, ...]:
    """The roots of simulated silicon: `ark.pem`, `sgx-root.pem` and, where there are GPUs, `nvidia-root.pem`.

    Raises:
        ConfigError: there is none, or one does not say SIMULATED: such a root would make claims that look real.
    """
    key = Ident("unsafe-simulation-roots")
    roots: list[x509.Certificate] = []
    for name in SIMULATION_ROOT_FILES:
        if (directory / name).is_file():
            roots += _load_file(directory / name, key)
    # refusal: test_a_folder_without_roots_is_refused
    if not roots:
        raise ConfigError(ConfigProblem.NOT_FOUND, key)
    for root in roots:
        try:
            names = root.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        except UNREADABLE as error:
            raise ConfigError(ConfigProblem.BAD_VALUE, key) from error
        # refusal: test_a_root_that_does_not_have_exactly_one_name_is_refused
        # refusal: test_a_private_root_that_does_not_say_simulated_is_refused
        if len(names) != 1 or SIMULATED_MARK not in str(names[0].value):
            raise ConfigError(ConfigProblem.BAD_VALUE, key)
    return tuple(roots)


def load_endorsements(directory: Path) -> tuple[x509.Certificate, ...]:
    """Every certificate in the `.pem` and `.der` files of a folder, as AMD's key distribution service gives them out.

    Raises:
        ConfigError: the folder has none, or a file is not a certificate.
    """
    key = Ident("endorsements")
    found: list[x509.Certificate] = []
    for path in sorted(directory.glob("*")):
        if path.suffix in (".pem", ".der"):
            found += _load_file(path, key)
    # refusal: test_a_folder_without_certificates_is_refused
    if not found:
        raise ConfigError(ConfigProblem.NOT_FOUND, key)
    return tuple(found)


def _load_file(path: Path, key: Ident) -> list[x509.Certificate]:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES)
        ders = [binascii.a2b_base64(match[1]) for match in _PEM.finditer(data)] if path.suffix == ".pem" else [data]
        # refusal: test_a_file_that_is_no_certificate_is_refused
        if not ders:
            raise ConfigError(ConfigProblem.BAD_VALUE, key)
        return [load_certificate(der) for der in ders]
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND, key) from error
    except (binascii.Error, MalformedEvidenceError) as error:
        raise ConfigError(ConfigProblem.BAD_VALUE, key) from error

"""The reference values that `keyturn policy` writes down: of an image, of GPUs, of one model with its configuration.

Owns the parsers of the files they come from: the JSON that `keyturn verify … --json` prints for a guest whose evidence is as
it should be, or the same names in JSON or TOML by hand. Other names are ignored, as `verify` prints more than is asked for.
Whether the values are good is the operator's judgement: a policy approves whatever was measured here.
"""

import json
import re
import tomllib
from dataclasses import dataclass

from agent.closed import Ident
from agent.errors import ConfigError, ConfigProblem
from agent.evidence import SWITCH_ARCH, Tee

MAX_FILE_BYTES = 1 << 20

_MEASUREMENT_BYTES = 48
_XFAM_BYTES = 8
_PRODUCTS = ("Milan", "Genoa", "Turin", "Venice")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HEX_NUMBER = re.compile(r"0x[0-9a-f]{1,16}")


@dataclass(frozen=True, slots=True)
class SnpTcb:
    """Patch levels of one processor generation, 0..255 each; `fmc` where the generation has one."""

    product: str
    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None


@dataclass(frozen=True, slots=True)
class SnpImage:
    """What a SEV-SNP guest was launched as: 48 bytes in hexadecimal; the host's patch levels where they are known."""

    measurement: str
    tcb: SnpTcb | None


@dataclass(frozen=True, slots=True)
class TdxImage:
    """What a TD was launched as: measurements of 48 bytes in hexadecimal.

    Attributes:
        mr_seam: of the TDX module, and tee_tcb_svn, its versions, 16 bytes; None where they are not known.
        xfam: the features the TD may use, 8 bytes as they lie in the quote; None where they are not known.
    """

    mr_td: str
    rtmr_1: str
    rtmr_2: str
    mr_seam: str | None
    tee_tcb_svn: str | None
    xfam: str | None


Image = SnpImage | TdxImage


@dataclass(frozen=True, slots=True)
class GpuVersions:
    """`protected_pcie` is None where the GPU's report does not say."""

    driver_version: str
    vbios_version: str
    protected_pcie: bool | None


@dataclass(frozen=True, slots=True)
class SwitchVersions:
    """Of an NVSwitch: it has no driver of its own."""

    vbios_version: str


@dataclass(frozen=True, slots=True)
class Approved:
    """Everything a policy allows one key for.

    Attributes:
        image: None for sample evidence, which measures nothing.
        tee: of the guest; None for sample evidence.
        init_data: digest of the configuration, of 32, 48 or 64 bytes, before it is fitted to the TEE's field.
        switches: versions, where they are known; switch_count: the configured number, with which protected PCIe goes.
        gpu_ready_preset: an image's init sets the ready state before the first handshake.
        resource_uri: where a Trustee KBS has the key, when elsewhere than `key_uri` says.
        credentials_uri: where the key broker has the credentials of the model's store, if it does.
    """

    image: Image | None
    init_data: bytes
    gpu_count: int
    gpu_ready_preset: bool
    gpus: tuple[GpuVersions, ...]
    switches: tuple[SwitchVersions, ...]
    switch_count: int
    key_uri: str
    model_name: str
    model_version: int
    manifest_digest: str
    server_command_digest: str
    resource_uri: str | None = None
    credentials_uri: str | None = None

    @property
    def tee(self) -> Tee | None:
        match self.image:
            case SnpImage():
                return Tee.SNP
            case TdxImage():
                return Tee.TDX
        return None


def parse_image(data: bytes) -> Image:
    """Measurements of a SEV-SNP guest (`measurement`) or a TD (`mr_td`, `rtmr_1`, `rtmr_2`).

    Raises:
        ConfigError: with the name concerned, below `image`; never with a value.
    """
    values = _Values("image", _parse(data, "image"))
    # refusal: test_an_image_of_no_tee_or_of_two_is_refused
    if ("measurement" in values.members) is ("mr_td" in values.members):
        raise ConfigError(ConfigProblem.MISSING_KEY, Ident("image.measurement"))
    if "measurement" in values.members:
        return SnpImage(values.digest("measurement"), _tcb(values))
    svn = values.hexadecimal("tee_tcb_svn", 16) if "tee_tcb_svn" in values.members else None
    return TdxImage(
        mr_td=values.digest("mr_td"),
        rtmr_1=values.digest("rtmr_1"),
        rtmr_2=values.digest("rtmr_2"),
        mr_seam=values.digest("mr_seam") if "mr_seam" in values.members else None,
        tee_tcb_svn=svn,
        xfam=_xfam(values) if "xfam" in values.members else None,
    )


def parse_gpu(data: bytes) -> GpuVersions | SwitchVersions:
    """Versions of one GPU: `driver_version`, `vbios_version`, and `feature_flag` where it is known.

    Where `arch` is LS10 it is an NVSwitch, of which only the second counts.

    Raises:
        ConfigError: with the name concerned, below `gpu`; never with a value.
    """
    values = _Values("gpu", _parse(data, "gpu"))
    if values.members.get("arch") == SWITCH_ARCH:
        return SwitchVersions(values.version("vbios_version"))
    flag = values.members.get("feature_flag")
    return GpuVersions(values.version("driver_version"), values.version("vbios_version"), None if flag is None else flag == 2)


def _tcb(values: "_Values") -> SnpTcb | None:
    if not values.members.keys() & {"reported_tcb", "product"}:
        return None
    tcb, product = values.members.get("reported_tcb"), values.text("product")
    # refusal: test_a_value_of_another_form_is_refused_by_its_name
    if product not in _PRODUCTS:
        raise values.bad("product")
    # refusal: test_a_value_of_another_form_is_refused_by_its_name
    if not isinstance(tcb, dict):
        raise values.bad("reported_tcb")
    levels = _Values("image.reported_tcb", tcb)
    return SnpTcb(
        product,
        levels.level("boot_loader"),
        levels.level("tee"),
        levels.level("snp"),
        levels.level("microcode"),
        levels.level("fmc") if "fmc" in tcb else None,
    )


def _xfam(values: "_Values") -> str:
    """`verify` prints it as a number."""
    value = values.members["xfam"]
    # refusal: test_a_value_of_another_form_is_refused_by_its_name
    if not isinstance(value, str) or not _HEX_NUMBER.fullmatch(value):
        raise values.bad("xfam")
    return int(value, 16).to_bytes(_XFAM_BYTES, "little").hex()


@dataclass(frozen=True, slots=True)
class _Values:
    where: str
    members: dict[str, object]

    def bad(self, name: str, problem: ConfigProblem = ConfigProblem.BAD_VALUE) -> ConfigError:
        return ConfigError(problem, Ident(f"{self.where}.{name}"))

    def digest(self, name: str) -> str:
        return self.hexadecimal(name, _MEASUREMENT_BYTES)

    def hexadecimal(self, name: str, length: int) -> str:
        value = self.text(name)
        # refusal: test_a_value_of_another_form_is_refused_by_its_name
        if not re.fullmatch(f"[0-9a-f]{{{2 * length}}}", value):
            raise self.bad(name)
        return value

    def version(self, name: str) -> str:
        value = self.text(name)
        # refusal: test_a_value_of_another_form_is_refused_by_its_name
        if not _VERSION.fullmatch(value):
            raise self.bad(name)
        return value

    def level(self, name: str) -> int:
        value = self._member(name)
        # refusal: test_a_value_of_another_form_is_refused_by_its_name
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 255:
            raise self.bad(name)
        return value

    def text(self, name: str) -> str:
        value = self._member(name)
        # refusal: test_a_value_of_another_form_is_refused_by_its_name
        if not isinstance(value, str):
            raise self.bad(name, ConfigProblem.WRONG_TYPE)
        return value

    def _member(self, name: str) -> object:
        # refusal: test_a_value_of_another_form_is_refused_by_its_name
        if name not in self.members:
            raise self.bad(name, ConfigProblem.MISSING_KEY)
        return self.members[name]


def _parse(data: bytes, name: str) -> dict[str, object]:
    where = Ident(name)
    # refusal: test_what_is_no_object_is_refused
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(ConfigProblem.TOO_LARGE, where)
    try:
        text = data.decode()
        tree = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except UnicodeDecodeError:
        raise ConfigError(ConfigProblem.NOT_UTF8, where) from None
    except (ValueError, RecursionError):
        raise ConfigError(ConfigProblem.NOT_TOML, where) from None
    assert isinstance(tree, dict)
    return tree

"""Every way a boot can fail, who must act, and with which exit status the process ends.

AgentError
├── ConfigError · ConfigNotMeasuredError · ConfigConflictError
├── InitdataError                                                         operator × config
├── GuestInitError · GuestUnfitError                                      operator × guest
├── NoAttesterError · SimulationRefusedError · GuestApiError              operator × devices
│   └── KeyNotDeliveredError                                              authority × key
├── DeviceError · MalformedEvidenceError · EvidenceBindingError
│   └── DeviceUnavailableError · AttestationKeyLostError
│       EvidenceVerificationError                                         host × evidence
├── GpuCountError · GpuModeError · GpuFaultError                          host × gpu
├── VmRestartRequiredError                                                operator × gate
├── EvidencePrecheckError                                                 host × evidence
├── NoRouteError · BrokerUnreachableError · BrokerIdentityError           operator × broker
├── ClockSkewError                                                        operator × broker
├── RemoteProtocolError · BrokerFailureError · TrusteeRefusedError        authority × broker
├── KeyReleaseDeniedError · TokenError                                    authority × verdict
├── KeyUnwrapError · KeyMismatchError · StoreCredentialsError             authority × key
├── LeaseEndedError · LeaseUnsupervisedError                              authority × lease
├── ArtifactUnavailableError · VolumeUnavailableError                     operator × artifact
├── ArtifactError                                                         provider × artifact
│   └── ManifestDigestError · ManifestSignatureError · MalformedManifestError · RollbackError · MalformedHeaderError
│       ModelSignatureError · TruncatedArtifactError · SegmentAuthenticationError · SealError · ManifestTooLargeError
│       VolumeHeaderError · VolumeAuthenticationError
├── InsufficientMemoryError · DestinationError · SwapActiveError          operator × memory
├── ReceiptError                                                          operator × receipt
├── BootInterruptedError · WorkerLostError · SupervisorLostError          operator × agent
├── ServerError                                                           developer × server
│   └── ServerStartError · ServerExitedError · ServerNotReadyError · ServerStuckError
└── InternalError                                                         keyturn × agent

An error is built from closed fields (`closed.py`); the text is made in `__str__` from those fields alone, so nothing
secret and nothing a peer wrote can be in it. The whole tree is one file, however long: it is the page on which a failure is
looked up. What we did wrong ourselves is not here: that is a RuntimeError, a bug.
"""

import dataclasses
import enum
from typing import ClassVar

from agent.closed import ClosedRecord, Ident, from_record, to_record


class Owner(enum.Enum):
    """The party who must act."""

    OPERATOR = "operator"  # runs the cluster: configuration, network, memory, pods
    HOST = "host"  # owns machine and hypervisor: firmware, device state
    AUTHORITY = "authority"  # decides about keys: the broker and its policy
    PROVIDER = "provider"  # sealed the model
    DEVELOPER = "developer"  # chose the model server
    KEYTURN = "keyturn"  # us: a bug


class Step(enum.Enum):
    """The part of the boot that failed."""

    GUEST = "guest"
    CONFIG = "config"
    DEVICES = "devices"
    EVIDENCE = "evidence"
    GPU = "gpu"
    GATE = "gate"
    BROKER = "broker"
    VERDICT = "verdict"
    KEY = "key"
    LEASE = "lease"
    ARTIFACT = "artifact"
    MEMORY = "memory"
    RECEIPT = "receipt"
    SERVER = "server"
    AGENT = "agent"


# The exit table is an interface: numbers are never reused, and a test freezes it.
EXIT_SERVED = 0
EXIT_USAGE = 2
EXIT_STATUS: dict[tuple[Owner, Step], int] = {
    (Owner.OPERATOR, Step.CONFIG): 10,
    (Owner.OPERATOR, Step.DEVICES): 11,
    (Owner.HOST, Step.EVIDENCE): 12,
    (Owner.HOST, Step.GPU): 13,
    (Owner.OPERATOR, Step.BROKER): 14,
    (Owner.AUTHORITY, Step.BROKER): 15,
    (Owner.AUTHORITY, Step.VERDICT): 16,
    (Owner.AUTHORITY, Step.KEY): 17,
    (Owner.OPERATOR, Step.ARTIFACT): 18,
    (Owner.PROVIDER, Step.ARTIFACT): 19,
    (Owner.OPERATOR, Step.MEMORY): 20,
    (Owner.OPERATOR, Step.AGENT): 21,
    (Owner.AUTHORITY, Step.LEASE): 22,
    (Owner.OPERATOR, Step.GUEST): 23,
    (Owner.OPERATOR, Step.RECEIPT): 24,
    (Owner.KEYTURN, Step.AGENT): 29,
    (Owner.DEVELOPER, Step.SERVER): 30,
    (Owner.OPERATOR, Step.GATE): 31,
}


class AgentError(ClosedRecord, Exception):
    """The world misbehaved. Subclasses are dataclasses; `owner`, `step` and `next_step` are facts of the class."""

    owner: ClassVar[Owner]
    step: ClassVar[Step]
    next_step: ClassVar[str]
    """One fixed sentence for the owner. Never built from data."""

    @property
    def exit_status(self) -> int:
        return EXIT_STATUS[self.owner, self.step]

    @property
    def retryable(self) -> bool:
        """May the same request be made again within the deadline? A denial never."""
        return False

    def what(self) -> str:
        """What was read, got and expected: lower case, no full stop, from closed fields only."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.what()} ({self.owner.value})"


# --- configuration ----------------------------------------------------------------------------------------------------


class ConfigProblem(enum.Enum):
    NOT_FOUND = "file not found or not readable"
    TOO_LARGE = "file is larger than 1 MiB"
    NOT_UTF8 = "file is not UTF-8"
    NOT_TOML = "file is not valid TOML"
    WRONG_SCHEMA = "schema is missing or not one this version reads"
    UNKNOWN_KEY = "key is not part of the schema"
    MISSING_KEY = "key is missing"
    WRONG_TYPE = "value has the wrong type"
    BAD_VALUE = "value is out of range or malformed"
    ADDRESS = "address cannot be listened on"
    NEEDS_OTHER_KEY = "value needs another key that is missing, or excludes one that is set"
    UNSELECTED = "several models are allowed, and none of them was asked for"


@dataclasses.dataclass(eq=False)
class ConfigError(AgentError):
    """The configuration cannot be used. `key` is the dotted path of the key, `line` its line in the file if known."""

    owner = Owner.OPERATOR
    step = Step.CONFIG
    next_step = "correct the configuration; `keyturn config check FILE` shows the same error without a boot"
    problem: ConfigProblem
    key: Ident | None = None
    line: int | None = None

    def what(self) -> str:
        at = f", line {self.line}" if self.line is not None else ""
        return f"configuration {self.key}: {self.problem.value}{at}" if self.key else f"configuration: {self.problem.value}{at}"


class Asked(enum.Enum):
    """What words of the host ask for: KServe, in its own names, of its storage initializer; a pod, after `run`'s --."""

    URI = "storage URI"
    RESOURCE_ID = "CONFIDENTIAL_RESOURCE_ID"
    CONFIDENTIAL = "CONFIDENTIAL_ENABLED"
    COMMAND = "server command"


@dataclasses.dataclass(eq=False)
class ConfigNotMeasuredError(AgentError):
    """What is to decide is not what this guest was launched with (HOST_DATA of SNP, MRCONFIGID of TDX): the digest of the
    configuration is another, or, with `asked`, the command line or KServe asks for something that it does not allow.
    """

    owner = Owner.OPERATOR
    step = Step.CONFIG
    next_step = (
        "launch the guest with the digest of exactly this configuration, or give it the configuration it was launched with; "
        "what a pod asks for must stand there: in an entry of artifact.allowed, or as server.command"
    )
    asked: Asked | None = None

    def what(self) -> str:
        if self.asked is not None:
            where = "is not server.command" if self.asked is Asked.COMMAND else "is in no entry of artifact.allowed"
            return f"{self.asked.value}: the value asked for {where}"
        return "configuration digest differs from HOST_DATA or MRCONFIGID of this guest's own report"


@dataclasses.dataclass(eq=False)
class ConfigConflictError(AgentError):
    """Two places hold a configuration, and only one may decide."""

    owner = Owner.OPERATOR
    step = Step.CONFIG
    next_step = "leave one source: the initdata entry keyturn.toml, or the file in the guest image"
    first: Ident
    second: Ident

    def what(self) -> str:
        return f"configuration found in {self.first} and in {self.second}"


class InitdataProblem(enum.Enum):
    LENGTH = "length field is larger than the device or than 1 MiB"
    GZIP = "content is not one whole gzip stream"
    TOO_LARGE = "document is larger than 4 MiB"
    NOT_UTF8 = "document is not UTF-8"
    NOT_TOML = "document is not valid TOML"
    VERSION = "version is missing or not 0.1.0"
    ALGORITHM = "algorithm is missing or none of sha256, sha384, sha512"
    DATA = "[data] is missing or not a table of strings"
    NO_ENTRY = "[data] has no entry keyturn.toml"


@dataclasses.dataclass(eq=False)
class InitdataError(AgentError):
    """An initdata document cannot be used. `source` says where it came from."""

    owner = Owner.OPERATOR
    step = Step.CONFIG
    next_step = "make the initdata again; the annotation is base64 of gzip of the TOML document"
    source: Ident
    problem: InitdataProblem

    def what(self) -> str:
        return f"initdata from {self.source}: {self.problem.value}"


# --- the guest itself -------------------------------------------------------------------------------------------------


class GuestPart(enum.Enum):
    MOUNT = "mount"
    MODULE = "kernel module"
    INTERFACE = "network interface"
    PARAMETER = "kernel parameter"


@dataclasses.dataclass(eq=False)
class GuestInitError(AgentError):
    """As PID 1 the agent could not make the guest what it needs. `name` is the mount, module, interface or parameter."""

    owner = Owner.OPERATOR
    step = Step.GUEST
    next_step = "check that kernel, initrd and kernel command line are of one build; the kernel's own lines above may say more"
    part: GuestPart
    name: Ident
    code: int = 0

    def what(self) -> str:
        return f"guest init: {self.part.value} {self.name} failed" + (f" (errno {self.code})" if self.code else "")


class Unfit(enum.Enum):
    KERNEL = "kernel is older than its interfaces to this TEE"
    GPU_DRIVER_ABSENT = "NVIDIA driver is not loaded"
    GPU_DRIVER_UNKNOWN = "NVIDIA driver tells no version that is one"
    GPU_DRIVER_CLOSED = "NVIDIA driver is not of the open kernel modules, which alone know confidential computing"
    GPU_DRIVER_OLD = "NVIDIA driver is older than what confidential computing needs"
    CLOCK = "clock is before this program was made"


@dataclasses.dataclass(eq=False)
class GuestUnfitError(AgentError):
    """`keyturn doctor` found the guest's kernel, driver or clock to be none that a boot can use. `got` and `expected` are
    versions or days, None where there are none.
    """

    owner = Owner.OPERATOR
    step = Step.GUEST
    next_step = "use an image with a newer kernel or driver; for the clock, see that host and guest agree about the time"
    problem: Unfit
    got: Ident | None = None
    expected: Ident | None = None

    def what(self) -> str:
        got = f": got {self.got}" if self.got else ""
        return f"guest: {self.problem.value}{got}" + (f", expected {self.expected}" if self.expected else "")


# --- devices and evidence ---------------------------------------------------------------------------------------------


class Absence(enum.Enum):
    """Why the configured attester has no device, as far as the guest can see."""

    NO_INTERFACE = "no interface of it is there"
    NO_DRIVER = "the processor says that this guest is one, but no driver gives access"
    NO_QUOTE_SERVICE = "no provider in configfs-tsm, and no port of a quote service in /etc/tdx-attest.conf"
    OTHER_TEE = "this guest is of another TEE"
    GPU_NOT_HELD = (
        "no other process is seen to hold the GPUs open, and a confidential GPU that its last user closes is lost until its "
        "reset: start nvidia-persistenced first"
    )
    NO_RUNTIME_REGISTER = "runtime measurement is required, and this guest has no register that the agent may extend"
    PARAVISOR = "below a Hyper-V paravisor (Azure) evidence is a vTPM's, which is not supported"
    NO_GUEST_API = "nothing listens at tee.coco_url"
    SAMPLE = "the guest's attestation-agent gives sample evidence, which proves nothing"


@dataclasses.dataclass(eq=False)
class NoAttesterError(AgentError):
    owner = Owner.OPERATOR
    step = Step.DEVICES
    next_step = (
        "run in a confidential guest whose image has the TEE driver and mounts configfs; simulators are configured by name"
    )
    attester: Ident
    reason: Absence = Absence.NO_INTERFACE

    def what(self) -> str:
        return f"no device for attester {self.attester}: {self.reason.value}"


class SimulationRefusal(enum.Enum):
    REAL_TEE_PRESENT = "a real TEE device exists"
    NOT_INSTALLED = "this installation carries no simulators"
    NO_FUSE = "this machine has no FUSE for us: modprobe fuse, give a container /dev/fuse and CAP_SYS_ADMIN"
    NOT_ALLOWED = "the verdict is simulated and the configuration does not allow it"


@dataclasses.dataclass(eq=False)
class SimulationRefusedError(AgentError):
    owner = Owner.OPERATOR
    step = Step.DEVICES
    next_step = "simulation is for development machines: configure the real attester"
    reason: SimulationRefusal

    def what(self) -> str:
        return f"simulation refused: {self.reason.value}"


@dataclasses.dataclass(eq=False)
class DeviceError(AgentError):
    """A device call failed. `code` is the errno, NVML return code, firmware or HTTP status, as `interface` defines it."""

    owner = Owner.HOST
    step = Step.EVIDENCE
    next_step = "look the code up for this interface; a guest whose device failed must be restarted, not retried"
    interface: Ident
    call: Ident
    code: int

    def what(self) -> str:
        return f"{self.interface}: {self.call} failed with code {self.code}"


@dataclasses.dataclass(eq=False)
class DeviceUnavailableError(DeviceError):
    """The device could not answer now, and was asked as often as its interface allows. `code` is the last answer's."""

    next_step = (
        "find who else in this guest asks for evidence; with TDX see that the host's quote service runs; then boot again"
    )


@dataclasses.dataclass(eq=False)
class AttestationKeyLostError(DeviceError):
    """A request ended so that the kernel gave up the key to the SNP firmware, or it had done so before (VMPCK)."""

    next_step = "restart the guest: only that brings the key to its firmware back; the host's log may say what it refused"


class GuestApiProblem(enum.Enum):
    REFUSED = "nothing listens at tee.coco_url"
    LOST = "connection ended before the answer"
    TIMEOUT = "no answer in time"
    FORBIDDEN = "refused: the request did not come from the guest's loopback"
    NOT_SERVED = "not served, or its feature is off"
    FAILED = "failed, in words that are not repeated"
    STATUS = "answered with a status it is not known to use"
    MALFORMED = "answer does not have the form of this request's"
    TOO_LARGE = "answer is larger than the limit"
    FEATURES = "started without a feature that this configuration needs"
    ENCODING = "took the text of encoding=base64 for the data itself: these guest-components are too old"


@dataclasses.dataclass(eq=False)
class GuestApiError(AgentError):
    """CoCo's api-server-rest of this guest. `call` is the request's name, `status` its HTTP status, 0 without one."""

    owner = Owner.OPERATOR
    step = Step.DEVICES
    next_step = (
        "check the guest image's guest-components: their version, agent.guest_components_rest_api = all, and their own logs"
    )
    call: Ident
    problem: GuestApiProblem
    status: int = 0

    def what(self) -> str:
        return f"api-server-rest, {self.call}: {self.problem.value}" + (f" ({self.status})" if self.status else "")


@dataclasses.dataclass(eq=False)
class KeyNotDeliveredError(GuestApiError):
    """The guest's confidential-data-hub gave no key, or no credentials for the store, although its attestation had just been
    accepted. It says no cause.
    """

    owner = Owner.AUTHORITY
    step = Step.KEY
    next_step = (
        "look up this guest's request for broker.key_uri, or before it for artifact.credentials_uri, in the log of the key "
        "broker service: its policy denied it, there is no such resource, or the service was not reached"
    )


class EvidenceFormat(enum.Enum):
    SNP_REPORT = "snp-report"
    SNP_CHAIN = "snp-certificate-chain"
    NVIDIA_REPORT = "nvidia-report"
    NVIDIA_CHAIN = "nvidia-certificate-chain"
    SWITCH_REPORT = "nvswitch-report"
    SWITCH_CHAIN = "nvswitch-certificate-chain"
    TDX_REPORT = "tdx-report"
    TDX_QUOTE = "tdx-quote"
    TDX_CHAIN = "tdx-certificate-chain"
    EVENT_LOG = "cc-event-log"
    NVIDIA_TOPOLOGY = "nvidia-topology"
    SAMPLE = "sample-evidence"
    ADDITIONAL = "additional-evidence"


@dataclasses.dataclass(eq=False)
class MalformedEvidenceError(AgentError):
    """Evidence does not parse. `field` names the offending part; `got` and `expected` are lengths or field values."""

    owner = Owner.HOST
    step = Step.EVIDENCE
    next_step = "report firmware and driver versions; evidence in this shape cannot be appraised"
    format: EvidenceFormat
    field: Ident
    got: int | None = None
    expected: int | None = None

    def what(self) -> str:
        numbers = f": got {self.got}, expected {self.expected}" if self.got is not None else ""
        return f"{self.format.value}: malformed {self.field}{numbers}"


@dataclasses.dataclass(eq=False)
class EvidenceBindingError(AgentError):
    """The device answered with evidence over other data than we asked for."""

    owner = Owner.HOST
    step = Step.EVIDENCE
    next_step = "treat the device or its driver as faulty or hostile; restart the guest on another machine"
    format: EvidenceFormat

    def what(self) -> str:
        return f"{self.format.value}: evidence does not carry the data it was asked to carry"


class EvidenceCheck(enum.Enum):
    """What a verifier checks. The broker denies with the same words."""

    REPORT_VERSION = "report-version"
    REPORT_SIGNATURE = "report-signature"
    CERTIFICATE_CHAIN = "certificate-chain"
    CERTIFICATE_VALIDITY = "certificate-validity"
    CERTIFICATE_TCB = "certificate-tcb"
    CERTIFICATE_CHIP_ID = "certificate-chip-id"
    SIGNING_KEY = "signing-key"
    FWID = "fwid"
    NONCE = "nonce"
    REPORT_DATA = "report-data"
    REVOCATION = "revocation"
    REVOCATION_LIST = "revocation-list"
    REVOCATION_LIST_SIGNATURE = "revocation-list-signature"
    REVOCATION_LIST_VALIDITY = "revocation-list-validity"
    QE_VENDOR = "qe-vendor"
    QE_IDENTITY = "qe-identity"
    QE_REPORT_SIGNATURE = "qe-report-signature"
    ATTESTATION_KEY = "attestation-key"
    TDX_MODULE = "tdx-module"
    TD_DEBUG = "td-debug"
    RTMR = "rtmr"
    TCB_COLLATERAL = "tcb-collateral"
    # Of a protected-PCIe set:
    GPU_COUNT = "gpu-count"
    SWITCH_COUNT = "switch-count"
    DISTINCT_KEYS = "distinct-keys"
    PROTECTED_PCIE = "protected-pcie"
    DISTINCT_PDIS = "distinct-pdis"
    GPU_LINKS = "gpu-links"
    SWITCH_LINKS = "switch-links"
    COMMON_GPUS = "common-gpus"


@dataclasses.dataclass(eq=False)
class EvidenceVerificationError(AgentError):
    """Evidence parses and a check does not hold. `got` and `expected` are values of fields, where numbers say it."""

    owner = Owner.HOST
    step = Step.EVIDENCE
    next_step = "the device's evidence is not genuine or not fresh; do not run confidential work on this machine"
    format: EvidenceFormat
    check: EvidenceCheck
    got: int | None = None
    expected: int | None = None

    def what(self) -> str:
        numbers = f": got {self.got}, expected {self.expected}" if self.got is not None else ""
        return f"{self.format.value}: {self.check.value} does not verify{numbers}"


class Precheck(enum.Enum):
    """What Trustee's verifier or its usual policies refuse without saying so, seen before anything is sent."""

    REPORT_VERSION = "report version"
    VMPL = "VMPL"
    DEBUG = "debug bit of the guest policy or of the TD attributes"


@dataclasses.dataclass(eq=False)
class EvidencePrecheckError(AgentError):
    """Evidence is genuine as far as we know, and of a guest that was launched as no verifier of ours accepts it."""

    owner = Owner.HOST
    step = Step.EVIDENCE
    next_step = "launch the guest at VMPL 0 and without debugging, on firmware that writes report versions 3 to 5"
    check: Precheck
    got: int

    def what(self) -> str:
        return f"evidence would be refused: {self.check.value} is {self.got}"


# --- GPU --------------------------------------------------------------------------------------------------------------


class CountedDevice(enum.Enum):
    GPU = "GPU"
    NVSWITCH = "NVSwitch"


@dataclasses.dataclass(eq=False)
class GpuCountError(AgentError):
    owner = Owner.HOST
    step = Step.GPU
    next_step = "attach the configured number of GPUs and NVSwitches to this guest, each of them once"
    expected: int
    got: int
    device: CountedDevice = CountedDevice.GPU

    def what(self) -> str:
        plural = "es" if self.device is CountedDevice.NVSWITCH else "s"
        return f"expected {self.expected} distinct {self.device.value}{plural}, got {self.got}"


class GpuMode(enum.Enum):
    CC_FEATURE = "confidential computing feature"
    ENVIRONMENT = "environment (2 is production)"
    DEVTOOLS = "devtools mode"
    MULTI_GPU = "multi-GPU mode"
    REGISTRY_KEYS = "registry keys that weaken confidential computing"
    PERSISTENCE = "persistence mode"
    SWITCH = "trusted NVLink mode of an NVSwitch (3 is locked)"


@dataclasses.dataclass(eq=False)
class GpuModeError(AgentError):
    owner = Owner.HOST
    step = Step.GPU
    next_step = "set the GPU's mode, on the host or for persistence in the guest's image, and restart the guest"
    mode: GpuMode
    got: int
    expected: int

    def what(self) -> str:
        return f"GPU {self.mode.value}: got {self.got}, expected {self.expected}"


class GpuFault(enum.Enum):
    FATAL_XID = "fatal XID in the kernel log"
    CC_FATAL = "confidential computing fatal error in the kernel log"
    INVENTORY_CHANGED = "GPU inventory changed after attestation"
    READY_NOT_SET = "ready state does not read back as set"
    READY_LOST = "ready state fell back while the model was served"
    KERNEL_LOG_UNREADABLE = "kernel log is not readable"


@dataclasses.dataclass(eq=False)
class GpuFaultError(AgentError):
    """`code` is the XID for FATAL_XID, else 0."""

    owner = Owner.HOST
    step = Step.GPU
    next_step = "reset the GPU on the host and restart the guest"
    fault: GpuFault
    code: int = 0

    def what(self) -> str:
        return f"GPU: {self.fault.value}" + (f" ({self.code})" if self.code else "")


@dataclasses.dataclass(eq=False)
class VmRestartRequiredError(AgentError):
    """The ready state is already 1: somebody passed the gate before this boot, and it is never set back."""

    owner = Owner.OPERATOR
    step = Step.GATE
    next_step = (
        "delete the pod and restart the guest; if its image sets the ready state itself, configure gpu.ready_state = preset"
    )

    def what(self) -> str:
        return "GPU ready state was already 1 when this boot began"


# --- broker -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class NoRouteError(AgentError):
    """The guest got no route within the measured deadline. `interfaces` counts those that are not the loopback."""

    owner = Owner.OPERATOR
    step = Step.BROKER
    next_step = "check the pod's network: kata-agent or the guest's own init must configure an interface"
    waited_s: int
    interfaces: int

    def what(self) -> str:
        return f"no route out of this guest after {self.waited_s} s, {self.interfaces} network interfaces"


class Unreachable(enum.Enum):
    REFUSED = "connection refused"
    NAME = "name does not resolve"
    TIMEOUT = "no answer in time"
    RESET = "connection lost"
    OVERLOADED = "broker asked to come back later"
    SERVER_ERROR = "broker, or a proxy before it, answers with a server error"
    PROXY = "the proxy makes no connection to it"


@dataclasses.dataclass(eq=False)
class BrokerUnreachableError(AgentError):
    """`status` is the HTTP status of a proxy, 0 if there was none."""

    owner = Owner.OPERATOR
    step = Step.BROKER
    next_step = "check broker.endpoints, routes and firewalls between this guest and the broker"
    reason: Unreachable
    attempts: int = 1
    status: int = 0

    @property
    def retryable(self) -> bool:
        return not _is_refusal(self.status)

    def what(self) -> str:
        status = f" ({self.status})" if self.status else ""
        return f"broker not reachable: {self.reason.value}{status}, {self.attempts} attempts"


def _is_refusal(status: int) -> bool:
    """Of a proxy: it would say the same again."""
    return 400 <= status < 500


class IdentityProblem(enum.Enum):
    CHAIN = "certificate does not lead to the measured CA"
    NAME = "certificate is for another server name"
    NOT_YET_VALID = "certificate is not yet valid by this guest's clock"
    EXPIRED = "certificate is expired by this guest's clock"
    TLS = "TLS handshake failed"


@dataclasses.dataclass(eq=False)
class BrokerIdentityError(AgentError):
    owner = Owner.OPERATOR
    step = Step.BROKER
    next_step = (
        "compare broker.ca_pem and broker.server_name with the broker's certificate, and the guest's clock with a good one; "
        "otherwise somebody else answers"
    )
    problem: IdentityProblem

    def what(self) -> str:
        return f"broker identity: {self.problem.value}"


@dataclasses.dataclass(eq=False)
class ClockSkewError(AgentError):
    """Something that was made a moment ago, by the broker's clock, has another time on it. Not expiry: that is a TokenError."""

    owner = Owner.OPERATOR
    step = Step.BROKER
    next_step = "set the guest's clock, which its host gives it, and compare the broker's with a time server"
    ahead_s: int  # how far this guest's clock is ahead; negative: behind

    def what(self) -> str:
        return f"this guest's clock and the broker's differ by {self.ahead_s} s"


class ProtocolProblem(enum.Enum):
    UNEXPECTED_MESSAGE = "message out of order"
    OVERSIZED = "message larger than the limit"
    MALFORMED = "message has a missing or malformed field"
    REQUEST_ID = "answer carries another request id"
    CLOSED = "stream ended before the answer"
    VERSION = "protocol version is not supported"
    REDIRECT = "answer is a redirect, which is not followed"
    FOREIGN = "answer is not one that a key broker gives"
    TOO_MANY_CHALLENGES = "more challenges than this guest answers in one boot"


@dataclasses.dataclass(eq=False)
class RemoteProtocolError(AgentError):
    """`version` is the one that the broker says it speaks, where it says so."""

    owner = Owner.AUTHORITY
    step = Step.BROKER
    next_step = "compare the versions of broker and agent; the broker's audit log has the request id"
    problem: ProtocolProblem
    state: Ident
    version: Ident | None = None

    def what(self) -> str:
        version = f", the broker speaks {self.version}" if self.version else ""
        return f"broker protocol in state {self.state}: {self.problem.value}{version}"


@dataclasses.dataclass(eq=False)
class BrokerFailureError(AgentError):
    """The broker answered with a failure of its own. `status` is the gRPC status code, `reason` the broker's word.

    UNAVAILABLE with a word is a part of the broker that may come back, its key store for one, and worth another attempt.
    Whatever else failed needs somebody to mend it.
    """

    owner = Owner.AUTHORITY
    step = Step.BROKER
    next_step = "look up the request id in the broker's audit log"
    status: int
    reason: Ident

    @property
    def retryable(self) -> bool:
        return self.status == 14  # UNAVAILABLE

    def what(self) -> str:
        return f"broker failed with status {self.status}, reason {self.reason}"


class TrusteeRefusal(enum.Enum):
    """What a Trustee KBS can answer instead, as far as its answers tell it apart (`handshake/rcar.py` has the table)."""

    REQUEST = "it does not take our first request: it may not know this kind of TEE"
    CHALLENGE = "it has no challenge for us: its session store or its attestation service may be down"
    ATTESTATION = "it refused the attestation and says no more: its own log and its attestation service's have the reason"
    NO_SESSION = "it knows neither our session nor our token: its replicas need one session store"
    VERIFICATION = "it does not take the token it gave us: its [attestation_token] must name the attestation service's key"
    POLICY_ENGINE = "its resource policy cannot be evaluated: mend the policy"
    RESOURCE = "its policy lets us through and it does not have the key: store it where broker.resource_uri says"
    KEY_TYPE = "it cannot encrypt for a P-256 key: update the KBS"
    NO_PLUGIN = "it has no plugin of that name: configure it, or correct broker.resource_uri"
    PATH = "it takes no such path: correct broker.resource_uri"
    ADMIN = "it wants an administrator there: broker.resource_uri names something else than a key"
    TOO_LARGE = "our message is larger than its limit: raise payload_request_size of the KBS"
    INTERNAL = "a part of it failed: its log has the reason"
    UNKNOWN = "it refused in a word of another release: compare the versions"


_MAY_PASS = frozenset((TrusteeRefusal.CHALLENGE, TrusteeRefusal.ATTESTATION, TrusteeRefusal.RESOURCE))
MAX_REFUSED_ATTEMPTS = 3


@dataclasses.dataclass(eq=False)
class TrusteeRefusedError(AgentError):
    """A Trustee KBS ended the handshake, and not by its policy: that is a KeyReleaseDeniedError.

    Three refusals look the same whether something is wrong for good or for a minute (vendor's collateral, a store behind the
    KBS). They are tried again, and given up after three attempts, however much time is left.
    """

    owner = Owner.AUTHORITY
    step = Step.BROKER
    next_step = "do what the refusal says; the logs of KBS and attestation service have more at the time of this request"
    refusal: TrusteeRefusal
    attempts: int = 1

    @property
    def retryable(self) -> bool:
        return self.refusal in _MAY_PASS and self.attempts < MAX_REFUSED_ATTEMPTS

    def what(self) -> str:
        attempts = f", {self.attempts} attempts" if self.attempts > 1 else ""
        return f"Trustee: {self.refusal.value}{attempts}"


class DenialReason(enum.Enum):
    """Why a broker denied. Closed; a Verdict carries these names, but for the last one."""

    CLAIM = "claim"  # a verified claim is not allowed: measurement, HOST_DATA, MRCONFIGID, policy bits, TCB, GPU count …
    DEVICE = "device"  # evidence of a device is missing, doubled, or does not verify
    COLLATERAL = "collateral"  # certificates are missing, foreign or out of date
    REFERENCE_VALUE = "reference-value"  # the policy row has no value to compare with
    POLICY = "policy"  # no row, revoked, out of its dates
    UNSPECIFIED = "unspecified"  # a key was refused in words that are not ours


@dataclasses.dataclass(eq=False)
class KeyReleaseDeniedError(AgentError):
    """Final: a denial is never retried, whether the Verdict denied or the key was refused after it."""

    owner = Owner.AUTHORITY
    step = Step.VERDICT
    next_step = "ask the key-release authority, with request id, claim and policy version; do not retry"
    reason: DenialReason
    claim: Ident
    reference_value_id: Ident | None
    policy_version: Ident

    def what(self) -> str:
        value = f", reference value {self.reference_value_id}" if self.reference_value_id else ""
        return f"key release denied: {self.reason.value} {self.claim}{value}, policy version {self.policy_version}"


class TokenCheck(enum.Enum):
    FORMAT = "format"
    ALGORITHM = "algorithm"
    SIGNATURE = "signature"
    EXPIRED = "expiry"
    NOT_YET_VALID = "not-before"
    TEE_PUBKEY = "tee-pubkey"
    NONCE = "nonce"
    KEY_URI = "key-uri"
    LAUNCH = "launch digest"
    CLAIMS = "claims"


@dataclasses.dataclass(eq=False)
class TokenError(AgentError):
    owner = Owner.AUTHORITY
    step = Step.VERDICT
    next_step = (
        "compare broker.token_keys with the authority's signing key, and both clocks; otherwise somebody altered the verdict"
    )
    check: TokenCheck

    def what(self) -> str:
        return f"verdict token: {self.check.value} does not hold"


class UnwrapCheck(enum.Enum):
    FORMAT = "JWE format"
    ALGORITHM = "algorithm"
    EPHEMERAL_KEY = "ephemeral key"
    KEY_WRAP = "key wrap"
    CONTENT = "content authentication"
    LENGTH = "key length"
    KEYSET = "keyset"


@dataclasses.dataclass(eq=False)
class KeyUnwrapError(AgentError):
    owner = Owner.AUTHORITY
    step = Step.KEY
    next_step = "the sealed key was not made for this boot; look up the request id in the broker's audit log"
    check: UnwrapCheck

    def what(self) -> str:
        return f"sealed key: {self.check.value} does not hold"


@dataclasses.dataclass(eq=False)
class KeyMismatchError(AgentError):
    """The key opens nothing here: it is not the key this model was sealed with (key commitment)."""

    owner = Owner.AUTHORITY
    step = Step.KEY
    next_step = "store the key this model was sealed with under its key URI"

    def what(self) -> str:
        return "key does not match the manifest's key commitment"


class CredentialsProblem(enum.Enum):
    SEALED = "not sealed as a key for this boot is"
    LENGTH = "empty, longer than 4 KiB, or as long as a model key"
    FORM = "not one JSON object of user, secret and perhaps session_token, each a text as that can be"
    NOT_A_BUCKET = "with a session token, which is for a bucket, and the store is a registry"


@dataclasses.dataclass(eq=False)
class StoreCredentialsError(AgentError):
    """What lies at `artifact.credentials_uri` is not credentials. `check`: of a seal that does not hold, which part."""

    owner = Owner.AUTHORITY
    step = Step.KEY
    next_step = (
        "store credentials of this form under artifact.credentials_uri; `keyturn explain StoreCredentialsError` shows it"
    )
    problem: CredentialsProblem
    check: UnwrapCheck | None = None

    def what(self) -> str:
        return f"credentials for the store: {self.problem.value}" + (f": {self.check.value}" if self.check else "")


@dataclasses.dataclass(eq=False)
class LeaseEndedError(AgentError):
    owner = Owner.AUTHORITY
    step = Step.LEASE
    next_step = "start a new boot; it asks for a new key"
    lease_s: int

    def what(self) -> str:
        return f"key lease of {self.lease_s} s ended"


@dataclasses.dataclass(eq=False)
class LeaseUnsupervisedError(AgentError):
    """The key comes with a lease, and this agent ends when the model is open: nobody would obey it."""

    owner = Owner.AUTHORITY
    step = Step.LEASE
    next_step = "boot with `keyturn run`, which renews and obeys a lease, or let the key's policy row give none"
    lease_s: int

    def what(self) -> str:
        return f"key comes with a lease of {self.lease_s} s, and `keyturn load` leaves nobody to obey it"


# --- artifact ---------------------------------------------------------------------------------------------------------


class StoreProblem(enum.Enum):
    NOT_FOUND = "not found"
    REFUSED = "access refused"
    UNREACHABLE = "not reachable"
    TIMEOUT = "no answer in time"
    SERVER_ERROR = "server error"
    BAD_ANSWER = "answer does not fit the request"
    PROXY = "the proxy makes no connection to it"
    CHANGED = "object changed while it was read"
    TLS = "TLS handshake failed"


@dataclasses.dataclass(eq=False)
class ArtifactUnavailableError(AgentError):
    """The store did not deliver. `status` is the HTTP status or errno, 0 if there was none."""

    owner = Owner.OPERATOR
    step = Step.ARTIFACT
    next_step = "check artifact.source and that the store holds every blob of this manifest"
    problem: StoreProblem
    status: int = 0

    @property
    def retryable(self) -> bool:
        if self.problem is StoreProblem.PROXY:
            return not _is_refusal(self.status)
        return self.problem in (StoreProblem.UNREACHABLE, StoreProblem.TIMEOUT, StoreProblem.SERVER_ERROR)

    def what(self) -> str:
        return f"artifact store: {self.problem.value}" + (f" ({self.status})" if self.status else "")


class VolumeProblem(enum.Enum):
    NOT_FOUND = "no disk of this guest has the UUID of the manifest"
    SEVERAL = "several disks have the UUID of the manifest"
    TOO_SMALL = "the disk ends before its volume does"
    STALLED = "the disk does not answer"
    KERNEL = "kernel refused"


@dataclasses.dataclass(eq=False)
class VolumeUnavailableError(AgentError):
    """An encrypted volume cannot be reached here. `code` is the errno for KERNEL, else 0."""

    owner = Owner.OPERATOR
    step = Step.ARTIFACT
    next_step = (
        "attach the volume's disk to this guest; a kernel with dm-crypt, dm-verity and EROFS, and root, are needed to open it"
    )
    problem: VolumeProblem
    code: int = 0

    def what(self) -> str:
        return f"encrypted volume: {self.problem.value}" + (f" (errno {self.code})" if self.code else "")


class ArtifactError(AgentError):
    """The artifact itself is not what its provider promised."""

    owner = Owner.PROVIDER
    step = Step.ARTIFACT
    next_step = "copy the sealed model again; if it fails again, seal it again"


@dataclasses.dataclass(eq=False)
class ManifestDigestError(ArtifactError):
    def what(self) -> str:
        return "manifest digest differs from the measured configuration"


class SignatureCheck(enum.Enum):
    """From the least to the most that a signature had right."""

    MISSING = "no signature lies beside it"
    MALFORMED = "not a signature of this format"
    KEY = "made with a key that is not pinned"
    ALGORITHM = "algorithm does not belong to the key"
    MANIFEST = "made for another manifest"
    SIGNATURE = "does not verify"


@dataclasses.dataclass(eq=False)
class ManifestSignatureError(ArtifactError):
    """The manifest is not one that the provider signed."""

    next_step = "sign the manifest with a key of artifact.provider_keys (keyturn seal --sign), and copy the signature too"
    check: SignatureCheck

    def what(self) -> str:
        return f"manifest signature: {self.check.value}"


class BundleCheck(enum.Enum):
    """From the least to the most that an OpenSSF signature of a model had right."""

    MISSING = "the model has no file of that name"
    FORMAT = "not a bundle of model-signing with SHA-256 of whole files"
    SIGNATURE = "does not verify under a pinned key"
    FILES = "does not list exactly the files of the model"
    DIGEST = "a file is not the one that was signed"


@dataclasses.dataclass(eq=False)
class ModelSignatureError(ArtifactError):
    """The plaintext is not what the key of `artifact.model_signature_keys` signed."""

    next_step = "sign the model folder (model_signing sign key), seal it together with the bundle, and pin that key"
    check: BundleCheck

    def what(self) -> str:
        return f"model signature: {self.check.value}"


@dataclasses.dataclass(eq=False)
class MalformedManifestError(ArtifactError):
    field: Ident

    def what(self) -> str:
        return f"manifest: malformed or inconsistent {self.field}"


@dataclasses.dataclass(eq=False)
class RollbackError(ArtifactError):
    next_step = "deploy a model version that is not below the floor, or lower the floor deliberately"
    version: int
    floor: int

    def what(self) -> str:
        return f"model version {self.version} is below the floor {self.floor}"


@dataclasses.dataclass(eq=False)
class MalformedHeaderError(ArtifactError):
    """`file` is the index in the manifest's file table."""

    file: int

    def what(self) -> str:
        return f"file {self.file}: malformed or foreign stream header"


@dataclasses.dataclass(eq=False)
class TruncatedArtifactError(ArtifactError):
    file: int
    got_bytes: int
    expected_bytes: int

    def what(self) -> str:
        return f"file {self.file}: got {self.got_bytes} bytes of ciphertext, expected {self.expected_bytes}"


@dataclasses.dataclass(eq=False)
class SegmentAuthenticationError(ArtifactError):
    """One message for any authentication failure: which byte or which check is not told."""

    file: int
    segment: int

    def what(self) -> str:
        return f"file {self.file}, segment {self.segment}: does not authenticate"


@dataclasses.dataclass(eq=False)
class VolumeHeaderError(ArtifactError):
    """The LUKS2 header of the disk is not one that a volume may have, or not the one of the manifest."""

    next_step = "copy the volume to its disk again; if that is what was copied, somebody has changed the disk's header"
    field: Ident

    def what(self) -> str:
        return f"volume header: {self.field} is not allowed, or not the manifest's"


@dataclasses.dataclass(eq=False)
class VolumeAuthenticationError(ArtifactError):
    """A block of the volume is not the one that was sealed. Which one the kernel's log says."""

    next_step = "copy the volume to its disk again; if it fails again, seal it again"

    def what(self) -> str:
        return "encrypted volume: does not authenticate under the manifest's root hash"


class SealProblem(enum.Enum):
    MODEL_MISSING = "model folder cannot be read"
    EMPTY = "model folder has no files"
    BAD_PATH = "name is not one that every file system can hold"
    NOT_A_FILE = "neither a file nor a folder, or a link that leaves the model folder or names a folder"
    CHANGED = "file changed while it was read"
    INSIDE = "model folder, output folder and key file must not lie inside one another"
    NOT_A_LAYOUT = "output folder is not empty and not an OCI image layout"
    BAD_VALUE = "not a value the format can hold"
    BUSY = "another seal is writing to this output folder"
    SEALED_BEFORE = "this name and version are already in the output folder"
    KEY_EXISTS = "key file exists already"
    IO = "input or output failed"


@dataclasses.dataclass(eq=False)
class SealError(ArtifactError):
    """Nothing was sealed, nothing was left behind. `code` is the errno, 0 if there was none."""

    next_step = "correct the model folder, the name or the output folder, and seal again"
    problem: SealProblem
    where: Ident | None = None  # path of a file, or field of a document
    code: int = 0

    def what(self) -> str:
        at = f" {self.where}" if self.where else ""
        return f"seal{at}: {self.problem.value}" + (f" (errno {self.code})" if self.code else "")


@dataclasses.dataclass(eq=False)
class ManifestTooLargeError(ArtifactError):
    """For a registry; nothing was uploaded."""

    next_step = "keep this model in a folder, behind https or in an S3 bucket (keyturn seal --to DIR), or in fewer files"
    files: int
    manifest_bytes: int
    max_bytes: int

    def what(self) -> str:
        about = self.max_bytes * self.files // max(self.manifest_bytes, 1)
        return (
            f"manifest of {self.files} files has {self.manifest_bytes} bytes, registries take {self.max_bytes}: "
            f"about {about} files with paths like these"
        )


# --- memory -----------------------------------------------------------------------------------------------------------


class MemoryLimit(enum.Enum):
    AVAILABLE = "MemAvailable"
    CGROUP = "cgroup limit"
    DESTINATION = "destination file system"


@dataclasses.dataclass(eq=False)
class InsufficientMemoryError(AgentError):
    owner = Owner.OPERATOR
    step = Step.MEMORY
    next_step = "give the guest more memory, or raise the pod's memory limit"
    limit: MemoryLimit
    needed_bytes: int
    available_bytes: int

    def what(self) -> str:
        return f"model needs {self.needed_bytes} bytes of guest memory, {self.limit.value} leaves {self.available_bytes}"


class DestinationProblem(enum.Enum):
    NOT_MEMORY = "file system is not tmpfs"
    NOT_EMPTY = "directory is not empty"
    INODES = "file system has fewer inodes left than the model has files and folders"
    IN_USE = "directory is in use by another agent"
    MANY_FILES = "a memfd holds one file, the model has more"
    HELD = "a memfd stays while its server lives, and cannot be released"
    KERNEL = "kernel refused"
    MOUNT_POINT = "/run/keyturn cannot be made, or nothing can be mounted there in private"


@dataclasses.dataclass(eq=False)
class DestinationError(AgentError):
    """`code` is the errno for KERNEL and MOUNT_POINT, else 0."""

    owner = Owner.OPERATOR
    step = Step.MEMORY
    next_step = "choose a destination this guest can have: see `keyturn config explain artifact.destination`"
    problem: DestinationProblem
    code: int = 0

    def what(self) -> str:
        return f"destination: {self.problem.value}" + (f" (errno {self.code})" if self.code else "")


@dataclasses.dataclass(eq=False)
class SwapActiveError(AgentError):
    owner = Owner.OPERATOR
    step = Step.MEMORY
    next_step = "turn swap off in the guest, or use a kernel whose tmpfs has noswap (6.4 or newer)"

    def what(self) -> str:
        return "active swap could carry weights out of guest memory"


# --- receipt ----------------------------------------------------------------------------------------------------------


class ReceiptProblem(enum.Enum):
    """What `keyturn exec` and `keyturn verify receipt` find, in the order in which they look."""

    MISSING = "none lies beside the model"
    MALFORMED = "not a receipt of this format"
    SIGNATURE = "its signature does not verify"
    BINDING = "its evidence covers another key or another statement"
    EVENT_LOG = "its event log does not have the release that it says was measured"
    SIMULATED = "it is of simulated silicon, which the configuration does not allow"
    MODE = "it is not of a boot that left its model to another container"
    CONFIG = "it is of a guest with another configuration"
    FOLDER = "it is of another folder, or of another start of the guest"
    MODEL = "it is of another model, or of another key, than the configuration names"
    VERSION = "its model is older than the configuration allows"
    GUEST = "it is of another guest than this one"
    FILES = "the folder does not hold exactly its files"
    FILE_MODE = "a file or folder of the model may be written"
    MOUNT = "the folder is mounted so that it can be written"


@dataclasses.dataclass(eq=False)
class ReceiptError(AgentError):
    """A receipt is not the one that is wanted here, or what lies beside it is not what it says."""

    owner = Owner.OPERATOR
    step = Step.RECEIPT
    next_step = (
        "let `keyturn load` of the same configuration fill the folder in this pod, and mount it readOnly where the server runs"
    )
    problem: ReceiptProblem

    def what(self) -> str:
        return f"receipt: {self.problem.value}"


# --- agent and server -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class BootInterruptedError(AgentError):
    """Somebody asked for the end before the model server was ready."""

    owner = Owner.OPERATOR
    step = Step.AGENT
    next_step = "start the boot again; if nobody stopped it, raise the start-up timeout of pod or unit"
    signal: int

    def what(self) -> str:
        return f"boot interrupted by signal {self.signal}"


@dataclasses.dataclass(eq=False)
class WorkerLostError(AgentError):
    """The worker ended without an outcome. `signal` is the signal that killed it, 0 if it exited by itself."""

    owner = Owner.OPERATOR
    step = Step.AGENT
    next_step = "signal 9 is usually the kernel running out of memory: see the guest's kernel log and memory limit"
    signal: int
    status: int

    def what(self) -> str:
        return f"worker ended without an outcome: signal {self.signal}, status {self.status}"


@dataclasses.dataclass(eq=False)
class SupervisorLostError(AgentError):
    """Told by the guest's init: the supervisor ended without a last word. Fields as of WorkerLostError."""

    owner = Owner.OPERATOR
    step = Step.AGENT
    next_step = "signal 9 is usually the kernel running out of memory: see the guest's kernel log, and give the guest more"
    signal: int
    status: int

    def what(self) -> str:
        return f"supervisor ended without a last word: signal {self.signal}, status {self.status}"


class ServerError(AgentError):
    owner = Owner.DEVELOPER
    step = Step.SERVER
    next_step = "run the server command with the unsealed model on a development machine and compare"


@dataclasses.dataclass(eq=False)
class ServerStartError(ServerError):
    """The kernel refused to start the server. `code` is the errno."""

    code: int

    def what(self) -> str:
        return f"model server cannot be started: errno {self.code}"


@dataclasses.dataclass(eq=False)
class ServerExitedError(ServerError):
    """`status` is the exit status, `signal` the signal that killed it; one of them is 0."""

    status: int
    signal: int
    starts: int

    def what(self) -> str:
        how = f"by signal {self.signal}" if self.signal else f"with status {self.status}"
        return f"model server ended {how} after {self.starts} starts"


class Unready(enum.Enum):
    NO_ANSWER = "no answer on its port"
    FOREIGN_PORT = "another user listens on its port"
    HEALTH = "health check does not pass"
    MODEL = "expected model id is not served"
    PROBE = "health check passes, first request fails"


@dataclasses.dataclass(eq=False)
class ServerNotReadyError(ServerError):
    reason: Unready
    waited_s: int

    def what(self) -> str:
        return f"model server not ready after {self.waited_s} s: {self.reason.value}"


@dataclasses.dataclass(eq=False)
class ServerStuckError(ServerError):
    next_step = "restart the guest; a process that SIGKILL does not end usually waits for a GPU driver"
    processes: int

    def what(self) -> str:
        return f"{self.processes} processes of the model server survive SIGKILL"


@dataclasses.dataclass(eq=False)
class InternalError(AgentError):
    """A bug: an exception outside this tree. Only the place is told, never its text."""

    owner = Owner.KEYTURN
    step = Step.AGENT
    next_step = "please report this with the place and the version"
    place: Ident

    @classmethod
    def of(cls, error: BaseException) -> "InternalError":
        """For an exception outside this tree."""
        return cls(cls.place_of(type(error), error))

    @staticmethod
    def place_of(kind: type[BaseException] | None, error: BaseException | None) -> Ident:
        """File and line of our innermost frame and the type, never the text; what is not known is `unknown`."""
        place = "unknown"
        trace = error.__traceback__ if error else None
        while trace is not None:
            path = trace.tb_frame.f_code.co_filename.removesuffix(".py").split("/")
            if "agent" in path:
                place = f"{'/'.join(path[-2:])}:{trace.tb_lineno}"
            trace = trace.tb_next
        return Ident.of_peer(f"{place}:{kind.__name__ if kind else 'unknown'}")

    def what(self) -> str:
        return f"internal error at {self.place}"


def all_errors() -> dict[str, type[AgentError]]:
    """Every concrete class by its name."""
    found: dict[str, type[AgentError]] = {}
    todo: list[type[AgentError]] = [AgentError]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if dataclasses.is_dataclass(cls):
            found[cls.__name__] = cls
    return found


def error_to_record(error: AgentError) -> dict[str, object]:
    """`{"class", "owner", "step", "exit_status", "text", "next_step", "fields"}`: what status and logs show."""
    return {
        "class": type(error).__name__,
        "owner": error.owner.value,
        "step": error.step.value,
        "exit_status": error.exit_status,
        "text": error.what(),
        "next_step": error.next_step,
        "fields": to_record(error),
    }


def error_from_record(record: dict[str, object]) -> AgentError:
    """The error a worker reported over the socketpair.

    Raises:
        ValueError: the record is not one of `error_to_record`.
    """
    cls = all_errors().get(str(record.get("class")))
    fields = record.get("fields")
    if cls is None or not isinstance(fields, dict):
        raise ValueError("not an error record")
    error = from_record(cls, fields)
    assert isinstance(error, AgentError)
    return error

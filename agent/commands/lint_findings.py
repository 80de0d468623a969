"""The findings of `keyturn lint`: the closed set of what can be wrong with the manifest of a pod. Asks nothing itself."""

import enum
from dataclasses import dataclass

from agent.errors import AgentError, Owner, error_to_record

OWNER = Owner.OPERATOR
"""Who must act: a pod is the operator's, and so is every finding."""


class Rule(enum.Enum):
    """The class of a finding: its id, what is wrong, the next step."""

    YAML = (
        "yaml",
        "not YAML that is read here: plain data without anchors, aliases, tags and doubled keys, of bounded size",
        "write it out; `kubectl kustomize` does",
    )
    NO_POD = (
        "no-pod",
        "the file has no pod and no template of one",
        "give the rendered manifest of the workload",
    )
    NO_KEYTURN = (
        "no-keyturn",
        "no container executes `keyturn run`, `keyturn load` or `keyturn broker`",
        "make it the command, without a shell before it",
    )
    RUNTIME_CLASS = (
        "runtime-class",
        "not a RuntimeClass of Kata whose guest has a TEE",
        "take kata-qemu-snp, kata-qemu-tdx or their nvidia-gpu variants; debug classes have another measurement",
    )
    NO_TEE = (
        "no-tee",
        "a guest without a TEE: the whole stack and no protection; an agent refuses its sample evidence",
        "keep it to trying pods out",
    )
    GPU_CLASS = (
        "gpu-class",
        "the configuration wants GPUs, and this RuntimeClass passes none to the guest",
        "take kata-qemu-nvidia-gpu-snp or kata-qemu-nvidia-gpu-tdx",
    )
    ATTESTER = (
        "attester",
        "the configuration names an attester that a guest of this RuntimeClass does not have",
        'set tee.attester = "coco"',
    )
    REST_API = (
        "rest-api",
        (
            "CoCo's components in the guest answer no request for evidence: they serve resources alone until the guest's "
            "kernel is told otherwise"
        ),
        "set this annotation to agent.guest_components_rest_api=all; it is measured",
    )
    KERNEL_PARAMETERS = (
        "kernel-parameters",
        "the NVIDIA classes take no kernel parameter from a pod, and refuse one that brings any",
        "leave it out, and put agent.guest_components_rest_api=all into the configuration of the class",
    )
    IMAGE = (
        "image-digest",
        "the image is not pinned by digest: the registry decides what runs",
        "write name@sha256:…",
    )
    TOKEN = (
        "service-account-token",
        "a Kubernetes token is mounted; the agent needs none, and the guest's containers could use it",
        "set automountServiceAccountToken: false, and project none",
    )
    GRACE = (
        "grace-period",
        "the pod is killed before a report that is being made has ended: that can cost the guest its attestation key",
        "set terminationGracePeriodSeconds to 90 or more",
    )
    INITDATA = (
        "initdata",
        "the annotation is missing, or no guest would take its document",
        "make it with `keyturn initdata --config`, which also says what is wrong",
    )
    CONFIGURATION = (
        "configuration",
        "the initdata document has no entry keyturn.toml that an agent accepts",
        "see `keyturn config check`",
    )
    SOURCE = (
        "config-source",
        (
            "in a container of a Kata guest the configuration comes by --initdata: HOST_DATA and MRCONFIGID hold the "
            "document's digest"
        ),
        "give --initdata FILE, with the document of the annotation",
    )
    SOURCE_MOUNT = (
        "config-mount",
        "no volume brings the file of --initdata into the container",
        "mount a ConfigMap with the document there",
    )
    OTHER_DOCUMENT = (
        "other-document",
        "the ConfigMap has another document than the annotation: no byte of it would count",
        "make both from one file, as deploy/configure does",
    )
    MODE = (
        "mode",
        (
            "`keyturn run` serves as a container and needs [server]; `keyturn load` is an init container, and its "
            "configuration has artifact.destination = directory and no [server]"
        ),
        "see the two modes in deploy/README.md",
    )
    NAMESPACE = (
        "shared-namespace",
        "the containers of the pod see the processes of each other, or more of the machine than their pod",
        "leave shareProcessNamespace, hostPID, hostIPC and hostNetwork out",
    )
    PRIVILEGED = (
        "privileged",
        "root without limits in the guest: it reaches the model of every other container there",
        "leave it out, and add the capabilities that deploy/README.md names",
    )
    HOST_PATH = (
        "host-path",
        "files of the host come into the guest: it writes in them what it likes, and no evidence covers them",
        "leave the volume out; of a path below /dev Kata passes the guest's own",
    )
    USER = (
        "user",
        "the agent has to be root in its container: for the user of the server, for its mounts, for the model's group",
        "set runAsUser: 0 on this container, and no runAsNonRoot",
    )
    CAPABILITIES = (
        "capabilities",
        "the agent lacks a capability that it needs here: a boot ends with exit 13, 20 or 30, or pages are not locked",
        "add the capabilities that the base of this mode in deploy/ has",
    )
    READ_ONLY_ROOT = (
        "read-only-root",
        "the model is to lie in a tmpfs below /run/keyturn, which the agent cannot make in a root for reading only: exit 20",
        "set readOnlyRootFilesystem: false, or mount a memory emptyDir at /run",
    )
    ENVIRONMENT = (
        "environment",
        "`keyturn run` takes no variable of its container, and gives its server none of them",
        "write them into server.environment of the configuration, which is measured",
    )
    OUT = (
        "out",
        "the folder of `keyturn load` is not artifact.directory of the configuration",
        "write the same path in both",
    )
    ASKED = (
        "asked",
        "what the pod asks of `keyturn load` is no entry of artifact.allowed",
        "ask for one that is there, in every word, or add the entry",
    )
    MEMORY_VOLUME = (
        "memory-volume",
        "the folder of `keyturn load` is no memory emptyDir: plaintext would lie on a disk, and the agent refuses it",
        "mount emptyDir: {medium: Memory} there, whole: a subPath of it is a folder of the host",
    )
    NOT_SHARED = (
        "not-shared",
        "no other container mounts the folder with the model",
        "mount the volume in the server's container, readOnly",
    )
    READ_ONLY = (
        "read-only",
        "a container can write into the folder with the model: in this mode nothing else seals it",
        "set readOnly: true on the mount",
    )
    ROOT = (
        "root",
        "a root beside the model: modes of files do not keep it from writing, and nothing else does where a mount allows it",
        "set runAsUser to another than 0, or runAsNonRoot: true",
    )
    GROUP = (
        "fs-group",
        "nobody but root could read the model: its files are 0440 of the pod's group, and the pod has none",
        "set securityContext.fsGroup of the pod",
    )
    RECEIPT = (
        "receipt",
        "this server takes the model for what lies in the folder: it may be started without the init container",
        "start it with `keyturn exec -- SERVER …`, which looks at the receipt first",
    )
    DIR = (
        "dir",
        "--dir of `keyturn exec` is not where the folder with the model is mounted",
        "write the path of the mount, or mount the folder at artifact.directory",
    )
    GPU_LIMIT = (
        "gpu-limit",
        (
            "GPUs reach only a container that has as many nvidia.com/pgpu among its limits as gpu.count says, and "
            "GPUs that it does not say attest nothing"
        ),
        "set the limit of the container with the agent, and of the one that serves, to gpu.count",
    )
    GPU_NAME = (
        "gpu-resource",
        "not the name under which confidential GPUs are given out",
        "ask for nvidia.com/pgpu",
    )
    KERNEL_LOG = (
        "kernel-log",
        "the agent looks for fatal XIDs in the guest's kernel log, and this container does not have it",
        "mount hostPath /dev/kmsg at /dev/kmsg: Kata passes the guest's own",
    )
    MEMORY_LIMIT = (
        "memory-limit",
        "no memory limit that can be read: Kata sizes the guest by the limits",
        "set resources.limits.memory",
    )
    MEMORY = (
        "memory",
        (
            "the memory limits are too small for the model: it counts in the container that loads it and in the one "
            "that serves it, and a memory emptyDir gets half of the guest's"
        ),
        "raise the limits, or correct the size of the model",
    )
    SIZE = (
        "size-limit",
        "how large the model is stands nowhere: neither sizeLimit here nor --model-bytes",
        "set emptyDir.sizeLimit to it: Kata ignores it, this check does not",
    )
    HEALTH = (
        "health-port",
        (
            "the agent answers no probe: --health is missing, unreadable, or on the loopback, and the kubelet asks "
            "from outside the guest"
        ),
        "give --health=0.0.0.0:8081",
    )
    PROBE = (
        "probe",
        "the probe is missing",
        "see deploy/README.md: startup, readiness and liveness",
    )
    PROBE_EXEC = (
        "probe-exec",
        "Kata's default policy denies exec, so this fails always",
        "probe over HTTP or TCP; leave hooks out",
    )
    PROBE_GRPC = (
        "probe-grpc",
        "the kubelet's gRPC probe speaks no TLS, and the broker nothing else",
        "use tcpSocket",
    )
    PROBE_TARGET = (
        "probe-target",
        "the probe does not ask the agent's health port: /readyz for startup and readiness, /livez for liveness",
        "set httpGet path and port",
    )
    STARTUP = (
        "startup-window",
        "the pod is killed while its server may still be starting: the probe gives up before server.ready_timeout_s",
        "raise failureThreshold or periodSeconds",
    )
    SECRET = (
        "secret-mode",
        "others than root may read the private files, and the broker refuses such keys",
        "set defaultMode: 0400, and no fsGroup",
    )

    def __init__(self, id: str, text: str, next_step: str) -> None:
        self.id = id
        self.text = text
        self.next_step = next_step


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with one setting.

    Attributes:
        subject: the object, as `Deployment/model-server`; None where it is the file's.
        path: of the setting, as `spec.template.spec.containers[0].image`; where it belongs when it is missing.
        error: what a boot would end with, where that is known.
    """

    subject: str | None
    path: str
    rule: Rule
    error: AgentError | None = None

    def to_record(self) -> dict[str, object]:
        """`{"object", "path", "class", "owner", "text", "next_step"}`, with "error" where there is one."""
        record: dict[str, object] = {
            "object": self.subject,
            "path": self.path,
            "class": self.rule.id,
            "owner": OWNER.value,
            "text": self.rule.text,
            "next_step": self.rule.next_step,
        }
        return record if self.error is None else record | {"error": error_to_record(self.error)}

    def line(self) -> str:
        """For people, on one line."""
        why = "" if self.error is None else f" ({self.error.what()})"
        where = self.path if self.subject is None else f"{self.subject} {self.path}"
        return f"{where}: {self.rule.id}: {self.rule.text}{why} ({OWNER.value}); next step: {self.rule.next_step}"

"""The long form of every error: what happened, what to check, and what the guest will not tell.

Owns the texts that `keyturn explain` shows; who must act, step and exit status are facts of the class (`errors.py`). A text
is fixed and never built from data. Words in backquotes can be typed, and a test compares configuration keys, verbs and
options among them with what there is. Who changes when a class is raised changes its `happened` here. One file, however
long, for the reason `errors.py` gives: things are looked up on it. Standard library only.
"""

from dataclasses import dataclass

from agent import errors
from agent.errors import AgentError, Owner

ROLES = {
    Owner.OPERATOR: "runs the cluster: configuration, network, memory, pods",
    Owner.HOST: "owns machine and hypervisor: firmware, device state",
    Owner.AUTHORITY: "decides about keys: the broker and its policy",
    Owner.PROVIDER: "sealed the model",
    Owner.DEVELOPER: "chose the model server",
    Owner.KEYTURN: "us: a bug",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """The long form of one error class.

    Attributes:
        happened: when the agent says this, in two or three sentences.
        check: what the owner can do, likeliest first.
        withheld: what is not told, and why.
    """

    happened: str
    check: tuple[str, ...]
    withheld: str


EXPLANATIONS: dict[type[AgentError], Explanation] = {
    # --- configuration ------------------------------------------------------------------------------------------------
    errors.ConfigError: Explanation(
        "A configuration, or a file or option of a command, could not be read or does not fit the schema. In a boot the "
        "whole document is parsed before a device is opened. Unknown keys are errors too, because a key that is "
        "silently ignored could be one that should have protected something.",
        (
            (
                "`keyturn config check FILE` shows the same error without a boot; the text names the key, for syntax "
                "also the line."
            ),
            (
                "`keyturn config explain KEY` says what a key means and what it may hold; `keyturn config example` "
                "prints a whole configuration to compare with."
            ),
            (
                "A value that needs or excludes another key: `simulation.machine` belongs to a simulated attester, "
                "`artifact.directory` to `artifact.destination` = directory, and `artifact.unsafe_allow_swap` is "
                "refused with a real attester. `artifact.credentials_uri` needs a registry or bucket, over TLS or in this "
                "guest, and `artifact.manifest_digest`: what a tag means the store would have to say before it can be asked."
            ),
            (
                "`broker.key_uri` although it is well formed: the model at `artifact.source` was sealed for another key "
                "URI; `keyturn inspect` shows which."
            ),
            (
                "An address that cannot be listened on is `--health` of `keyturn run`, `keyturn.health=` on the kernel "
                "command line, `--listen` of `keyturn broker`, or `--wait-socket`: a path in a folder that is there, and at "
                "which nothing is. `proxy` is `--proxy`, and needs an https server to go to. "
                "In a guest, file-not-found means that ten seconds after the start there was neither initdata nor "
                "`/etc/keyturn/keyturn.toml`."
            ),
        ),
        "Only the key is told, never its value, and the parser's own text is dropped: a value can be a password in "
        "`server.environment`, and logs belong to the host.",
    ),
    errors.ConfigNotMeasuredError: Explanation(
        "The guest asked its own TEE for a report and compared HOST_DATA (SEV-SNP) or MRCONFIGID (TDX) in it with the digest "
        "of the configuration at hand. They differ, so somebody other than who launched the guest may have written this "
        "configuration. Nothing it says was acted upon, but that a connection to the broker may have been opened.",
        (
            (
                "`keyturn config check FILE` prints the HOST_DATA or MRCONFIGID of a file. It covers the exact bytes: a "
                "changed line end or a comment is another digest."
            ),
            (
                "With `--config` it is the SHA-256 of the file. With initdata it is the digest of the whole document by its "
                "own `algorithm`, not that of the entry in it. HOST_DATA has 32 bytes and MRCONFIGID 48: longer digests "
                "are cut, shorter ones zero-padded on the right."
            ),
            (
                "With `/etc/keyturn/keyturn.toml` of the image and no initdata the field must be all zero; with "
                "initdata about other things it is the digest of that initdata, whose disk must then be attached."
            ),
            (
                "On the host: QEMU's `host-data` of `sev-snp-guest` is base64 of the raw 32 bytes, `mrconfigid` of "
                "`tdx-guest` of the raw 48, not of their hexadecimal form."
            ),
            (
                "With `asked` the digest is not the question. KServe started `keyturn load` with this storage URI, "
                "`CONFIDENTIAL_RESOURCE_ID` or `CONFIDENTIAL_ENABLED`, and no entry of `artifact.allowed` says the same: "
                "the URI is compared whole, the resource id with the entry's `resource_uri` or else `key_uri`, and the last "
                "must be `true`. A pod cannot choose what the configuration does not name."
            ),
        ),
        "Neither digest is printed. The one in the report is a measured value, and whoever runs the guest has the "
        "configuration and can compute the other.",
    ),
    errors.ConfigConflictError: Explanation(
        "Two places hold a configuration, or two of them hold different initdata documents. One source decides and "
        "there is no order of preference, so that nobody has to guess which one the evidence of this guest stands for.",
        (
            (
                "The text names both: `kata-initdata` is the file that kata-agent writes, `initdata-device` a disk that "
                "begins with the initdata magic, `image` is `/etc/keyturn/keyturn.toml`."
            ),
            "`initdata-device` twice: two disks with different documents are attached; detach one.",
            (
                "`image` and an initdata source: take the entry `keyturn.toml` out of the initdata, or build the image "
                "without the file. Initdata about other things may stay."
            ),
        ),
        "Where the two differ is not told: both can hold secrets, and one of them is not the configuration of this guest.",
    ),
    errors.InitdataError: Explanation(
        "An initdata document was found, and it cannot be read as one or has no entry `keyturn.toml`. The guest does "
        "not go on without it: a document that was meant to decide must not vanish because it is damaged.",
        (
            (
                'The document is TOML with `version = "0.1.0"`, an `algorithm` out of sha256, sha384 and sha512, and a '
                "table `[data]` of strings."
            ),
            (
                "The Kata annotation is base64 of gzip of the document: `base64 -d | gunzip` must give it back, as one "
                "gzip stream with nothing behind it."
            ),
            (
                "On a disk: the 8 bytes `initdata`, the compressed length as 64 bits little endian, the gzip stream, "
                "zeros to 512 bytes. Not more than 1 MiB compressed and 4 MiB of document."
            ),
            (
                "`keyturn run --initdata FILE` reads a plain document outside a guest; on a machine without a TEE a "
                "good one for attester snp gets as far as NoAttesterError."
            ),
        ),
        "No part of the document is quoted: it can hold policies and credentials of other programs in this guest.",
    ),
    # --- the guest itself ---------------------------------------------------------------------------------------------
    errors.GuestInitError: Explanation(
        "As PID 1 of its own initrd the agent could not mount a file system, load a kernel module or set up a network "
        "interface; or, in any guest, the kernel would not say which routes there are. The text names the part and the "
        "errno.",
        (
            (
                "Kernel, initrd and command line must come from one build: compare them with its `SHA256SUMS`. A kernel "
                "module with errno 8 (ENOEXEC) or 129 (EKEYREJECTED) is one of another kernel."
            ),
            (
                "A mount with errno 19 (ENODEV): the kernel lacks the file system; it needs CONFIG_TMPFS, "
                "CONFIG_DEVTMPFS, CONFIG_CGROUPS and CONFIG_CONFIGFS_FS."
            ),
            (
                "Parameter `ip`: write `ip=ADDRESS::GATEWAY:NETMASK::DEVICE:off:DNS` with numbers only; there is no "
                "DHCP client, so `ip=dhcp` is refused."
            ),
            (
                "Interface `ip` with errno 19: no interface has the device name in `ip=`, or there is none at all; give "
                "the machine a virtio-net device."
            ),
            "Start once without `quiet` on the kernel command line and read the kernel's own lines above ours.",
        ),
        "The value of `ip=` is not repeated: it is the host's word, which could be anything. What kernel modules print "
        "stays in the kernel log.",
    ),
    errors.GuestUnfitError: Explanation(
        "`keyturn doctor` found that kernel, GPU driver or clock of this guest are none with which a boot could succeed. A "
        "boot itself does not look at versions: it would end where a device does not open or a certificate does not hold, with "
        "less to go by.",
        (
            (
                "Kernel: 5.19 or newer for SEV-SNP and 6.2 for TDX; 6.7 has configfs-tsm, which both should have. "
                "`uname -r` in the guest, not on the host."
            ),
            (
                "NVIDIA driver: the open kernel modules of 550 or newer, loaded before the agent starts "
                "(`/proc/driver/nvidia/version`); without them look for NVRM lines in the kernel log."
            ),
            (
                "Clock: a confidential guest takes the time from its host when it starts. Compare the host with a time "
                "server, or run one in the guest's image before the agent."
            ),
        ),
        "Versions and days are told as the guest's own kernel has them; nothing is held back.",
    ),
    # --- devices and evidence -----------------------------------------------------------------------------------------
    errors.NoAttesterError: Explanation(
        "The device that must give evidence is not there: no interface of the configured CPU TEE, no NVML library for "
        "the configured GPUs, or a GPU of an architecture that cannot attest. A driver that is late was waited for, "
        "`tee.wait_s` seconds. There is no fallback, since a guest that cannot prove what it is gets no key.",
        (
            (
                "Attester snp: the host must launch the machine as an SNP guest (QEMU: `-object sev-snp-guest` and "
                "`confidential-guest-support`); the guest's kernel log then says `Memory Encryption Features active: "
                "AMD SEV SEV-ES SEV-SNP`."
            ),
            (
                "Guest kernel with CONFIG_SEV_GUEST or CONFIG_TDX_GUEST_DRIVER, the driver loaded. Best is 6.7 or newer "
                "with CONFIG_TSM_REPORTS and configfs mounted, so that `/sys/kernel/config/tsm/report` exists; else "
                "`/dev/sev-guest` will do, or a port in `/etc/tdx-attest.conf`. TDX needs `/dev/tdx_guest` in either case."
            ),
            (
                "This guest is of another TEE: set `tee.attester` to the one it is of. Attester coco: api-server-rest must "
                "listen at `tee.coco_url`, and its attestation-agent must have found a TEE. Below a Hyper-V paravisor, as on "
                "Azure, neither device is the guest's; such machines are not supported."
            ),
            (
                "Attester nvml: the image needs `libnvidia-ml.so.1` of the driver in a system library folder or in Kata's "
                "extension `gpu`, or `gpu.count` must be 0. Attester nvml-architecture-N: only Hopper and Blackwell GPUs "
                "attest. `keyturn evidence` opens no GPU that no other process holds: start nvidia-persistenced first."
            ),
            (
                "A driver that loads late: raise `tee.wait_s`. Attester rtmr: `tee.runtime_measurement` is required; that "
                "takes a TDX guest with Linux 6.16 or newer, its sysfs writable, and no event log of CoCo's attestation agent "
                "(`/run/attestation-agent/eventlog`). Else set it to if-supported."
            ),
        ),
        "Nothing is held back here. Which paths were tried stands in `agent/evidence/detect.py` and `agent/evidence/gpu.py`.",
    ),
    errors.SimulationRefusedError: Explanation(
        "Simulated silicon was asked for where it has no place: beside a real TEE device, or in an installation without "
        "simulators. Or the broker's verdict says that it was reached over simulated evidence, and the configuration "
        "does not allow that. Whoever counts on a real device must never get a simulated one in its place.",
        (
            "For real work set `tee.attester` to snp or tdx and take the section with `simulation.machine` out.",
            (
                "A real TEE device exists: `/dev/sev-guest`, `/dev/tdx_guest` or `/sys/kernel/config/tsm/report`. "
                "Simulate on a machine that has none of them."
            ),
            (
                "No simulators: the shipped bundle and initrd leave them out by design. Run from a checkout, as "
                "`keyturn demo` does."
            ),
            (
                "No FUSE: a configfs-tsm is simulated as a FUSE file system, which takes the kernel's module `fuse` "
                "(`modprobe fuse`) and root, or a kernel that lets ordinary users make user namespaces. A container needs "
                "the device `/dev/fuse`, and as root CAP_SYS_ADMIN. No package is missing."
            ),
            (
                "The verdict is simulated on real hardware: the broker runs with `--unsafe-simulation-roots` and is not "
                "the one for this guest. Only for boot tests set `broker.allow_simulated`."
            ),
        ),
        "Nothing is held back: that something is simulated is always said, in status, events, tokens and audit log.",
    ),
    errors.GuestApiError: Explanation(
        "The agent reaches this guest's TEE through CoCo's api-server-rest, and a request to it gave nothing that can be used. "
        "The text names the request, what was wrong, and the HTTP status. Nothing is asked twice: the attestation-agent behind "
        "it makes five attempts of its own, and a container that ends is started again by Kubernetes.",
        (
            (
                "not-served, or without a needed feature: the guest's kernel command line needs "
                "`agent.guest_components_rest_api=all`; Kata's default serves resources alone. An old server also lacks info."
            ),
            (
                "evidence took the text for the data: guest-components before `encoding=base64` of their REST API put the "
                "spelling into the report instead of what it spells. Use a newer guest image."
            ),
            (
                "token failed: the attestation-agent got no token. Its log says why; the key broker service of the guest's "
                "aa.toml is not reachable from this guest, speaks another version, or refused the evidence."
            ),
            (
                "connection ended, no answer, or nothing listens: api-server-rest or attestation-agent has died, and "
                "kata-agent does not start them again. `tee.coco_url` must be where this guest's server listens."
            ),
        ),
        "The text of a failed answer is not read, and so never shown: the components put into it what they were told by peers.",
    ),
    errors.KeyNotDeliveredError: Explanation(
        "The guest's confidential-data-hub was asked for the model key, after the verdict and the GPU gate, or before it for "
        "the store's credentials, and gave none, or nothing of the right length. It names no cause. What is known: the "
        "attestation-agent had got a token shortly before, so the key broker service could be reached and had accepted the "
        "evidence.",
        (
            (
                "The service's resource policy denied: its log says so for this guest. Trustee's default policy denies sample "
                "evidence, and a stricter one whatever the token does not affirm."
            ),
            (
                "There is no resource of the name in `broker.key_uri`, or it does not hold exactly the 32 bytes of the key. "
                "Before the gate it is `artifact.credentials_uri` that was asked for."
            ),
            (
                "The url in cdh.toml and in aa.toml of the initdata must be of the same service, and so must be the "
                "certificates beside them."
            ),
        ),
        "Nothing of an answer that is no key is read, and a key of another length is never told apart from other bytes.",
    ),
    errors.DeviceError: Explanation(
        "Kernel, TEE firmware or GPU driver refused a call. `code` is an errno for configfs-tsm, sev-guest, tdx-guest, rtmr, "
        "event-log and kernel-parameters, a firmware status for sev-firmware, the hypervisor's for ghcb, of qgs from 0x12001 "
        "on the quote service's, the own codes of nvml and nscq, an HTTP status for api-server-rest. It is final: a second "
        "try can latch a GPU or cost an SNP guest its attestation key.",
        (
            (
                "configfs-tsm or a device node with code 1 or 13: the agent is not root, or its container has them read-only. "
                "rtmr: the release of the key did not get into RTMR 3; at read-back something else in this guest extends it "
                "too. event-log at write: `/run/keyturn` must be writable memory."
            ),
            (
                "configfs-tsm with code 22 at outblob, or sev-firmware: look for `sev-guest` lines in the guest's kernel "
                "log, then update firmware and kernel of the host. Status 22 is a privilege level below the guest's own."
            ),
            (
                "qgs: the quote service of the host refused; its own log says why. Mostly the platform is not "
                "registered, or the service is older than the guest's kernel."
            ),
            (
                "nvml: look the number up in `nvmlReturn_t` of `nvml.h`; 9 means that the driver is not loaded, 15 that the "
                "GPU fell off the bus. At nvmlInit NVRM lines in the guest's kernel log say why: `confidential compute "
                "capability is not enabled` (set its mode on the host), `expects LKCA but found stubs` (the image's kernel "
                "lacks crypto), `Session establishment failed`, `RmInitAdapter failed` (reset the GPU)."
            ),
            (
                "nscq with code 1: the image's libnvidia-nscq is not of the driver's version. After any other failure restart "
                "the guest; if it fails again, take the machine out of service."
            ),
        ),
        "Only numbers and names of calls are told. What the driver prints or returns as text can be chosen by the host.",
    ),
    errors.DeviceUnavailableError: Explanation(
        "The CPU TEE could not give evidence, and was asked again as often as its interface allows. With SNP something in "
        "the guest got in the way before the firmware was asked. With TDX the host's quote service failed, timed out or "
        "gave an empty quote: four requests with growing pauses, or as many as fit into 105 seconds.",
        (
            (
                "configfs-tsm with code 11, 2 or 17: another program in this guest writes into our requests; "
                "`tee.attester` is for one program at a time. Code 12: the guest is out of memory."
            ),
            (
                "configfs-tsm with code 16 (EBUSY): the host still owns the last quote. With 5, 61 or 110 the service "
                "failed: see that `qgsd` runs on the host, and that QEMU has its `quote-generation-socket`."
            ),
            (
                "qgs with code 111 or 110: nothing listens at the vsock port that the image's `/etc/tdx-attest.conf` "
                "names, or it is too slow; 104: it hung up, as an old service does over what it cannot read."
            ),
            "Boot again when the host is mended; nothing in the guest is lost by a request that failed so.",
        ),
        "Only numbers and names of calls are told. What a quote service writes into its answer is the host's word.",
    ),
    errors.AttestationKeyLostError: Explanation(
        "A request to the SNP firmware ended in a way after which its key (VMPCK) may not be used again, so the kernel "
        "gave it up; or that had happened before and every request ends with code 25 (ENOTTY). No evidence can be had "
        "from this guest until it is started again.",
        (
            (
                "Restart the guest. If it happens again, the guest's kernel log has a line with `Disabling VMPCK` and "
                "above it what firmware or hypervisor said."
            ),
            (
                "Code 110 (ETIMEDOUT), or ghcb with code 2: the host throttled this guest. Look for other programs in the "
                "guest that ask for reports. A guest kernel before 6.3 loses its key the first time; take a newer one."
            ),
            (
                "Was a process that asks for reports killed in the middle? Give pods a termination grace period of 90 s, "
                "so that `keyturn run` can wait for its request."
            ),
            "sev-firmware or ghcb with another code, and code 5 or 74: the host must look at firmware and hypervisor.",
        ),
        "Only numbers and names of calls are told. The kernel log of the guest has more; it can hold what the host chose.",
    ),
    errors.MalformedEvidenceError: Explanation(
        "A report, a certificate chain or the bundle of GPU evidence does not have the layout its specification gives "
        "it: a length, a version or a reserved bit is wrong. A verifier would refuse it, so it is not sent.",
        (
            (
                "snp-report: compare the version and the guest's firmware level with what this agent reads (versions 2 "
                "to 5); very new firmware can be ahead of us."
            ),
            (
                "snp-certificate-chain: the table the host supplies with the report is broken. Have it made again "
                "(`snphost import` and the hypervisor's certificate option) or supply none, and give the certificates "
                "to the broker with `--endorsements`."
            ),
            (
                "nvidia-report and nvidia-certificate-chain: update VBIOS and driver to versions that NVIDIA lists for "
                "confidential computing."
            ),
            (
                "cc-event-log: the ACPI table CCEL that the host's TDX firmware left is no event log, or one of more than "
                "256 KiB without its padding; `keyturn verify event-log` looks at it alone. Update the TD's firmware."
            ),
            "Report the format, the field and both numbers of the text to us together with the firmware and driver versions.",
        ),
        "Evidence bodies are never logged. A report holds chip identity and measured values, and a malformed one holds "
        "whatever the host put there; only lengths and single field values are told.",
    ),
    errors.EvidenceBindingError: Explanation(
        "A device answered with a well-formed report over other data than the agent handed in. The report was made for "
        "somebody else, is a replay, or the driver mixed up two requests. For a verifier it would prove nothing about "
        "this boot.",
        (
            "Look for a second program in the guest that asks for reports of the same device at the same time, and stop it.",
            (
                "snp-report: the guest kernel must be 6.7 or newer without patches to `drivers/virt/coco`; restart with "
                "a distribution's own."
            ),
            "nvidia-report: reset the GPU on the host, restart the guest, and compare with another driver version.",
            "If it happens again on the same machine and not on another, treat the machine as hostile.",
        ),
        "Neither the data asked for nor the data received is printed: the first holds the broker's nonce and our public "
        "key, and the second is a stranger's.",
    ),
    errors.EvidenceVerificationError: Explanation(
        "In a guest: the evidence of a GPU is not signed by the key whose certificate came with it, so it is not sent. "
        "The whole appraisal with chains, dates and patch levels is the broker's, which refuses with "
        "KeyReleaseDeniedError and the same words, and that of `keyturn verify`, which ends with the first check that "
        "does not hold.",
        (
            (
                "`keyturn verify`: certificate-chain also means that a certificate is missing, and certificate-validity "
                "that evidence is older or newer than its certificates; it can be told another time than now."
            ),
            (
                "revocation: AMD or Intel took the chain back, so move the guest to another machine. The other words with "
                "revocation are about a list: fetch it anew from its issuer, a broker's into the folder of `--amd-crls`."
            ),
            "Reset the GPU on the host and start a new guest.",
            "Compare VBIOS and driver with versions that NVIDIA lists for confidential computing (`nvidia-smi -q`).",
            "Boot the same image on another machine: if it passes there, take this one out of service.",
        ),
        "Neither certificates nor serial numbers are told, because they identify one chip. The text names the one check "
        "that did not hold.",
    ),
    # --- GPU ----------------------------------------------------------------------------------------------------------
    errors.GpuCountError: Explanation(
        "The guest does not have exactly as many distinct GPUs as `gpu.count` says, or NVSwitches as `gpu.switches` says: one "
        "is missing, extra, listed twice, of another architecture than `gpu.architecture`, or two of them sign their evidence "
        "with the same key. A device that is not in the evidence could read what is sent to it, so more than expected is as "
        "wrong as fewer.",
        (
            (
                "On the host: `lspci -d 10de:` and the devices that are bound to vfio-pci; then what the pod or machine "
                "was given."
            ),
            (
                "Do the measured `gpu.count`, `gpu.switches` and `gpu.architecture` fit this kind of machine? A change to "
                "them is a new HOST_DATA or MRCONFIGID."
            ),
            (
                "Fewer than given: look for NVRM lines in the guest's kernel log; a GPU whose driver failed to start is "
                "not counted."
            ),
            "As many as given and still too few: two share an identity. Do not use the machine.",
        ),
        "UUIDs and certificates of GPUs are not printed, since they identify hardware of this host; two numbers are "
        "enough to act.",
    ),
    errors.GpuModeError: Explanation(
        "A GPU is in a mode in which it protects nothing, or in one this agent does not know: confidential computing "
        "off, devtools on, an environment other than production, or a registry key of the driver that weakens the "
        "protection; or persistence mode is off, so that the GPU would be lost when the boot's own process closes it. It was "
        "read before attestation, and again at the GPU gate.",
        (
            (
                "On the host: `nvidia_gpu_tools.py --query-cc-mode`, then `nvidia_gpu_tools.py --set-cc-mode=on "
                "--reset-after-cc-mode-switch`, for each GPU. The mode devtools is for debugging only."
            ),
            (
                "In a guest with a shell: `nvidia-smi conf-compute -f` (feature), `nvidia-smi conf-compute -d` "
                "(devtools) and `nvidia-smi conf-compute -e` (environment)."
            ),
            (
                "Registry keys: take RmConfidentialCompute and RmConfComputeSpdmPolicy out of the kernel command line "
                "and of the image's modprobe options; `/proc/driver/nvidia/params` shows what the driver has."
            ),
            (
                "Persistence mode: the image must start nvidia-persistenced and wait until it says that its services are "
                "initialised, before the agent. A confidential GPU initialises once per reset; after this failure it needs "
                "one, so restart the guest and not only its container."
            ),
            (
                "Multi-GPU mode: all GPUs of one guest need the same mode (single, protected PCIe or NVLE), set on the "
                "host together. Protected PCIe goes with `gpu.switches` = 4 in the configuration, and no other mode does. "
                "There each NVSwitch must be locked (3) before the agent starts, after the fabric manager: until then its "
                "setup can still change."
            ),
        ),
        "How a registry key is set is not repeated, only how many were found: the kernel command line is the host's text.",
    ),
    errors.GpuFaultError: Explanation(
        "The GPUs were acceptable and something happened to them: a fatal XID or a confidential-computing fault stands "
        "in the kernel log, they changed between attestation and gate, or the ready state is not what was set. Before the "
        "gate the key was not opened; while the model was served, the server was stopped and its memory freed.",
        (
            (
                "Fatal XID: the number in brackets is in NVIDIA's Xid catalog (48, 94, 95 and 140 are memory errors, 79 "
                "is a GPU off the bus, 119 and 120 are its firmware). Reset the GPU on the host, then start a new "
                "guest."
            ),
            (
                "Inventory changed: nothing may attach, detach or reset a GPU while a guest boots; look at the host's "
                "device plugin."
            ),
            (
                "Ready state not set: with `gpu.ready_state` = preset the image's init must run `nvidia-smi "
                "conf-compute -srs 1` before the agent starts. With own, something took the state back or the driver "
                "ignored it."
            ),
            (
                "Ready state fell back while the model was served: the driver took it back because its encrypted session "
                "with a GPU is over, after a failed rotation of keys, a lost heartbeat or a failed report. Nothing sets it "
                "again: the GPUs need a reset and a new guest. An Xid near that time in the kernel log says more."
            ),
            "Kernel log not readable: the agent needs `/dev/kmsg`, and CAP_SYSLOG where `kernel.dmesg_restrict` is 1.",
        ),
        "The lines of the kernel log are not copied, only the XID: the log holds text of devices that the host controls.",
    ),
    errors.VmRestartRequiredError: Explanation(
        "The GPU ready state was 1 before this boot had attested anything, so somebody has already passed the gate in "
        "this machine. The state is never set back and one machine gets one gate. A second boot in the same machine "
        "cannot know what ran on the GPUs in between.",
        (
            (
                "Delete the pod or power the machine off, so that a new guest is launched; a restart of the container "
                "alone keeps the machine."
            ),
            (
                "Set `restartPolicy: Never` for the pod, or `Restart=no` as in our unit, so that a failed boot is not "
                "tried again in the same machine."
            ),
            (
                "If the image's own init sets the state (stock Kata does), configure `gpu.ready_state` = preset; the "
                "authority's policy row must then say `ready = true`."
            ),
            (
                "`keyturn doctor` says this beside an agent that serves: that agent passed the gate. Nothing is wrong "
                "before the next boot, which needs a new machine."
            ),
            "In an image with a shell `nvidia-smi conf-compute -grs` shows the state.",
        ),
        "Who set the state is not told because the driver does not say: it keeps one bit.",
    ),
    errors.EvidencePrecheckError: Explanation(
        "The evidence is there, and a Trustee attestation service would refuse it or its usual policies would, with an answer "
        "that names no reason. So it was not sent. How a guest was launched stands in its report and cannot be changed "
        "from inside.",
        (
            (
                "VMPL: below a paravisor or an SVSM the guest does not run at VMPL 0, and Trustee's SNP verifier takes no "
                "other level."
            ),
            (
                "debug bit: the host may read such a guest's memory. Launch it with a policy that forbids debugging (SNP "
                "policy bit 19, TD attributes bits 0 to 7)."
            ),
            (
                "report version: 2 is of old SEV firmware, which the host can update; above 5 is newer than Trustee's "
                "verifier knows. `keyturn evidence` shows the report of this guest."
            ),
        ),
        "Only the one field is told. The rest of a report describes the host's machine, and the host's log is not the place "
        "where somebody else should find it.",
    ),
    # --- broker -------------------------------------------------------------------------------------------------------
    errors.NoRouteError: Explanation(
        "The local checks passed, and then the guest had no route out within `broker.route_timeout_s`. In a Kata guest "
        "the network comes only after kata-agent, elsewhere from the image's init or from `ip=`. The broker was not "
        "asked.",
        (
            "0 network interfaces: the machine has no network device, or its kernel has no virtio_net.",
            (
                "1 or more: they are there without a route. Stand-alone guest: "
                "`ip=ADDRESS::GATEWAY:NETMASK::DEVICE:off:DNS` on the kernel command line; without GATEWAY there is no "
                "default route."
            ),
            (
                "Kata: the sandbox's network plugin (`kubectl describe pod`) and the order of units: ours must be ready "
                "before kata-agent, and must not wait for network-online."
            ),
            (
                "A slow network: raise `broker.route_timeout_s`. A broker inside the guest (an address on the loopback) "
                "needs no route."
            ),
        ),
        "Names and addresses of interfaces are not printed; the host gave them and knows them.",
    ),
    errors.BrokerUnreachableError: Explanation(
        "No address in `broker.endpoints`, or `broker.url`, gave an answer within `broker.timeout_s`, retries included. The "
        "reason told is the last one. It is about the way to the broker and not about evidence: nothing was denied.",
        (
            (
                "Connection refused: `keyturn broker` is not running or listens elsewhere; compare its `--listen` with "
                "`broker.endpoints`."
            ),
            (
                "Name does not resolve: the guest's name servers come from its init or from the two last fields of "
                "`ip=`; or configure addresses, since `broker.server_name` alone says who must answer."
            ),
            (
                "No answer in time: firewall, network policy or a missing route; from the same network `openssl "
                "s_client -connect HOST:PORT` must show a certificate."
            ),
            (
                "Connection lost: a proxy in between that ends TLS or does not speak HTTP/2. The connection must reach "
                "the broker unopened. The proxy makes no connection: that of `--proxy` or `keyturn.proxy=`; the number is "
                "its answer's status, and without one it is not there or is no proxy. It must allow CONNECT to the port "
                "without a password (407); a 4xx is not asked for again."
            ),
            (
                "Broker asked to come back later: more guests ask at one time than it serves (OVERLOADED in its audit "
                "log). Add replicas, or start fewer guests at once. Server error, with `broker.url`: the KBS or a proxy "
                "before it answers 5xx; its log says why."
            ),
        ),
        "Which address failed is not told, and no text of a peer: everything between guest and broker can write such a text.",
    ),
    errors.BrokerIdentityError: Explanation(
        "Something answered at the broker's address, and it is not the broker that was measured: its certificate leads "
        "to another CA, carries another name, is expired or not yet valid, or the TLS handshake failed. No evidence was "
        "sent to it, and another try would not help.",
        (
            (
                "`openssl s_client -connect HOST:PORT -servername NAME -showcerts` and compare the issuer with "
                "`broker.ca_pem` and the DNS names with `broker.server_name`."
            ),
            (
                "Expired: the certificate that `keyturn broker init` makes ends after a year; sign a new one with its "
                "`ca.key`. The CA stays, and so does the configuration."
            ),
            (
                "Not yet valid, or expired although its dates are good: this guest's clock is wrong, and its host sets "
                "it; compare the host with a time server. `keyturn doctor` says so, without asking anybody, when it is "
                "outside the life of `broker.ca_pem`."
            ),
            (
                "A name in the CN alone does not count; it must be a subject alternative name. A proxy that ends TLS is "
                "somebody else."
            ),
        ),
        "Nothing of the foreign certificate is shown: a stranger wrote it, and logs must not carry a stranger's text.",
    ),
    errors.ClockSkewError: Explanation(
        "Something that the broker dated while this guest waited for it bears another time than the guest's clock. With "
        "Trustee that is its token, which lives five minutes, or the answer before it. No key was asked for: such a token "
        "would be over, or not yet valid, on one of the two sides.",
        (
            (
                "ahead: positive seconds mean that this guest is in the future, negative ones that it is in the past. A "
                "guest gets its time from its host; look at the host's clock and its time service first."
            ),
            (
                "If the guest is right, the clock of the attestation service (or of the KBS) is wrong, and every guest says "
                "so: compare both with a time server."
            ),
            (
                "Years: a host that starts guests with a fixed clock, or a machine without a battery. `keyturn doctor` "
                "compares the clock with the life of `broker.ca_pem` without asking anybody."
            ),
        ),
        "The two times are not shown, only how far they lie apart: nobody needs more to mend it.",
    ),
    errors.TrusteeRefusedError: Explanation(
        "A Trustee KBS (at `broker.url`, or behind a relay) ended the handshake with a refusal that is not its policy's. A KBS "
        "answers 401 to nearly everything; what its answers tell apart is told here, with what mends it. Three of them may "
        "pass by themselves and were tried three times, the others once.",
        (
            (
                "Attestation refused: the only answer a KBS has for wrong evidence, wrong reference collateral, an expired "
                "session and an attestation service that is down. The log of the attestation service has the whole cause."
            ),
            (
                "Session or token: replicas of a KBS need one session store. [attestation_token] of the KBS must trust the "
                "key that signs the tokens; its `insecure_header_jwk` is for tests alone."
            ),
            (
                "No key, path, plugin or administrator: `kbs-client set-resource` stores the key under `broker.resource_uri` "
                "(default `broker.key_uri`); 32 raw bytes, as `keyturn seal` wrote them. The policy had let this guest through."
            ),
            (
                "First request or challenge: the KBS knows this kind of TEE only if it was built with its verifier, and a "
                "challenge needs its session store and its attestation service."
            ),
            (
                "Too large: raise payload_request_size (2 MiB by default). Policy that cannot be evaluated, or a part that "
                "failed: the KBS's own log, at the time of this request. Its wire has no request id; a relay's "
                "audit log has it, with the same word as TRUSTEE_."
            ),
        ),
        "The text of the KBS is not repeated: it is a peer's, and in these cases always the same few words.",
    ),
    errors.RemoteProtocolError: Explanation(
        "The broker answered with something that the protocol does not allow at this point: out of order, malformed, "
        "too large, with another request id, or in another version. `state` is where the handshake was, for example "
        "AWAIT_CHALLENGE.",
        (
            "`keyturn --version --json` on both sides: `protocol` must be the same.",
            (
                "Protocol version not supported right at the start: a gRPC server answers at this address that is no "
                "key broker; check `broker.endpoints`, also for a proxy with routes by path."
            ),
            (
                "`keyturn status` shows the request id; its line in the broker's audit log has what the broker saw, as "
                "PROTOCOL_ and a word."
            ),
            (
                "Stream ended before the answer: the broker was stopped or killed in the middle; see its stderr for an "
                "error line."
            ),
            (
                "With `broker.url`: the version told is the KBS's, and `broker.protocol_version` must be the same; on a "
                "redirect or a foreign answer a proxy or another server answers. More challenges than are answered: the broker "
                "took the evidence ten times without a verdict, or they ran out before the devices had answered."
            ),
        ),
        "The offending message is not shown and not kept: before a verdict verifies, the peer is only a TLS name.",
    ),
    errors.BrokerFailureError: Explanation(
        "The broker was reached and ended the request with a failure: it could not do its part. Nothing was denied. The "
        "reason is one word of the broker's, and `status` the gRPC code. Status 14 was tried again until "
        "`broker.timeout_s` was over; anything else needs somebody to mend it and was not.",
        (
            (
                "`keyturn status` shows the request id; its line in the broker's audit log has the same reason. INTERNAL "
                "is a bug of the broker, and its stderr has the place. Status 3 (PROTOCOL_): it refused a message of "
                "ours; compare versions."
            ),
            (
                "KEY_NOT_FOUND: there is no file for `broker.key_uri` below the folder of `--keys`; install it with the "
                "command that `keyturn seal` printed. CREDENTIALS_NOT_FOUND, CREDENTIALS_FILE: the same for "
                "`artifact.credentials_uri`, where one JSON object must lie; see `keyturn explain StoreCredentialsError`."
            ),
            (
                "KEY_FILE_MODE, KEY_FILE_OWNER, KEY_FILE_TYPE, KEY_FILE_LENGTH, KEY_FILE_OUTSIDE_STORE: a regular file "
                "of 32 bytes or with a Tink JSON keyset, mode 0600, of root or the broker's user, and no link out of the "
                "folder. KEY_VERSION_FILE: `.TAG.version` beside it must hold one decimal number from 1."
            ),
            (
                "AUDIT_LOG: the file of `--audit` cannot be written, most often a full disk; nothing is decided that "
                "cannot be recorded. KEY_STORE_IO: the folder of `--keys` cannot be read; mend the volume below it, and "
                "guests that still wait get their key. UPSTREAM_: the broker is a relay, and the KBS behind it was not reached "
                "(14), is not the one of `--upstream-ca`, or answers what this wire cannot carry: see the relay's stderr."
            ),
            (
                "Status 16: the broker does not accept a verdict that this guest has verified (TOKEN_ and the check). "
                "All replicas need the same `--token-key` and one clock; TOKEN_EXPIRED without either: the key was "
                "asked for later than 300 seconds after the verdict."
            ),
        ),
        "The broker's text is dropped and only its reason word is kept. The guest learns no more of the key store than "
        "that, so neither does the guest's host.",
    ),
    errors.KeyReleaseDeniedError: Explanation(
        "The broker's policy says no: to the evidence, or later to the key when the policy changed in between. The text "
        "names the first claim that did not hold, the id of the reference value it was compared with, and the version "
        "of the policy. A denial is final for this boot.",
        (
            (
                "Find the request id (`keyturn status`) in the audit log; it has the same claim, reason and policy version. "
                "With `broker.url` the claim is the worst that the token says (device, claim, meaning, value; the events "
                "have the others), or resource-policy where it affirms everything: then the policy asks for something else."
            ),
            (
                "`reference-value`: the policy row for this key says nothing about that claim, and what a row leaves "
                "out is denied. Add the value on purpose. With policy.credentials_uri the row must name what stands in "
                "`artifact.credentials_uri`, and no other."
            ),
            (
                "`claim` with snp.measurement or snp.host_data, tdx.mr_td, tdx.rtmr or tdx.mr_config_id: a new image or a "
                "new configuration. `keyturn config check` prints HOST_DATA or MRCONFIGID; after the change send SIGHUP to "
                "the broker. With policy.tee: the row is for guests of the other TEE. tdx.rtmr_3 when a lease is renewed: the "
                "release was measured, so take the register out of the row."
            ),
            (
                "`claim` with snp.tcb or tdx.tee_tcb_svn: the host's firmware or TDX module is below the row's minimum; have "
                "it updated rather than lower the value. With tdx.tcb: the platform's TCB status is none that `tcb` lists; "
                "a broker without `--tdx-collateral` evaluates none, so there the row must list not_evaluated, on purpose."
            ),
            (
                "`collateral`: certificates are missing, foreign or out of date; supply AMD's with `--endorsements`. "
                "`device`: a report does not verify; that is the host's; event-log.rtmr: the TD's log is not that of its "
                "registers; restart the guest, and look for what else extends them. `policy`: no row, revoked, or past "
                "`not_after`; with token.policy_version the policy was replaced after the verdict, so boot again."
            ),
        ),
        "Neither the measured nor the expected value is told. Whoever is denied must not learn from the guest what "
        "would have been accepted; the authority has both.",
    ),
    errors.TokenError: Explanation(
        "The broker said yes, and its signed verdict does not hold: not signed by a key in `broker.token_keys`, out of "
        "its time, for another boot, key or nonce, or with claims this version does not know. The guest trusts the "
        "signature and not the connection, so it stops.",
        (
            (
                "signature: compare `broker.token_keys` with the public half of the broker's `--token-key`; to change "
                "the key, configure old and new first, then change the broker."
            ),
            (
                "expiry or not-before: compare the clocks of guest and broker. A broker may be 60 seconds ahead; an old "
                "verdict gets no allowance."
            ),
            "claims or algorithm: broker and agent are of different versions; compare `keyturn --version --json`.",
            (
                "nonce, tee-pubkey or key-uri: the verdict is one of another request. Look for a proxy or cache between "
                "guest and broker, and treat it as an attack until explained."
            ),
            (
                "launch digest, with `broker.cdh`: the token is about a guest with other initdata. tee-pubkey: the "
                "attestation-agent's tee_key_algorithm must be its default, a P-256 key."
            ),
        ),
        "The token is not logged, not even in parts: until it expires it lets its holder ask for a key, although sealed "
        "to this guest.",
    ),
    errors.KeyUnwrapError: Explanation(
        "The sealed key arrived and cannot be opened with the key pair of this boot, which exists in this process only. "
        "It was sealed for another boot, changed on its way, or made by a broker of another kind. No key material was "
        "used.",
        (
            "Look up the request id in the audit log: was there exactly one release for it?",
            (
                "key wrap or content authentication: look for several broker replicas behind one name and for a proxy "
                "that repeats answers; the release must belong to the verdict before it."
            ),
            (
                "JWE format, algorithm or ephemeral key: the broker must answer with ECDH-ES+A256KW and A256GCM on "
                "P-256, with no further members."
            ),
            (
                "key length: the stored key is shorter than 32 bytes or longer than a keyset; a model key is 32 raw bytes, "
                "neither hexadecimal nor base64, or a Tink JSON keyset."
            ),
            (
                "keyset: what is not 32 bytes must be a Tink JSON keyset, in clear, of one key, enabled and primary, of the "
                "template AES256_GCM_HKDF_1MB (`tinkey create-keyset --key-template AES256_GCM_HKDF_1MB`)."
            ),
        ),
        "Only the check is named. A text about bytes would be an oracle for whoever sends altered keys.",
    ),
    errors.KeyMismatchError: Explanation(
        "The key came and opened, and it is not the one this model was sealed with: the manifest holds a commitment to "
        "its key and they differ. This is found before a segment is touched, so the model itself is not in doubt.",
        (
            (
                "Under `broker.key_uri` the broker must hold the key file that `keyturn seal` wrote for this very "
                "version (NAME-vN.key)."
            ),
            "`keyturn inspect SOURCE --check --key-file K` says whether a key file and a sealed model belong together.",
            (
                "A model that was sealed again with a new key: store the new key, or set `artifact.manifest_digest` to "
                "the manifest of the old one."
            ),
            'With `artifact.format = "kserve-jwe"`: a file\'s content key was not wrapped with the key that came.',
        ),
        "Nothing about the key that came is told, not even its version: logs belong to the host. The commitment stands "
        "in the manifest.",
    ),
    errors.LeaseUnsupervisedError: Explanation(
        "The key's authority gives it for a limited time, and the configuration has no `[server]`: the agent would end as soon "
        "as the model is open, and nobody would stop its use when the time is over. So the key was not asked for.",
        (
            (
                "Let the agent serve the model itself: `keyturn run` as the entrypoint of the server's container, with the "
                "server's command in `server.command`."
            ),
            "Or take `lease_s` out of the key's row in the broker's policy, if the key may be used as long as the pod lives.",
        ),
        "Nothing is held back: length and policy version of the lease stand in status and events.",
    ),
    errors.StoreCredentialsError: Explanation(
        "After the verdict the credentials of the model's store came from `artifact.credentials_uri`, and they are none, or "
        "they cannot be opened with the key pair of this boot. The store was not asked for anything. It was before the GPU "
        "gate: this guest can boot again.",
        (
            (
                "One JSON object and nothing else, at most 4 KiB: user, secret and of a bucket perhaps session_token, each a "
                "text; the secret without control characters, the others in printable ASCII. `artifact.credentials_uri` must "
                "not be the name of a key: what has a key's 32 bytes is not opened here, so where they are, add a space."
            ),
            (
                "Try them from elsewhere: what a registry takes from `skopeo login`, or the access key of a bucket. Only "
                "temporary credentials of a bucket have a session token, which then is all of one life with them."
            ),
            (
                "Not sealed as a key is: as with a key that does not open, look up the request id in the audit log, where this "
                "step is called credentials, and look for replicas or a proxy that mix answers up."
            ),
        ),
        "Which member is wrong is not told, and nothing of what came: a password with a typing error is nearly one.",
    ),
    errors.LeaseEndedError: Explanation(
        "The authority gave the key for a limited time and this time is over. The server was stopped and the model "
        "wiped from guest memory, or the boot did not finish in time. It is counted from before the request, on a clock "
        "that goes on while the guest sleeps. From half of it on the guest attests again: an unreachable "
        "broker is asked until the lease ends, a denial ends it; the server has `server.stop_timeout_s` to stop.",
        (
            (
                "If it was served: the events `lease_renewal_failed` and `retrying` say what kept the guest from the broker; "
                "check `broker.endpoints`, routes and firewalls, then start a new guest."
            ),
            (
                "If the boot itself did not finish: compare the lease with the time `load` takes (`keyturn status`), "
                "and ask for a longer `lease_s` in the policy row or use a faster store."
            ),
            (
                "A lease must outlast what keeps a broker away: half of it is there for renewals. `keyturn status` shows the "
                "lease, its end and how often it was renewed."
            ),
        ),
        "Nothing is held back: the length of the lease stands in the text and in the verdict's event.",
    ),
    # --- artifact -----------------------------------------------------------------------------------------------------
    errors.ArtifactUnavailableError: Explanation(
        "The store at `artifact.source` did not deliver what was asked for; the number in brackets is the HTTP status "
        "or the errno. Timeouts, lost connections and server errors were tried again until `artifact.timeout_s`, "
        "everything else ends the boot at once.",
        (
            (
                "Not found: the layout must hold `blobs/sha256/` and the digest of `artifact.manifest_digest`, and "
                "every blob that manifest names. `keyturn inspect SOURCE` from the same network reads it in the same "
                "way."
            ),
            (
                "Refused: without `artifact.user` or `artifact.credentials_uri` no credentials are sent, and the store must "
                "let this guest read, as the content is ciphertext. With them: user and secret of a registry as `skopeo "
                "login` takes them; of a bucket the access key, its region, and a clock right to a quarter of an hour. Those "
                "at the broker may have been replaced or run out."
            ),
            (
                "Answer does not fit: the store must answer range requests with 206 and a correct Content-Range, must "
                "not compress, and may redirect within its own scheme, host and port only, a registry for its blobs to any "
                "https host. `curl -s -r 0-99 -D - -o /dev/null URL` shows all three. A registry's name for a model must lead "
                "to one manifest, or to an index with one sealed model."
            ),
            (
                "TLS: `artifact.ca_pem` for a private CA; otherwise the image must carry the system's CA certificates. The "
                "proxy makes no connection: that of `--proxy` must allow CONNECT without a password to the store, and to the "
                "hosts where a registry has its blobs; without a number it is not there or is no proxy."
            ),
            (
                "A folder: regular files without symbolic links, readable by the agent. Changed: somebody replaced an object "
                "of the bucket while it was read. Slow rather than broken: raise `artifact.timeout_s`."
            ),
        ),
        "URLs, file names and the store's error pages are not printed: the source can carry a secret in its path, and "
        "the store is as untrusted as the network.",
    ),
    errors.VolumeUnavailableError: Explanation(
        "The model lies on an encrypted disk of this guest (`artifact.format`), and this guest cannot open it. The manifest is "
        "authentic and names the disk by the UUID of its LUKS2 header. No key was asked for, unless the text says that the "
        "kernel refused.",
        (
            (
                "No disk: attach it as a block device (virtio-blk, virtio-scsi, NVMe). `keyturn inspect` shows the UUID of the "
                "manifest, `cryptsetup luksUUID` that of a disk. A disk under another name than these have: `artifact.device`."
            ),
            "Several disks: attach one. A copy has the UUID of its original.",
            "Ends too early: the image was cut short while it was copied, or the disk is smaller than it.",
            (
                "The kernel refused: errno 2 or 19, it has no device mapper, no /dev/mapper/control, or no EROFS; 13 or 1, no "
                "CAP_SYS_ADMIN; 22, it lacks dm-crypt, dm-verity or AES-XTS."
            ),
        ),
        "Names and contents of other disks are not printed: what a host attaches is the host's word.",
    ),
    errors.VolumeHeaderError: Explanation(
        "The LUKS2 header of the disk was copied into memory and checked there, and something in it is not allowed or is not "
        "what the authentic manifest says; the text names the field. A host can write this header as it likes, to have a guest "
        "use no cipher at all, so nothing but the listed values passes.",
        (
            (
                "`cryptsetup luksDump` on the disk and on the image that was sealed: they must be the same. Where they differ, "
                "ask who can write to the disk."
            ),
            (
                "A field of config: `cryptsetup reencrypt` was begun, or a flag was stored; a volume is sealed again, never "
                "changed in place."
            ),
            (
                "csum or magic: the header is damaged; copy the image again. Its second copy is not looked at, as `cryptsetup "
                "repair` would."
            ),
        ),
        "The value of the field is not printed, since whoever has the disk wrote it.",
    ),
    errors.VolumeAuthenticationError: Explanation(
        "The kernel read a block of the encrypted volume that is not the one the provider sealed: its hash does not lead to "
        "the root hash of the authentic manifest. Nobody got that block; who read it got an error, and if that was the model "
        "server, it has ended.",
        (
            (
                "At once, at the mount: the disk holds another volume with the same UUID, or the manifest is of another one. "
                "`keyturn inspect REF --check --key-file K --volume IMAGE` looks at every block."
            ),
            "Later: the disk has failed, or somebody wrote to it. Attach it read-only, and copy the image again.",
            "The guest's kernel log names the block: device-mapper: verity.",
        ),
        "Which file the block belongs to is not told; it would be told to the host as well.",
    ),
    errors.ManifestDigestError: Explanation(
        "The bytes that the store gave for the manifest do not have the digest in `artifact.manifest_digest`. Nothing "
        "of them was parsed. Everything else about the model is authenticated through this one digest, so there is "
        "nothing to go on with.",
        (
            (
                "`sha256sum` of the manifest's file in `blobs/sha256` must be its own name; if not, the copy is "
                "damaged: copy it again."
            ),
            (
                "Over HTTP, fetch that blob with `curl -s` and compare: a store that rewrites line ends, compresses or "
                "answers with a login page gives other bytes."
            ),
            "Compare `artifact.manifest_digest` with what `keyturn seal` printed; an index in the layout proves nothing.",
            (
                'With `artifact.format = "kserve-jwe"`: a file in clear is not the one that `artifact.plain_files` lists; '
                "compare with `sha256sum`."
            ),
        ),
        "The digest that was found is not printed, since it is that of bytes anybody could have sent.",
    ),
    errors.ManifestSignatureError: Explanation(
        "The configuration pins the provider's keys (`artifact.provider_keys`) in place of a digest, and no signature in the "
        "store shows that one of them signed this manifest. Nothing of the manifest was parsed. The text names what came "
        "nearest: several signatures may lie beside a manifest, and one good one is enough.",
        (
            (
                "No signature: `keyturn inspect REF` lists them. Not every copying tool takes them along: `oras cp -r` does, "
                "`skopeo copy` does not. `keyturn seal --sign KEY` signs again."
            ),
            (
                "A key that is not pinned: compare the key ids that `keyturn inspect REF` shows with `keyturn config check`; "
                "while a key is replaced, sign with both, then pin both, then drop the old one."
            ),
            "Made for another manifest: a signature was copied without its manifest, or the manifest was changed after it.",
        ),
        "Key ids of foreign signatures are not printed here, since anybody can make one.",
    ),
    errors.ModelSignatureError: Explanation(
        "`artifact.model_signature` names an OpenSSF bundle in the sealed model, and the files of the model, opened, are not "
        "what a key of `artifact.model_signature_keys` signed. The sealing itself is in order: whoever sealed the model sealed "
        "other files, or another bundle. Nothing was served.",
        (
            (
                "On the model folder, before it is sealed, model_signing names the file that differs: `model_signing verify "
                "key DIR --signature SIG --public_key PEM`."
            ),
            (
                "does not list exactly the files of the model: model_signing leaves out .git, .gitattributes, .gitignore and "
                ".github, and whatever was added after signing; seal a folder without them."
            ),
            (
                "not a bundle of model-signing: it must be made with a key pair (`sign key`), with SHA-256 and whole files, "
                "which is its default. Sigstore identities and certificates are not read."
            ),
            "does not verify: pin the public half of the key that signed (P-256 or P-384).",
        ),
        "Which file differs is not told: it would be told to the host as well.",
    ),
    errors.MalformedManifestError: Explanation(
        "The manifest is authentic, and it or its model description breaks a rule of FORMAT.md; the text names the "
        "field. Either another program or version wrote it, or the description in the store is not the one that the "
        "manifest names.",
        (
            "`keyturn inspect SOURCE@DIGEST` shows the same error without a guest.",
            "`keyturn --version --json` where it was sealed and in the guest: `format` must be the same.",
            (
                "Field config.size or config.digest: the blob of the model description is not the one the manifest "
                "names; copy the layout again."
            ),
            "Any other field: seal the model again with this version of `keyturn seal`.",
        ),
        "The value of the field is not quoted: file names of a model can be confidential, and indexes say enough.",
    ),
    errors.RollbackError: Explanation(
        "The model is authentic and older than it may be. The floor is the higher of `artifact.min_version` and the "
        "`min_model_version` that the authority put into the signed verdict. Old versions are refused, so that nobody "
        "can bring back a model with a known fault.",
        (
            (
                "`keyturn inspect SOURCE` shows the version of each manifest in the layout; set "
                "`artifact.manifest_digest` to one that is not below the floor."
            ),
            "If the model is new and its number is wrong: seal it again with a higher `--version`.",
            (
                "To go back on purpose: lower `artifact.min_version` (a new HOST_DATA or MRCONFIGID) and ask the "
                "authority to lower `min_model_version` in the row."
            ),
        ),
        "Nothing is held back: both numbers are in the text. Which of the two floors was the higher one can be seen "
        "from the configuration.",
    ),
    errors.MalformedHeaderError: Explanation(
        "A sealed file begins with 40 bytes from which its key is derived. In the manifest's file table they are not "
        "those of this format; or `keyturn inspect --check` found other ones at the start of the blob than the table "
        "promises.",
        (
            (
                "In a guest: the table itself is authentic, so another copy does not help. Another program or version "
                "made it; compare `format` of `keyturn --version --json` and seal the model again with `keyturn seal`."
            ),
            (
                "From `keyturn inspect --check`: `file` counts from 0 in the table that `keyturn inspect SOURCE` "
                "prints. The `sha256sum` of that blob must be its name in `blobs/sha256`; if it is not, copy the layout "
                "again."
            ),
        ),
        "The file's name and the bytes found are not told: names can be confidential and belong to the provider.",
    ),
    errors.TruncatedArtifactError: Explanation(
        "The store has fewer bytes of a sealed file than the manifest promises; `keyturn inspect --check` says the same "
        "of a file that is too long. The numbers are bytes of ciphertext.",
        (
            (
                "`file` counts from 0 in the table that `keyturn inspect SOURCE` prints; compare the size of that blob "
                "in `blobs/sha256` where the layout lies. An upload or copy that ended early is the usual reason: copy "
                "it again."
            ),
            "Over HTTP: the Content-Length of the blob; some stores and proxies cut at 2 or 5 GiB.",
            "`keyturn inspect SOURCE --check --key-file K` reads every byte after the copy, outside a guest.",
        ),
        "The file is told by its index and not by its name, since the host reads logs and names can be confidential.",
    ),
    errors.SegmentAuthenticationError: Explanation(
        "One segment (1 MiB) of a sealed file does not authenticate under the right key. It was changed, swapped with "
        "another one, or damaged on disk or on its way. No byte of it became visible, and what had been opened before "
        "was wiped.",
        (
            (
                "`file` counts from 0 in the table that `keyturn inspect SOURCE` prints. If the `sha256sum` of that "
                "blob is not its name in `blobs/sha256`, the copy is damaged or altered: copy it again from the "
                "provider."
            ),
            (
                "If it is: `keyturn inspect SOURCE --check --key-file K` at the provider. If that fails too, the model "
                "was sealed wrongly; seal it again and tell us."
            ),
            (
                "It passes there and fails here again and again: somebody between store and guest alters bytes; look at "
                "caches and proxies."
            ),
        ),
        "One message for every cause: which byte or which check failed would be an oracle for whoever alters the ciphertext.",
    ),
    errors.SealError: Explanation(
        "`keyturn seal` could not seal the model and took back what it had written: the output folder is as it was. "
        "This is a command of the provider's own machine and never happens in a guest.",
        (
            (
                "Not a file: only regular files and folders are sealed; a link must lead to a file inside the model "
                "folder. Copy with `cp -rL` to get rid of links (a download cache is full of them)."
            ),
            (
                "Inside one another: model folder, output folder and key file must lie beside each other, or the key "
                "could be uploaded with the model."
            ),
            (
                "Sealed before: this `--name` and `--version` exist in the layout; raise `--version`. Key file exists: "
                "give it with `--key-file` or move it away."
            ),
            "Changed while it was read: stop the download or training that still writes there.",
            (
                "Busy: another seal has the output folder. Input or output failed: errno 28 is a full disk; the layout "
                "needs as much room as the model."
            ),
        ),
        "The path is told here, because this text stays with the provider. The key is never shown, and its file is "
        "readable by its owner only.",
    ),
    errors.ManifestTooLargeError: Explanation(
        "This model has more files than a registry takes. Each is a layer, a row of the manifest, and registries refuse a "
        "manifest above 4 MiB: about 16,000 files with paths of 40 characters. Nothing was uploaded. In a folder, behind https "
        "and in a bucket a model may have 100,000.",
        (
            (
                "Seal into a folder (`keyturn seal --to DIR`), copy it to where guests can read it, and put its path, https or "
                "s3 URL into `artifact.source`."
            ),
            (
                "Or pack small files into large ones before sealing, as the server reads them: shards of a dataset into one "
                "archive, tokenizer parts into one file."
            ),
        ),
        "Number of files and size of the manifest are told; both are visible to whoever stores the model.",
    ),
    # --- memory -------------------------------------------------------------------------------------------------------
    errors.InsufficientMemoryError: Explanation(
        "The model and `artifact.headroom_mib` beside it do not fit into guest memory, and the text says which limit "
        "bites. It was asked before a weight was fetched, because a guest that runs out of memory halfway is killed "
        "without a word.",
        (
            (
                "MemAvailable: give the machine more memory (Kata: `default_memory`, or the pod's limits; QEMU: `-m`). "
                "`keyturn inspect` shows the size of the model."
            ),
            (
                "Cgroup limit: raise `resources.limits.memory` of the container. The plaintext in tmpfs or memfd counts "
                "there, and so does the server."
            ),
            (
                "Destination file system: raise `sizeLimit` of the memory volume, or its mount option `size=`, at "
                "`artifact.directory`."
            ),
            "Reserve for the server as well: `artifact.headroom_mib` should cover what it allocates beside the weights.",
        ),
        "Nothing is held back: needed and available bytes are in the text; sizes of the model are visible to the host anyway.",
    ),
    errors.DestinationError: Explanation(
        "The place for the weights cannot be had in this guest: the folder is no tmpfs, not empty or in use, a memfd cannot "
        "hold a model of several files, or the kernel refused with the errno told. Weights go to memory or nowhere, so "
        "there is no other place to fall back to.",
        (
            (
                "Kernel refused with errno 1 or 38: `artifact.destination` = tmpfs needs root with CAP_SYS_ADMIN, and a "
                "mount namespace of its own."
            ),
            (
                "Many files: give the container CAP_SYS_ADMIN, use `artifact.destination` = directory, or seal the "
                "model as one file (GGUF)."
            ),
            (
                "Not tmpfs or not empty: mount a fresh memory volume (`emptyDir` with `medium: Memory`) at "
                "`artifact.directory` and share it with nobody. Few inodes: by default a tmpfs has one for two pages of the "
                "machine's memory; give it more with `nr_inodes=`."
            ),
            (
                "In use by another agent: it lives, and wipes its model when it ends. What a killed one left is wiped by the "
                "next start."
            ),
            (
                "Errno 28 or 12: memory or `size=` ran out while loading. `/run/keyturn` cannot be made: the image must "
                "have a writable `/run`, and the agent must not run in a chroot."
            ),
        ),
        "The path is not repeated; `keyturn config explain artifact.destination` says what each kind needs.",
    ),
    errors.SwapActiveError: Explanation(
        "The guest has swap on a device, and weights or key would lie in memory that the kernel may write there. That "
        "disk belongs to the host. A compressed zram without a backing device does not count, and a tmpfs with noswap "
        "is exempt.",
        (
            (
                "`swapoff -a` in the guest image and no swap line in its fstab or units; `/proc/swaps` must be empty "
                "but for zram."
            ),
            (
                "A kernel of 6.4 or newer with `artifact.destination` = tmpfs: its mounts get noswap. A memfd or a "
                "given folder never has it."
            ),
            (
                "If the weights are exempt and it is still said: the key could not be locked. Raise RLIMIT_MEMLOCK "
                "(`LimitMEMLOCK=` of a unit) or give CAP_IPC_LOCK."
            ),
            "`artifact.unsafe_allow_swap` is for simulated attesters only and refused with a real one.",
        ),
        "Which device it is is not told; `/proc/swaps` in the guest says it.",
    ),
    # --- receipt ------------------------------------------------------------------------------------------------------
    errors.ReceiptError: Explanation(
        "`keyturn exec` looked at what `keyturn load` had left, and did not become the server; or `keyturn verify` was given "
        "a receipt that no boot signed. Receipt, evidence, statement and files are looked at in this order, and the first "
        "thing that is not as it must be is told.",
        (
            (
                "Missing or malformed: see that the init container ended with status 0, and that both containers mount the "
                "same memory emptyDir. `--dir` says where this one has it; the default is `artifact.directory`."
            ),
            (
                "Another configuration, model or version: both containers are given the same file, with whose digest the "
                "guest was launched. What a receipt says is printed by `keyturn verify`."
            ),
            (
                "Files, modes and mount: the server's container mounts the folder `readOnly: true`, and nothing but the init "
                "container writes into it. A file that a sidecar leaves there is one too many."
            ),
            (
                "Another guest or folder: the receipt was brought from somewhere else, or the folder is a copy. Delete "
                "the pod, and find out who could write into its folder, or have another one mounted."
            ),
            (
                "Evidence that does not cover the receipt, a signature that does not verify: it was changed after the boot, or "
                "is no receipt of this version's."
            ),
        ),
        "Neither the file that differs nor any value of the receipt is told. Whoever may see them has the receipt, which "
        "holds no secret.",
    ),
    # --- agent and server ---------------------------------------------------------------------------------------------
    errors.BootInterruptedError: Explanation(
        "A signal asked for the end before the model server was ready. The worker was allowed to finish a device call, "
        "then everything was wiped; after the server has been ready the same signal ends with status 0.",
        (
            (
                "Signal 15 without anybody's doing: a probe or timeout of the platform. Kubernetes: `kubectl describe "
                "pod` and a `startupProbe` long enough for the whole load; systemd: `TimeoutStartSec=` of our unit "
                "covers the local checks only."
            ),
            "Signal 2: Ctrl-C on the terminal. Signal 1: the terminal or session went away; start it as a unit or in a pod.",
            "`keyturn status` shows the stage that was running and how long each one before it took.",
        ),
        "Who sent the signal is not told, and a second error that the worker met on its way out is left out: it is not "
        "why the boot ended.",
    ),
    errors.WorkerLostError: Explanation(
        "The process that boots (the worker) ended without saying how: something killed it, or it broke below Python. "
        "The supervisor noticed, freed what it held and stopped. Before `server_started` nothing was published. After it, the "
        "events `gpu_watch_lost` say that it was the process that watches the GPUs: it was replaced three times, and lost "
        "once more within ten minutes.",
        (
            (
                "Signal 9: nearly always memory. Look for `Out of memory: Killed process` in the guest's kernel log, "
                "and for OOMKilled in `kubectl describe pod`; give more memory or raise `artifact.headroom_mib` so that "
                "it is refused early."
            ),
            "Signal 11 or 4: a crash in a library. Try another model of processor, then report it to us with the version.",
            "Signal 31: a seccomp profile forbids a system call; try the container runtime's own default profile.",
            "Status other than 0 and no signal: report it to us with the last event before it.",
        ),
        "There is no core file and no traceback: both would hold keys and weights. Core dumps are switched off on purpose.",
    ),
    errors.SupervisorLostError: Explanation(
        "In a stand-alone guest PID 1 saw the supervisor end without a last word. The kernel killed worker and server "
        "with it, and the machine powered off; this line in the kernel log is all that is left.",
        (
            (
                "Signal 9: look for `Out of memory: Killed process` in the console lines before it. The supervisor "
                "itself needs 20 MiB; server and model are what grows, so give the machine more memory."
            ),
            (
                "Keep the console of the guest (QEMU `-serial file:…`), without `quiet` on the kernel command line: "
                "after power-off there is nothing else to read."
            ),
            "Not signal 9: report it to us with the version and the lines before it.",
        ),
        "Memory of the dead process is not kept: after power-off nothing of the guest exists, as intended. "
        "`init_on_free=1` on the kernel command line clears it even before.",
    ),
    errors.ServerStartError: Explanation(
        "The kernel refused to start the model server or its readiness check, and `code` is the errno of the first step "
        "that failed, from making a pipe to executing the program. The model was in place.",
        (
            (
                "2: the first word of `server.command` is not in this image; write an absolute path, and remember the "
                "loader it needs (a program built for another libc gives 2 as well). 13: not executable for "
                "`server.uid`, or on a noexec mount."
            ),
            "8: built for another processor, or a script without `#!`. 7: arguments and `server.environment` are too long.",
            (
                "1: the agent may not change to `server.uid` and `server.gid`; it needs CAP_SETUID and CAP_SETGID, or "
                "must not run as root."
            ),
            (
                "11 or 12: limit of processes or memory of the pod. 110: the program could not be executed within ten "
                "seconds; look at the image's disk."
            ),
        ),
        "The command line is not repeated: arguments and environment can hold API keys.",
    ),
    errors.ServerExitedError: Explanation(
        "The model server ended by itself. Before it was ever ready that ends the boot at once, for a wrong command "
        "does not get better by repetition. Later it is started again, at most `server.max_restarts` times in ten "
        "minutes, and this was once too often.",
        (
            (
                "Run `server.command` with the unsealed model on a development machine, as the same uid; its output "
                "says more than its status."
            ),
            (
                "Or set `server.output` to inherit in a guest with test data only: then what it prints goes to the "
                "agent's output."
            ),
            (
                "Signal 9: memory; model, KV cache and `server.scratch_mib` share the guest. Signal 6 or 11: a crash in "
                "the server; signal 4: built for another processor."
            ),
            (
                "Status 127 or 126: a shell script in front of the server did not find it. The server has no "
                "capabilities, no inherited environment, and `{scratch}` as the one folder made for it to write to."
            ),
            (
                "Permission denied although modes are right: where the kernel has Landlock the server writes only in "
                "`{scratch}`, and connects only to the TCP ports in `server.egress`, on the loopback too: tensor "
                "parallelism needs `0` there. A missing file: where the agent may mount, the server's /tmp is "
                "`{scratch}` and its /dev/shm starts empty, unless command or environment name a path in them."
            ),
        ),
        "What the server printed stays in guest memory and is only counted: server logs quote prompts and paths, and "
        "this output would go to the host.",
    ),
    errors.ServerNotReadyError: Explanation(
        "The server ran, and did not answer in the way its preset demands within `server.ready_timeout_s`. The "
        "questions are asked in order: does it listen, is it healthy, does it serve the model, does it answer one "
        "request. The last one that failed is told.",
        (
            (
                "No answer: does the command listen on `server.port`, on `server.host` or the loopback? Use the "
                "placeholders `{host}` and `{port}`. A big model may simply need longer: raise "
                "`server.ready_timeout_s`."
            ),
            "Another user listens: a program of another uid in this guest holds `server.port`; choose another port.",
            "Health: `server.health_path` must answer 200. Many servers say 503 until the weights are read.",
            (
                "Model: `/v1/models` must list `server.model_id`; for llama.cpp it is what `--alias` says, for vLLM what "
                "`--served-model-name` says. For Triton it is a model of the repository, and that model must have loaded."
            ),
            (
                "Probe: healthy and the first request fails, within two minutes. Does `server.probe` fit the model (an "
                "embedding model does not complete, nor does a Triton model without an input `text_input`)? Is there "
                "memory for one request?"
            ),
        ),
        "Neither status nor body of the answers is told: a model server's answer can hold anything, prompts of others "
        "included.",
    ),
    errors.ServerStuckError: Explanation(
        "Processes of the model server are alive ten seconds after SIGKILL. Such a process waits inside the kernel, "
        "usually in a GPU driver call, and holds weights in memory that cannot be wiped while it lives.",
        (
            "Power the machine off. That frees its memory; nothing inside the guest does.",
            (
                "Look for `blocked for more than 120 seconds` (CONFIG_DETECT_HUNG_TASK) and for NVRM Xid lines in the "
                "guest's kernel log."
            ),
            (
                "With an Xid: have the host reset the GPU before the next guest gets it. Without: try the server with "
                "another driver version, and without network file systems."
            ),
        ),
        "Process names and stacks are not printed, only their number: a server chooses its own name and arguments.",
    ),
    errors.InternalError: Explanation(
        "Something happened that this program does not know as a possible failure: a bug of ours. The agent stopped and "
        "wiped as for any other failure. `place` is file, line and the kind of exception.",
        (
            "Report the place and `keyturn --version --json`, with the kernel version and the last event before it.",
            "Does it happen again with the same configuration, and on another machine? Say so in the report.",
            (
                "Until it is mended, go back to the last version that worked; the broker's policy row must allow its "
                "measurement."
            ),
        ),
        "The exception's own text is left out, because it can quote anything that was in memory: a key, a prompt, a "
        "peer's words.",
    ),
}
"""Every concrete class; a test compares them with `errors.all_errors()`."""

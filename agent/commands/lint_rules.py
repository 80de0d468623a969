"""What `keyturn lint` asks of a pod: whether its manifest gives a boot what it needs, and promises what they rest on.

Owns the rules; their texts are `lint_findings.py`'s. Opens nothing: it is given documents. Facts: Kata Containers 4.1
(RuntimeClasses, `docs/Limitations.md`, agent policy, memory emptyDir), and `evidence/coco.py` for what a container with GPUs
needs.
"""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass

from agent import config
from agent.commands.initdata import ANNOTATION
from agent.commands.lint_findings import Finding, Rule
from agent.commands.manifests import Container, Pod, Setting, find
from agent.commands.run import health_address
from agent.config_source import ENTRY, INITDATA_FILE
from agent.errors import AgentError, ConfigError, ConfigNotMeasuredError, InitdataError
from agent.guest.initdata import Initdata, parse_initdata, unpack_gzip

KERNEL_PARAMETERS = "io.katacontainers.config.hypervisor.kernel_params"
REST_API = "agent.guest_components_rest_api=all"
GPU_RESOURCE = "nvidia.com/pgpu"
KERNEL_LOG = "/dev/kmsg"
GRACE_S = 90
"""Of a pod: 65 s for a report of SEV-SNP that is being made, and then the server stops."""
DEFAULT_PERIOD_S = 10
DEFAULT_FAILURES = 3
_CAPABILITIES = {"run": {"SETUID", "SETGID", "SETPCAP", "CHOWN", "KILL", "IPC_LOCK"}, "load": {"CHOWN", "IPC_LOCK"}}
"""What each needs; `run` also SYS_ADMIN where the model lies in a tmpfs of its own, and both SYSLOG for the kernel's log."""
_GIVEN_CAPABILITIES = {"SETUID", "SETGID", "SETPCAP", "CHOWN", "KILL"}
"""Of these what container runtimes give unless `drop` has ALL."""

_DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
_TEE_CLASS = re.compile(r"kata-qemu-(?:nvidia-gpu-)?(snp|tdx)(-runtime-rs)?")
_NO_TEE_CLASS = re.compile(r"kata-qemu-coco-dev(-runtime-rs)?")
_LOOPBACK = re.compile(r"127\.|::1$|localhost$")


@dataclass(frozen=True, slots=True)
class Launch:
    """What the guest of a pod is launched with."""

    subject: str
    path: str
    document: bytes
    initdata: Initdata
    measured: config.Measured | None


Found = Iterator[tuple[Setting, Rule] | tuple[Setting, Rule, AgentError]]


def lint_pod(pod: Pod, documents: list[Setting], model_bytes: int | None) -> tuple[list[Finding], Launch | None]:
    """Everything that is wrong with a pod, and its initdata where it has any that is read.

    Args:
        pod: of `documents`.
        documents: the whole file: ConfigMaps and ServiceAccounts belong to the pod.
        model_bytes: size of the model's files, None where only its volume says it.
    """
    if any(container.verb == "broker" for container in pod.containers):
        found = [*_any_pod(pod, documents), *_broker(pod)]
        launch = None
    else:
        launch, problems = _launch(pod)
        found = [*_any_pod(pod, documents), *problems, *_guest(pod, documents, launch, model_bytes)]
    return [Finding(pod.name, setting.path, rule, *error) for setting, rule, *error in found], launch


def _any_pod(pod: Pod, documents: list[Setting]) -> Found:
    for container in pod.containers:
        image = container.setting.at("image")
        if not _DIGEST.fullmatch(image.text or ""):
            yield image, Rule.IMAGE
        memory = container.setting.at("resources", "limits", "memory")
        if memory.quantity is None:
            yield memory, Rule.MEMORY_LIMIT
    token = pod.spec.at("automountServiceAccountToken")
    account = find(documents, "ServiceAccount", pod.spec.at("serviceAccountName").text)
    from_account = token.value is None and account is not None and account.at("automountServiceAccountToken").value is False
    if token.value is not False and not from_account:
        yield token, Rule.TOKEN
    for volume in pod.spec.at("volumes").items():
        for source in volume.at("projected", "sources").items():
            if source.at("serviceAccountToken").value is not None:
                yield source.at("serviceAccountToken"), Rule.TOKEN
    grace = pod.spec.at("terminationGracePeriodSeconds")
    if (grace.number or 0) < GRACE_S:
        yield grace, Rule.GRACE


# --- a broker ---------------------------------------------------------------------------------------------------------


def _broker(pod: Pod) -> Found:
    for container in pod.containers:
        for probe in _probes(container):
            if probe.value is None:
                yield probe, Rule.PROBE
            elif probe.at("grpc").value is not None:
                yield probe.at("grpc"), Rule.PROBE_GRPC
    for volume in pod.spec.at("volumes").items():
        mode = volume.at("secret", "defaultMode")
        if volume.at("secret").value is not None and (mode.number is None or mode.number & 0o077):
            yield mode, Rule.SECRET
    group = pod.spec.at("securityContext", "fsGroup")
    if group.value is not None:
        yield group, Rule.SECRET


# --- what a guest is launched with ------------------------------------------------------------------------------------


def _launch(pod: Pod) -> tuple[Launch | None, list[tuple[Setting, Rule] | tuple[Setting, Rule, AgentError]]]:
    annotation = pod.metadata.at("annotations", ANNOTATION)
    try:
        document = unpack_gzip(base64.b64decode(annotation.text or "", validate=True))
        initdata = parse_initdata(document, INITDATA_FILE)
    except ValueError:
        return None, [(annotation, Rule.INITDATA)]
    except InitdataError as error:
        return None, [(annotation, Rule.INITDATA, InitdataError(INITDATA_FILE, error.problem))]
    measured: config.Measured | None = None
    problems: list[tuple[Setting, Rule] | tuple[Setting, Rule, AgentError]] = []
    entry = initdata.entry(ENTRY)
    try:
        if entry is None:
            problems.append((annotation, Rule.CONFIGURATION))
        else:
            measured = config.parse(entry, initdata.digest)
    except ConfigError as error:
        problems.append((annotation, Rule.CONFIGURATION, error))
    return Launch(pod.name, annotation.path, document, initdata, measured), problems


# --- a guest ----------------------------------------------------------------------------------------------------------


def _guest(pod: Pod, documents: list[Setting], launch: Launch | None, model_bytes: int | None) -> Found:
    measured = launch.measured if launch else None
    cfg = measured.config if measured else None
    name = pod.spec.at("runtimeClassName")
    known = _TEE_CLASS.fullmatch(name.text or "")
    if _NO_TEE_CLASS.fullmatch(name.text or ""):
        yield name, Rule.NO_TEE
    elif known is None:
        yield name, Rule.RUNTIME_CLASS
    if cfg is not None and cfg.gpu.count and known is not None and "nvidia-gpu" not in known[0]:
        yield name, Rule.GPU_CLASS
    if cfg is not None and (cfg.tee.attester not in ("coco", known[1] if known else "coco")):
        yield pod.metadata.at("annotations", ANNOTATION), Rule.ATTESTER

    parameters = pod.metadata.at("annotations", KERNEL_PARAMETERS)
    if "nvidia-gpu" in (name.text or ""):
        if parameters.value is not None:
            yield parameters, Rule.KERNEL_PARAMETERS
    elif cfg is not None and cfg.tee.through_coco and REST_API not in (parameters.text or "").split():
        yield parameters, Rule.REST_API

    yield from _separation(pod)
    agents = [container for container in pod.containers if container.verb in ("run", "load")]
    if not agents:
        yield pod.spec.at("containers"), Rule.NO_KEYTURN
    for agent in agents:
        yield from _source(pod, agent, documents, launch)
        yield from _rights(pod, agent, cfg)
        if agent.init != (agent.verb == "load"):
            yield agent.setting, Rule.MODE
        elif agent.verb == "run":
            yield from _entrypoint(pod, agent, cfg, model_bytes)
        else:
            yield from _load(pod, agent, documents, launch, measured, model_bytes)
    yield from _gpus(pod, agents, cfg)


def _separation(pod: Pod) -> Found:
    """What keeps the containers of a pod apart, and the host's files out of it."""
    for name in ("shareProcessNamespace", "hostPID", "hostIPC", "hostNetwork"):
        if pod.spec.at(name).value is True:
            yield pod.spec.at(name), Rule.NAMESPACE
    for volume in pod.spec.at("volumes").items():
        path = volume.at("hostPath", "path")
        if path.value is not None and not (path.text or "").startswith("/dev/"):
            yield path, Rule.HOST_PATH
    for container in pod.containers:
        privileged = container.setting.at("securityContext", "privileged")
        if privileged.value is True:
            yield privileged, Rule.PRIVILEGED
        for hook in ("postStart", "preStop"):
            command = container.setting.at("lifecycle", hook, "exec")
            if command.value is not None:
                yield command, Rule.PROBE_EXEC


def _rights(pod: Pod, agent: Container, cfg: config.MeasuredConfig | None) -> Found:
    """That the agent is root in its container, and what of root it has."""
    security = agent.setting.at("securityContext")
    user, non_root = (_security(pod, agent, name) for name in ("runAsUser", "runAsNonRoot"))
    if user.value not in (None, 0):
        yield user, Rule.USER
    elif non_root.value is True:
        yield non_root, Rule.USER
    words = {name: security.at("capabilities", name) for name in ("add", "drop")}
    added, dropped = ({(item.text or "").upper().removeprefix("CAP_") for item in words[name].items()} for name in words)
    needed = set(_CAPABILITIES[agent.verb or ""])
    if cfg is not None:
        needed |= {"SYS_ADMIN"} if agent.verb == "run" and cfg.artifact.destination == "tmpfs" else set()
        needed |= {"SYSLOG"} if cfg.gpu.count else set()
    kept = set() if "ALL" in dropped else _GIVEN_CAPABILITIES - dropped
    if "ALL" not in added and not needed <= added | kept:
        yield words["add"], Rule.CAPABILITIES


def _security(pod: Pod, container: Container, name: str) -> Setting:
    """A setting of the container's securityContext, which the pod's stands in for."""
    own = container.setting.at("securityContext", name)
    of_pod = pod.spec.at("securityContext", name)
    return of_pod if own.value is None and of_pod.value is not None else own


def _source(pod: Pod, agent: Container, documents: list[Setting], launch: Launch | None) -> Found:
    file = agent.option("--initdata")
    if file is None:
        yield agent.setting.at("command"), Rule.SOURCE
        return
    mount = agent.mount(file.text or "")
    if mount is None:
        yield agent.setting.at("volumeMounts"), Rule.SOURCE_MOUNT
        return
    volume = pod.volume(mount)
    if volume.at("emptyDir").value is not None:
        yield volume.at("emptyDir"), Rule.SOURCE_MOUNT
    # The file's name in the volume: below the mount, or where a subPath leads.
    below = (file.text or "").removeprefix((mount.at("mountPath").text or "").rstrip("/")).strip("/")
    name = "/".join(part for part in ((mount.at("subPath").text or "").strip("/"), below) if part)
    items = volume.at("configMap", "items")
    key = next((item.at("key").text for item in items.items() if item.at("path").text == name), None) if items.items() else name
    if key is None:
        yield items, Rule.SOURCE_MOUNT
        return
    config_map = find(documents, "ConfigMap", volume.at("configMap", "name").text)
    if config_map is not None and launch is not None:
        entry = config_map.at("data", key)
        if (entry.text or "").encode() != launch.document:
            yield entry, Rule.OTHER_DOCUMENT


def _entrypoint(pod: Pod, agent: Container, cfg: config.MeasuredConfig | None, model_bytes: int | None) -> Found:
    if cfg is not None and cfg.server is None:
        yield agent.setting, Rule.MODE
    memory = agent.setting.at("resources", "limits", "memory")
    if model_bytes is not None and cfg is not None and memory.quantity is not None:
        scratch_mib = cfg.server.scratch_mib if cfg.server else 0
        if memory.quantity < model_bytes + ((scratch_mib + cfg.artifact.headroom_mib) << 20):
            yield memory, Rule.MEMORY

    read_only = agent.setting.at("securityContext", "readOnlyRootFilesystem")
    in_tmpfs = cfg is not None and cfg.artifact.destination == "tmpfs"
    if in_tmpfs and read_only.value is True and agent.mount("/run/keyturn") is None:
        yield read_only, Rule.READ_ONLY_ROOT
    for name in ("env", "envFrom"):
        if agent.setting.at(name).items():
            yield agent.setting.at(name), Rule.ENVIRONMENT
    health = agent.option("--health")
    address = health_address((health.text if health else "") or "")
    if address is None or _LOOPBACK.match(address[0]):
        yield health or agent.setting.at("command"), Rule.HEALTH
    wanted = ("/readyz", "/readyz", "/livez")
    for probe, path in zip(_probes(agent), wanted, strict=True):
        get = probe.at("httpGet")
        port = get.at("port")
        named = {item.at("name").text: item.at("containerPort").number for item in agent.setting.at("ports").items()}
        number = port.number if port.text is None else named.get(port.text)
        if probe.value is None:
            yield probe, Rule.PROBE
        elif probe.at("exec").value is not None:
            yield probe.at("exec"), Rule.PROBE_EXEC
        elif get.at("path").text != path:
            yield get.at("path"), Rule.PROBE_TARGET
        elif address is not None and number != address[1]:
            yield port, Rule.PROBE_TARGET
        elif get.at("scheme").value not in (None, "HTTP"):
            yield get.at("scheme"), Rule.PROBE_TARGET
        elif get.at("host").value is not None:  # the kubelet would ask itself, or somebody else
            yield get.at("host"), Rule.PROBE_TARGET
    startup = agent.setting.at("startupProbe")
    if cfg is not None and cfg.server is not None and startup.value is not None:
        period, failures = startup.at("periodSeconds").number, startup.at("failureThreshold").number
        if (period or DEFAULT_PERIOD_S) * (failures or DEFAULT_FAILURES) < cfg.server.ready_timeout_s:
            yield startup.at("failureThreshold"), Rule.STARTUP


def _load(
    pod: Pod,
    agent: Container,
    documents: list[Setting],
    launch: Launch | None,
    measured: config.Measured | None,
    model_bytes: int | None,
) -> Found:
    cfg = None
    asked = _asked(agent)
    try:
        if measured is not None:
            environment = {item.at("name").text: item.at("value").text for item in agent.setting.at("env").items()}
            resource_id, confidential = (environment.get(f"CONFIDENTIAL_{name}") for name in ("RESOURCE_ID", "ENABLED"))
            cfg = measured.select(config.Selection(asked[0].text or "", resource_id, confidential) if asked else None).config
    except (ConfigError, ConfigNotMeasuredError) as error:
        yield asked[0] if asked else agent.setting.at("args"), Rule.ASKED, error
    out = _out(agent)
    folder = ((out.text if out else None) or "").rstrip("/")
    if cfg is not None and (cfg.server is not None or cfg.artifact.destination != "directory"):
        yield agent.setting, Rule.MODE
    elif cfg is not None and (cfg.artifact.directory or "").rstrip("/") != folder:
        yield out or agent.setting.at("command"), Rule.OUT

    mount = agent.mount(folder)
    volume = pod.volume(mount) if mount else Setting(None)
    medium = volume.at("emptyDir", "medium")
    if mount is None or medium.text != "Memory":
        yield agent.setting.at("volumeMounts") if mount is None else medium, Rule.MEMORY_VOLUME
        return
    servers = list(_mounting(pod, agent, mount))
    if not servers:
        yield pod.spec.at("containers"), Rule.NOT_SHARED
    for place in (mount, *(place for _, place in servers)):
        for name in ("subPath", "subPathExpr"):
            if place.at(name).value is not None:
                yield place.at(name), Rule.MEMORY_VOLUME
    if pod.spec.at("securityContext", "fsGroup").number is None:
        yield pod.spec.at("securityContext", "fsGroup"), Rule.GROUP
    for server, place in servers:
        if place.at("readOnly").value is not True:
            yield place.at("readOnly"), Rule.READ_ONLY
        user, non_root = (_security(pod, server, name) for name in ("runAsUser", "runAsNonRoot"))
        if user.value == 0 or (user.value is None and non_root.value is not True):
            yield user, Rule.ROOT
        if server.verb == "exec":
            yield from _source(pod, server, documents, launch)
            given = server.option("--dir")
            directory = (given.text or "") if given else folder  # which is artifact.directory, or said above
            if directory.rstrip("/") != (place.at("mountPath").text or "").rstrip("/"):
                yield given or server.setting.at("command"), Rule.DIR
        elif not server.init and not (asked or (measured and measured.allowed)):  # KServe's servers have no receipt beside them
            yield server.setting.at("command"), Rule.RECEIPT
        for probe in _probes(server) if not server.init else ():
            if probe.value is None:
                yield probe, Rule.PROBE
            elif probe.at("exec").value is not None:
                yield probe.at("exec"), Rule.PROBE_EXEC
    limit = volume.at("emptyDir", "sizeLimit")
    size = limit.quantity if model_bytes is None else model_bytes
    if size is None:
        yield limit, Rule.SIZE
    else:
        yield from _given_memory(pod, [agent, *(server for server, _ in servers)], size)


def _asked(agent: Container) -> tuple[Setting, Setting] | None:
    """Storage URI and folder, where `keyturn load` is called as KServe calls its storage initializer."""
    uri, folder = [Setting(None), Setting(None), *agent.arguments][-2:]
    return (uri, folder) if "://" in (uri.text or "") and (folder.text or "").startswith("/") else None


def _out(agent: Container) -> Setting | None:
    """The folder of `keyturn load`."""
    asked = _asked(agent)
    return asked[1] if asked else agent.option("--out")


def _given_memory(pod: Pod, holders: list[Container], size: int) -> Found:
    """The model counts in each of `holders`, and fits half of the guest, whose memory is the pod's limit."""

    def limit(container: Container) -> Setting:
        return container.setting.at("resources", "limits", "memory")

    small = [limit(holder) for holder in holders if (limit(holder).quantity or size) < size]
    for setting in small:
        yield setting, Rule.MEMORY
    limits = {init: [limit(c).quantity or 0 for c in pod.containers if c.init == init] for init in (True, False)}
    guest = max([sum(limits[False]), *limits[True]])  # one init container runs at a time
    if not small and guest < 2 * size:
        yield limit(holders[-1]), Rule.MEMORY


def _mounting(pod: Pod, agent: Container, mount: Setting) -> Iterator[tuple[Container, Setting]]:
    """The other containers with the volume of `mount`, and where."""
    for container in pod.containers:
        for other in container.setting.at("volumeMounts").items():
            if container is not agent and other.at("name").text == mount.at("name").text:
                yield container, other


def _gpus(pod: Pod, agents: list[Container], cfg: config.MeasuredConfig | None) -> Found:
    holders = {id(agent) for agent in agents}
    for agent in agents:
        mount = agent.mount(((_out(agent) or Setting("")).text or "").rstrip("/")) if agent.verb == "load" else None
        holders |= {id(server) for server, _ in _mounting(pod, agent, mount)} if mount else set()
    for container in pod.containers:
        limits = container.setting.at("resources", "limits")
        for name, other in limits.entries():
            if name.startswith("nvidia.com/") and name != GPU_RESOURCE:
                yield other, Rule.GPU_NAME
        limit = limits.at(GPU_RESOURCE)
        if cfg is not None and (limit.quantity or 0) != (cfg.gpu.count if id(container) in holders else 0):
            yield limit, Rule.GPU_LIMIT
    for agent in agents if cfg is not None and cfg.gpu.count else ():
        log = next((m for m in agent.setting.at("volumeMounts").items() if m.at("mountPath").text == KERNEL_LOG), None)
        if log is None:
            yield agent.setting.at("volumeMounts"), Rule.KERNEL_LOG
        elif pod.volume(log).at("hostPath", "path").text != KERNEL_LOG:
            yield pod.volume(log).at("hostPath", "path"), Rule.KERNEL_LOG


def _probes(container: Container) -> list[Setting]:
    return [container.setting.at(name) for name in ("startupProbe", "readinessProbe", "livenessProbe")]

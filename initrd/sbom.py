"""The SBOM beside the initrd: which packages its files come from. CycloneDX 1.6, JSON, the same bytes for the same locks."""

import re
import uuid
from datetime import UTC, datetime
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # RFC 9562, appendix A: names that are URLs


def document(version: str, epoch: int, debs: list[tuple[str, str, str, str]], wheels: Path) -> str:
    """The document.

    Args:
        version: of the agent.
        epoch: time of the build in Unix seconds.
        debs: (name, version, architecture, SHA-256) of each Debian package.
        wheels: lock of the guest's Python packages; each has the hashes of several wheels there, so none is told here.
    """
    agent = Component(
        name="keyturn",
        version=version,
        type=ComponentType.APPLICATION,
        bom_ref="keyturn",
        purl=PackageURL("generic", None, "keyturn", version),
    )
    components = [
        _component(
            PackageURL("deb", "debian", name, number, {"arch": architecture, "distro": "debian-12"}),
            (HashType(alg=HashAlgorithm.SHA_256, content=digest),),
        )
        for name, number, architecture, digest in debs
    ]
    for name, number in re.findall(r"^([\w.-]+)==(\S+)", wheels.read_text(), re.MULTILINE):
        components.append(_component(PackageURL("pypi", None, name, number), ()))
    bom = Bom(
        components=components,
        metadata=BomMetaData(component=agent, timestamp=datetime.fromtimestamp(epoch, UTC)),
        serial_number=uuid.uuid5(_NAMESPACE, "\n".join(sorted(str(component.purl) for component in components))),
    )
    bom.register_dependency(agent, components)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _component(purl: PackageURL, hashes: tuple[HashType, ...]) -> Component:
    kind = ComponentType.LIBRARY
    return Component(name=purl.name, version=purl.version, type=kind, purl=purl, bom_ref=str(purl), hashes=hashes)

"""What a Trustee key broker service must hold before it releases one key: a resource policy in Rego, reference values, and
the admin calls that put them there.

Owns the texts. Follows confidential-containers/trustee 78962cd: the resource policy's input, the reference values that the
default policies `default_cpu` and `default_gpu` ask for, the endpoints of protocol 0.4.0. Decides nothing and calls nobody:
what is printed here is read by an operator, and run by one.
"""

import base64
import json
import textwrap
from dataclasses import dataclass

from agent.commands.policy_values import Approved, SnpImage, TdxImage
from agent.evidence import Tee
from agent.guest.initdata import fit
from agent.handshake.rcar import PREFIX, resource_path

_WIDTH = 120
_FIELD_BYTES = {Tee.SNP: 32, Tee.TDX: 48}  # HOST_DATA, MRCONFIGID
# What Trustee's own sample verifier says of every guest.
_SAMPLE_VALUES: dict[str, object] = {
    "launch_digest": ["abcde"], "svn": ["1"], "major_version": 1, "minimum_minor_version": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """One admin request: POST of a JSON body to a path below `/kbs/v0/`."""

    path: str
    body: dict[str, object]


def resource_policy(approved: Approved) -> str:
    """The policy that releases this one key to this one image, configuration and number of GPUs and NVSwitches.

    With it the credentials of the model's store, where the configuration asks for them.
    """
    requests = "\n".join(
        f"""\
		[["{plugin}"], {json.dumps(path.split("/"))}],
		[["{plugin}"], "/{path}"],
		[[], "{plugin}/{path}"],"""
        for plugin, path in _asked(approved)
    )
    gpus = (f"gpu{number}" for number in range(approved.gpu_count))
    switches = (f"switch{number}" for number in range(approved.switch_count))
    devices = json.dumps(["cpu0", *gpus, *switches, *(["ppcie0"] if approved.switch_count else [])])
    if approved.tee is None:
        evidence = "\tevidence.sample # UNSAFE: anybody can make sample evidence, and nothing in it is compared"
    else:
        field = fit(approved.init_data, _FIELD_BYTES[approved.tee])
        # The second where an earlier release writes base64 (trustee issue 372).
        said = [field.hex(), base64.b64encode(field).decode()]
        evidence = f"\tevidence.{approved.tee.value}\n\tevidence.init_data in {json.dumps(said)}"
    return f"""\
package policy

import rego.v1

default allow := false

# {approved.model_name} version {approved.model_version}
allow if {{
	# What the guest asks for, as releases from v0.17 on, some in between and those before write it down.
	asked := [[plugin | plugin := data.plugin], data["resource-path"]]
	asked in [
{requests}
	]
	evidence := input.submods.cpu0["ear.veraison.annotated-evidence"]
{evidence}
	every device in {devices} {{
		input.submods[device]
	}}
	every submod in input.submods {{
		submod["ear.status"] == "affirming"
	}}
}}
"""


def _asked(approved: Approved) -> list[tuple[str, str]]:
    """The plugin that the guest asks for its key, and the path there; then for credentials. The policy is not about a query."""
    uris = [approved.resource_uri or approved.key_uri, *([approved.credentials_uri] if approved.credentials_uri else [])]
    paths = (resource_path(uri).removeprefix(f"{PREFIX}/").partition("?")[0] for uri in uris)
    return [(plugin, rest) for plugin, _, rest in (path.partition("/") for path in paths)]


def reference_values(approved: Approved) -> dict[str, object]:
    """The values by the names that Trustee's default policies ask for, as far as they are known."""
    values: dict[str, object] = {}
    match approved.image:
        case SnpImage(measurement, tcb):
            values["snp_launch_measurement"] = [measurement]
            if tcb is not None:
                values |= {
                    "snp_bootloader": [tcb.bootloader],
                    "snp_tee_svn": [tcb.tee],
                    "snp_snp_svn": [tcb.snp],
                    "snp_microcode": [tcb.microcode],
                }
        case TdxImage() as image:
            known = {
                "mr_td": image.mr_td,
                "rtmr_1": image.rtmr_1,
                "rtmr_2": image.rtmr_2,
                "mr_seam": image.mr_seam,  # the default policies of some releases ask for these two as well
                "tcb_svn": image.tee_tcb_svn,
                "xfam": image.xfam,
            }
            values |= {name: [value] for name, value in known.items() if value is not None}
        case None:
            values |= _SAMPLE_VALUES
    if approved.gpus:
        values["allowed_driver_versions"] = sorted({gpu.driver_version for gpu in approved.gpus})
        values["allowed_vbios_versions"] = sorted({gpu.vbios_version for gpu in approved.gpus})
    return values


def calls(approved: Approved) -> tuple[Call, ...]:
    """The registration of the reference values, then the resource policy."""
    payload = base64.b64encode(json.dumps(reference_values(approved)).encode()).decode()
    rego = base64.urlsafe_b64encode(resource_policy(approved).encode()).rstrip(b"=").decode()
    return (
        Call("reference-value", {"version": "0.1.0", "type": "sample", "payload": payload}),
        Call("resource-policy", {"policy": rego}),
    )


def hints(approved: Approved) -> tuple[str, ...]:
    """What an operator must know or decide beside the calls, one sentence or two each."""
    found = [
        "The service has one resource policy: where it has other keys too, put their rules `allow` into the same file.",
        "A registration replaces the values of the same name: list those of other images that still run beside these.",
    ]
    if approved.credentials_uri:
        found.append(
            "POST the credentials of the model's store, one JSON object of user, secret and perhaps session_token, to "
            f"{PREFIX}/resource/{_asked(approved)[1][1]}."
        )
    match approved.image:
        case SnpImage(_, tcb):
            found.append(
                "default_cpu wants the host's patch levels exactly: register the new ones before a host's firmware is updated."
                if tcb
                else "The patch levels are missing: without snp_bootloader, snp_tee_svn, snp_snp_svn and snp_microcode the "
                "hardware is not affirmed. `keyturn verify snp --json` prints them."
            )
        case TdxImage() as image:
            found.append("default_cpu affirms a TD only while Intel calls its TCB UpToDate and the collateral has not expired.")
            if image.xfam is None:
                found.append(
                    "xfam is missing: without it the configuration is not affirmed. `keyturn verify tdx --json` has it."
                )
        case None:
            found.append("UNSAFE, for tests: sample evidence is no evidence, and the default resource policy denies it.")
    if approved.gpu_count:
        found.append(
            "default_gpu affirms GPUs only on claims of NVIDIA's remote service. Where the service verifies them locally (its "
            "default, for Hopper alone), all are contraindicated until you set an attestation policy `default_gpu` of yours."
        )
        if not approved.gpus:
            found.append(
                "The GPUs' versions are missing: allowed_driver_versions and allowed_vbios_versions must be registered."
            )
    if approved.switch_count:
        found.append(
            "NVSwitches and their set (switch0 to switch3, ppcie0) appear only on claims of NVIDIA's remote service, and each "
            "needs its attestation policy, `default_switch` and `default_ppcie`: until then nothing is released."
        )
    return tuple(found)


def script(approved: Approved) -> str:
    """A POSIX shell script that makes the calls: it needs curl, base64 and KBS_URL, and reads no secret but by curl itself."""
    remarks = "\n".join(
        textwrap.fill(hint, _WIDTH, initial_indent="# * ", subsequent_indent="#   ", break_on_hyphens=False)
        for hint in hints(approved)
    )
    values = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in reference_values(approved).items())
    plugin, path = _asked(approved)[0]
    at = (
        f"POST its 32 bytes to\n# {PREFIX}/resource/{path}" if plugin == "resource" else f"that is the plugin {plugin}'s affair"
    )
    return f"""\
#!/bin/sh
# Trustee, for {approved.key_uri}. KBS_URL: the service; KBS_CA: its CA certificate; KBS_ADMIN: a file with the line
# `Authorization: Bearer …`, unless the admin interface is open. The key itself is not here: {at}.
{remarks}
set -eu
: "${{KBS_URL:?https://…}}"

post() {{ # PATH < BODY
    curl --fail-with-body --silent --show-error ${{KBS_CA:+--cacert "$KBS_CA"}} ${{KBS_ADMIN:+--header "@$KBS_ADMIN"}} \\
        --header 'Content-Type: application/json' --data-binary @- "${{KBS_URL%/}}{PREFIX}/$1"
}}

encode() {{ base64 | tr -d '\\n'; }}

values=$(encode <<'JSON'
{{
{values}
}}
JSON
)
printf '{{"version":"0.1.0","type":"sample","payload":"%s"}}' "$values" | post reference-value

policy=$(encode <<'REGO' | tr '+/' '-_' | tr -d '='
{resource_policy(approved)}REGO
)
printf '{{"policy":"%s"}}' "$policy" | post resource-policy
"""

"""`tests/` mirrors `agent/`: a module without its test file is noticed, and so is a test file without its module."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Modules without a test file of their own, and where they are tested instead.
ELSEWHERE = {
    "artifact.blobs": "test_artifact_seal",
    "cose": "test_artifact_signature",  # and test_receipt
    "receipts": "test_boot",
    "artifact.identify": "test_artifact_signature",  # from seal to boot
    "artifact.sources.directory": "test_artifact_sources",  # one contract, every source
    "artifact.sources.http": "test_artifact_sources",
    "artifact.sources.access": "test_artifact_sources_s3",
    "artifact.sources.web": "test_artifact_sources",  # its three users
    "commands.lint_findings": "test_commands_lint_rules",
    "sim.fuse": "test_sim_configfs",  # its one file system
    "artifact.sources.layout": "test_artifact_signature",
    **dict.fromkeys(("sim.trustee_as", "sim.trustee_knobs", "sim.trustee_sessions"), "test_sim_trustee"),
}
# Test files that are about more than one module.
WHOLE = {
    "test_boot_devices",
    "test_coco_with_trustee",
    "test_boot_firmware",
    "test_boot_trustee",
    "test_deploy",
    "test_devices",
    "test_fuzz",
    "test_heavy_servers",
    "test_heavy_stores",
    "test_image",
    "test_initrd",
    "test_kserve_initializer",
    "test_layout",
    "test_rcar_with_trustee",
    "test_refusals",
    "test_scripts",
    "test_sealed_vectors",
}


def names(pattern: str) -> set[str]:
    """Dotted names below `agent` of the files that match, without generated ones."""
    found = (path.relative_to(ROOT / "agent") for path in (ROOT / "agent").rglob(pattern))
    return {".".join(path.with_suffix("").parts) for path in found if "pb" not in path.parts}


def file_for(name: str) -> str:
    return "test_" + name.replace(".", "_")


MODULES = {name for name in names("*.py") if not name.endswith("__init__")}
FOLDERS = {name.removesuffix(".__init__") for name in names("__init__.py")}
TESTS = {path.stem for path in (ROOT / "tests").glob("test_*.py")}


def test_every_module_has_its_test_file_or_says_where_it_is_tested() -> None:
    assert {name for name in MODULES if file_for(name) not in TESTS} == ELSEWHERE.keys()
    assert set(ELSEWHERE.values()) <= TESTS


def test_every_test_file_has_its_module_or_folder() -> None:
    assert TESTS - {file_for(name) for name in MODULES | FOLDERS} == WHOLE

"""Entry point: replace this process by an isolated interpreter with an allow-listed environment, then the command line.

Whoever starts the agent may have set variables that steer an interpreter, a loader or a library (`PYTHONPATH`,
`SSLKEYLOGFILE`, `GRPC_TRACE`, proxies …). `-I` ignores Python's own; everything else is dropped here, before any module
that could read it is imported; `exec` alone keeps it, unread, for the program that it becomes. That no loader variable
(`LD_PRELOAD`) acted before this line rests on whoever starts us.

In the bundle the interpreter is isolated from the start, and its own loader adds variables, which are dropped last. As the
kernel's `/init` the command line is `init`, whatever words the kernel hands on.
"""

import os
import sys

# What may pass: the terminal and the search path of people, not of programs; where systemd waits for READY; and what KServe
# asks of `keyturn load`, which is held against the measured configuration.
_ALLOWED = ("TERM", "COLUMNS", "LINES", "NO_COLOR", "NOTIFY_SOCKET", "CONFIDENTIAL_ENABLED", "CONFIDENTIAL_RESOURCE_ID")
_FIXED = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "GRPC_VERBOSITY": "NONE"}
# What the bundle's loader (PyInstaller) sets for itself before it starts Python. It goes on with the path of its libraries.
_LOADER = ("_PYI_ARCHIVE_FILE", "_PYI_PARENT_PROCESS_LEVEL", "_PYI_LINUX_PROCESS_NAME", "LD_LIBRARY_PATH")
_CLEANED = "KEYTURN_CLEANED"
"""Set by us for ourselves: an environment that is still not clean after that is an error, not another turn."""
GIVEN = "KEYTURN_GIVEN"
"""Set by us for ourselves: the descriptor of what `exec` was given as environment, for the program that it becomes."""


def main() -> int:
    """Run the command line; the value is the exit status."""
    for descriptor in (0, 1, 2):  # PID 1 may be started without: then a file of ours would get the number of stderr
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
    bundled = bool(getattr(sys, "frozen", False))
    found = dict(os.environ)
    cleaned, given = found.pop(_CLEANED, None), found.pop(GIVEN, None)
    loaded = dict(found)
    if bundled and found.get("LD_LIBRARY_PATH") == sys._MEIPASS:  # type: ignore[attr-defined]  # nobody added to it
        found = {name: value for name, value in found.items() if name not in _LOADER}
    clean = {name: found[name] for name in _ALLOWED if name in found} | _FIXED
    # refusal: test_a_clean_environment_does_not_make_up_for_an_interpreter_that_is_not_isolated
    # refusal: test_an_isolated_interpreter_does_not_make_up_for_the_environment
    if not sys.flags.isolated or found != clean:
        if cleaned is not None:
            raise RuntimeError("the environment cannot be cleaned")
        clean |= {GIVEN: _keep(loaded, bundled=bundled)} if _arguments()[:1] == ["exec"] else {}
        interpreter = [sys.executable] if bundled else [sys.executable, "-I", "-m", "agent"]
        os.execve(sys.executable, [*interpreter, *_arguments()], clean | {_CLEANED: "1"})  # ourselves
    for name in (_CLEANED, *_LOADER, *(() if cleaned and given else (GIVEN,))):
        os.environ.pop(name, None)
    from agent.cli import main as cli_main

    return cli_main(_arguments())


def _keep(found: dict[str, str], *, bundled: bool) -> str:
    """The number of a descriptor with these variables, as /proc/PID/environ has them. It stays open across exec."""
    if bundled:  # its loader keeps what there was before it under another name
        before = found.pop("LD_LIBRARY_PATH_ORIG", None)
        found = {name: value for name, value in found.items() if name not in _LOADER}
        found |= {"LD_LIBRARY_PATH": before} if before is not None else {}
    descriptor = os.memfd_create("environment", 0)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in found.items()))
    return str(descriptor)


def _arguments() -> list[str]:
    """Our words; as the kernel's first program none of them is anybody's who may choose the verb."""
    if os.getpid() == 1 and os.path.basename(sys.argv[0]) == "init":
        return ["init"]
    return sys.argv[1:]


if __name__ == "__main__":
    sys.exit(main())

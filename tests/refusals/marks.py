"""Which security checks there are, as they are marked beside themselves, and the source without one of them.

A marker stands on a line of its own above the statement that refuses, and names tests that turn red without it:

    # refusal: test_a_report_of_another_chip_than_the_certificate_is_refused
    if leaf.chip_id() != report.chip_id:
        raise _failed(EvidenceCheck.CERTIFICATE_CHIP_ID)

A bare name is a test in the module's own file (`tests/test_layout.py` says which); another one is `test_boot.py::test_…`.

A marker above a call of `REFUSING_CALLS` is for all such calls that follow directly.

What is removed: an `if` is never entered, a condition that is returned holds, as does an `and` handed to a call; any other
simple statement is not there. A condition of several parts is as many checks: each is removed alone.

Runs nothing: that is `__main__.py`.
"""

import ast
import io
import itertools
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Where every refusal is marked: a `raise` outside an `except`, but for RuntimeError (our bug), and a call of these functions.
COMPLETE = (
    "agent/artifact/compact_jwe.py",
    "agent/artifact/kserve.py",
    "agent/artifact/luks2.py",
    "agent/artifact/manifest.py",
    "agent/artifact/openssf.py",
    "agent/artifact/stream.py",
    "agent/artifact/volume_config.py",
    "agent/broker/anchors.py",
    "agent/broker/authority.py",
    "agent/broker/keystore.py",
    "agent/broker/policy.py",
    "agent/config_source.py",
    "agent/evidence/coco.py",
    "agent/evidence/collect.py",
    "agent/evidence/gate.py",
    "agent/evidence/gpu_abi.py",
    "agent/evidence/nscq.py",
    "agent/evidence/precheck.py",
    "agent/guest/api_server.py",
    "agent/handshake/cdh.py",
    "agent/handshake/ear.py",
    "agent/handshake/jws.py",
    "agent/handshake/machine.py",
    "agent/handshake/rcar_token.py",
    "agent/handshake/token.py",
    "agent/keys.py",
    "agent/verify/crl.py",
    "agent/verify/nvidia.py",
    "agent/verify/ppcie.py",
    "agent/verify/snp.py",
    "agent/verify/tdx.py",
)
REFUSING_CALLS = {"_require", "require", "equal", "one_of"}

_MARKER = re.compile(r"# refusal: (\S+(?: \S+)*)")
_SIMPLE = (ast.Assign, ast.AugAssign, ast.Delete, ast.Expr, ast.Raise, ast.Return)


class MarkerError(Exception):
    """A marker that cannot be obeyed, or a refusal without one; the text says where."""


@dataclass(frozen=True, slots=True)
class Removal:
    """One check, or one part of its condition, and the source without it.

    Attributes:
        path: relative to the root of the project.
        line: of the statement.
        removed: the text that goes.
        tests: pytest's names of the tests, one of which must fail.
        source: of the whole file, without it.
    """

    path: str
    line: int
    removed: str
    tests: tuple[str, ...]
    source: bytes

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {' '.join(self.removed.split())}"


def removals(root: Path) -> list[Removal]:
    """Every check below `root/agent`, in the order of the files.

    Raises:
        MarkerError: naming every marker and every refusal that is not in order.
    """
    found: list[Removal] = []
    wrong: list[str] = []
    for path in sorted((root / "agent").rglob("*.py")):
        name = str(path.relative_to(root))
        try:
            found += removals_in(name, path.read_bytes())
        except MarkerError as error:
            wrong.append(str(error))
    there: dict[str, set[str]] = {}
    for removal in found:
        for test in removal.tests:
            file, _, function = test.partition("::")
            if file not in there:
                there[file] = _functions(root / file)
            if function not in there[file]:
                wrong.append(f"{removal.path}:{removal.line}: there is no {test}")
    if wrong:
        raise MarkerError("\n".join(dict.fromkeys(wrong)))
    return found


def removals_in(path: str, source: bytes) -> list[Removal]:
    """The checks of one file. Raises MarkerError."""
    tree = ast.parse(source)
    statements = {node.lineno: node for node in ast.walk(tree) if isinstance(node, ast.stmt)}
    marks = _marks(path, source)
    marked: dict[int, list[str]] = {}
    for line, tests in marks.items():
        at = _next_statement(source, line)
        if not isinstance(statements.get(at), (ast.If, *_SIMPLE)):
            raise MarkerError(f"{path}:{line}: a marker stands just above the `if` or the simple statement that refuses")
        marked.setdefault(at, []).extend(tests)
    for at, tests in sorted(marked.items(), reverse=True):  # a marker further down takes its statements out of a run
        for statement in _run(tree, statements[at]):
            marked.setdefault(statement.lineno, tests)
    if path in COMPLETE:
        covered = {line for at in marked for line in range(at, _last_line(statements[at]) + 1)}
        if bare := [node.lineno for node in _refusals(tree) if node.lineno not in covered]:
            raise MarkerError("\n".join(f"{path}:{line}: a refusal without a marker" for line in bare))
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    found = []
    for at, tests in sorted(marked.items()):
        for node, instead in _parts(statements[at]):
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            without = source[:start] + instead.encode() + source[end:]
            found.append(Removal(path, at, source[start:end].decode(), tuple(tests), without))
    return found


def _marks(path: str, source: bytes) -> dict[int, list[str]]:
    """The tests that each marker names, by its line."""
    own = f"tests/test_{path.removeprefix('agent/').removesuffix('.py').removesuffix('/__init__').replace('/', '_')}.py"
    marks = {}
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.COMMENT and "refusal:" in token.string:
            match = _MARKER.fullmatch(token.string)
            if match is None or token.line.strip() != token.string:
                raise MarkerError(f"{path}:{token.start[0]}: a marker is a line `# refusal: TEST…`")
            marks[token.start[0]] = [f"tests/{t}" if "::" in t else f"{own}::{t}" for t in match[1].split()]
    for line, text in enumerate(source.decode().splitlines(), 1):
        if "# refusal:" in text and line not in marks:
            raise MarkerError(f"{path}:{line}: a marker inside a text")
    return marks


def _next_statement(source: bytes, line: int) -> int:
    """The line of the statement under a comment; other comments may stand between."""
    lines = source.decode().splitlines()
    while line < len(lines) and lines[line].lstrip().startswith("#"):
        line += 1
    return line + 1


def _last_line(statement: ast.stmt) -> int:
    """Of what a marker is for: an `elif` or `else` is another check."""
    last = statement.body[-1] if isinstance(statement, ast.If) else statement
    return last.end_lineno or last.lineno


def _refusals(tree: ast.AST) -> Iterator[ast.stmt]:
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.ExceptHandler():  # translates what something else refused
                continue
            case ast.Raise(exc=ast.Name("RuntimeError") | ast.Call(func=ast.Name("RuntimeError"))):
                continue
            case ast.Raise():
                yield node
            case ast.Expr() if _is_refusing_call(node):
                yield node
        yield from _refusals(node)


def _is_refusing_call(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(ast.Call(func=ast.Name(name))):
            return name in REFUSING_CALLS
    return False


def _run(tree: ast.AST, first: ast.stmt) -> Iterator[ast.stmt]:
    """The statement under a marker and, when it is a refusing call, the refusing calls that follow directly."""
    yield first
    for parent in ast.walk(tree):
        for _, block in ast.iter_fields(parent):
            if isinstance(block, list) and first in block and _is_refusing_call(first):
                yield from itertools.takewhile(_is_refusing_call, block[block.index(first) + 1 :])


def _parts(statement: ast.stmt) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """What is replaced by what, each for itself."""
    match statement:
        case ast.If():
            yield from _decided(statement.test, False)
        case ast.Return(value=ast.expr() as value):
            yield from _decided(value, True)
        case ast.Expr(ast.Call(args=[*_, ast.BoolOp(op=ast.And()) as condition])) | ast.Expr(
            ast.Call(args=[ast.BoolOp(op=ast.And()) as condition, *_])
        ):
            yield from _decided(condition, True)
        case _:
            yield statement, "pass"


def _decided(condition: ast.expr, holds: bool) -> Iterator[tuple[ast.expr, str]]:
    """The parts of a condition, any of which alone can keep it from being `holds`."""
    if isinstance(condition, ast.BoolOp):
        parts = [list(_decided(part, holds)) for part in condition.values]
        if not isinstance(condition.op, ast.And if holds else ast.Or):  # one part is as good as the whole, unless it has parts
            parts = [part for part in parts if len(part) > 1] or [[(condition, str(holds))]]
        yield from itertools.chain.from_iterable(parts)
    elif isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
        yield from _decided(condition.operand, not holds)
    else:
        yield condition, str(holds)


def _functions(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    return {node.name for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.FunctionDef)}

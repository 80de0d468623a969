"""`scripts/faults`: run the fault table and print it as one report.

The report is made from what the rows' own tests measured; pytest runs them, two at a time, and its status is ours.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

Finding = Mapping[str, Any]


class Findings:
    """A plugin that keeps what every row came to."""

    def __init__(self) -> None:
        self.rows: list[Finding] = []
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [value for name, value in report.user_properties if name == "fault" and isinstance(value, dict)]
        if report.failed:
            self.failed.append(report.nodeid)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/faults",
        description="Run every row of the fault table against the real broker and agent, on simulated silicon.",
        epilog="Arguments after -- go to pytest: scripts/faults --report -- -k server",
    )
    parser.add_argument("--report", action="store_true", help="print rows, classes, owners, residue and leaks as one table")
    parser.add_argument("--rows", action="store_true", help="with --report: print every row as well")
    parser.add_argument("pytest", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)

    found = Findings()
    quiet = ["-q", "--no-header", "-r", "fE"] if asked.report else []
    status = int(pytest.main(["-n", "2", *quiet, *asked.pytest, "tests/faults"], plugins=[found]))
    if asked.report:
        sys.stdout.write(report(found, every_row=asked.rows))
    return status


def report(found: Findings, *, every_row: bool) -> str:
    """The table."""
    rows = sorted(found.rows, key=lambda row: (row["group"], row["name"]))
    lines = [""]
    if every_row:
        lines += [f"{row['group']:14} {row['name']:62} {row['error']:27} {row['exit_status']:3} {row['owner']}" for row in rows]
        lines.append("")
    lines += [f"{'group':14} {'rows':>5} {'classes':>8} {'residue':>8} {'leaks':>6}"]
    for group in [*dict.fromkeys(row["group"] for row in rows), "all"]:
        of_group = [row for row in rows if group in ("all", row["group"])]
        lines.append(
            f"{group:14} {len(of_group):5} {len({row['error'] for row in of_group} - {''}):8} "
            f"{sum(len(row['residue']) for row in of_group):8} {sum(len(row['leaks']) for row in of_group):6}"
        )
    owners = Counter(row["owner"] for row in rows if row["owner"])
    lines += ["", "rows by owner: " + ", ".join(f"{owner} {count}" for owner, count in owners.most_common())]
    lines += [f"failed: {name}" for name in found.failed]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

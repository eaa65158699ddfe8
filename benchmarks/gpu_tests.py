"""Runs the tests that need a Hopper GPU and records them:  python -m benchmarks.gpu_tests [arguments of pytest]"""

import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from typing import Any

from benchmarks import measure

OUT = measure.RESULTS / "gpu_tests.json"
WORKERS = 12  # compiling takes most of the time


def outcomes(report: str) -> dict[str, Any]:
    """Counts of a JUnit report, in all and by file, and what did not pass."""
    by_file: dict[str, Counter] = {}
    not_passed = []
    for case in xml.fromstring(report).iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = bad[0] if bad else "passed"
        by_file.setdefault(case.get("classname", ""), Counter())[outcome] += 1
        if bad:
            not_passed.append(f"{case.get('classname')}::{case.get('name')} {outcome}")
    counts = sum(by_file.values(), Counter())
    return {"counts": dict(counts), "by_file": {name: dict(c) for name, c in by_file.items()}, "not_passed": not_passed}


def main() -> int:
    """Returns pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--numprocesses={WORKERS}", f"--junitxml={report}"]
        # The workers share the card, so none may reserve its memory.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        status = subprocess.run([*command, *sys.argv[1:]], env=environment, check=False).returncode
        if report.exists():
            results = outcomes(report.read_text())
            print(results["counts"])
            if set(results["counts"]) - {"skipped"}:  # all are skipped where there is no GPU
                measure.record(OUT, {"gpu": results})
    return status


if __name__ == "__main__":
    sys.exit(main())

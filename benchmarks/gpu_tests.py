"""Runs the tests that need a Hopper GPU and records them:  python -m benchmarks.gpu_tests [arguments of pytest]

The record is kept by file, so that some files can be run again without the others. Files that are no more leave it.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from typing import Any

from benchmarks import measure

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT = measure.RESULTS / "gpu_tests.json"
WORKERS = min(16, os.cpu_count() or 1)  # processes of pytest; compiling takes most of the time


def outcomes(report: str) -> dict[str, dict[str, Any]]:
    """Counts the outcomes in a JUnit report.

    Returns:
      By file, as a path from the repository's root: how many tests had each outcome, and those that did not pass.
    """
    counts: dict[str, Counter] = {}
    bad: dict[str, list[str]] = {}
    for case in xml.fromstring(report).iter("testcase"):
        module = case.get("classname")  # pytest's: the file's path with dots, tests here being no methods
        if not module:  # a test that was interrupted
            continue
        file = module.replace(".", "/") + ".py"
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts.setdefault(file, Counter())[outcome] += 1
        if outcome != "passed":
            bad.setdefault(file, []).append(f"{case.get('name')} {outcome}")
    return {file: {"counts": dict(count), "not_passed": bad.get(file, [])} for file, count in counts.items()}


def main() -> int:
    """Runs pytest, records what ran, and returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="interrupt the tests after so long, and record those that ran")
    arguments, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--numprocesses={WORKERS}", f"--junitxml={report}"]
        # The workers share the card and the cores, so none may take all of the memory or a thread for each core.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OPENBLAS_NUM_THREADS": "1"}
        tests = subprocess.Popen([*command, *others], env=environment)
        try:
            status = tests.wait(arguments.seconds)
        except subprocess.TimeoutExpired:
            tests.send_signal(signal.SIGINT)
            status = tests.wait() or 1
        if report.exists():
            results = outcomes(report.read_text())
            print(sum((Counter(result["counts"]) for result in results.values()), Counter()))
            ran = {file: result for file, result in results.items() if set(result["counts"]) - {"skipped"}}
            if ran:  # all are skipped where there is no GPU
                measure.record(OUT, ran, keep=lambda file: (ROOT / file).is_file())
    return status


if __name__ == "__main__":
    sys.exit(main())

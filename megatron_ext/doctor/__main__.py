"""Print the report; exit code 1 where there is a problem.

python -m megatron_ext.doctor
python -m megatron_ext.doctor --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter

from megatron_ext.doctor import examine


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ext.doctor",
        description="Look at versions, GPUs, limits and variables, and say what is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="findings as a JSON list")
    options = parser.parse_args()
    findings = examine()
    if options.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        for level, subject, text, remedy in findings:
            print(f"{level:8} {subject}: {text}")
            if remedy:
                print(f"{'':8}   -> {remedy}")
        count = Counter(finding.level for finding in findings)
        print(f"{count['problem']} problems, {count['warning']} warnings, {count['note']} notes")
    return int(any(finding.level == "problem" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())

"""Run every benchmark of this folder, one after another.

python benchmarks/run_all.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NAMES = [
    "bench_help",
    "bench_noop",
    "bench_epoch",
    "bench_store",
    "bench_scale",
    "bench_write",
    "bench_remote",
    "bench_extract",
]


def main() -> int:
    worst = 0
    for name in NAMES:
        print(f"== {name}", flush=True)
        path = Path(__file__).with_name(f"{name}.py")
        worst = max(worst, subprocess.run([sys.executable, path], check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())

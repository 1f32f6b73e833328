"""`mer --help` against an empty Python process.

python benchmarks/bench_help.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 15


def best(argv: list[str]) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        subprocess.run(argv, capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    empty = best([sys.executable, "-c", "pass"])
    for command in ([], ["extract"], ["train-head"]):
        ours = best([str(Path(sys.executable).with_name("mer")), *command, "--help"])
        name = " ".join(["mer", *command, "--help"])
        print(f"{name:24}{ours:.3f} s   python -c pass {empty:.3f} s   ratio {ours / empty:.1f}")
    print("target: ratio ≤ 6 and below 0.3 s")


if __name__ == "__main__":
    main()

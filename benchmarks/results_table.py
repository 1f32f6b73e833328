"""The README's table: heads, their vote and classical baselines on the same folds.

    python benchmarks/results_table.py [--data DIR] [--cache DIR] [--out DIR]

Runs what a user would run, as processes: `mer extract` (twice: the second must compute nothing),
`mer train-head` for `simple` and `mdat` with three seeds, `mer ensemble-vote`. ``--data`` holds
``RAVDESS/`` and ``nEMO/`` as distributed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# corpus, its folder, protocol; RAVDESS by EmoBox's folds needs 24 actors, fewer leave folds out
CASES = [
    ("ravdess", "RAVDESS", "ravdess-6fold-emobox"),
    ("ravdess", "RAVDESS", "loso"),
    ("nemo", "nEMO", "nemo-loso"),
]
HEADS = ("simple", "mdat")
BASELINES = {
    "majority": "majority class",
    "logreg": "logistic regression, eGeMAPS",
    "svm": "linear SVM, eGeMAPS",
}
Result = Mapping[str, Any]


def mer(*argv: object) -> Result:
    command = [sys.executable, "-m", "mer.cli", *map(str, argv), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def cell(summary: Mapping[str, float], spread: bool) -> str:
    text = f"{100 * summary['mean']:.1f}"
    return text + (f" ± {100 * summary['sd']:.1f}" if spread else "")


def row(corpus: str, name: str, metrics: Mapping[str, Any], spread: bool = False) -> str:
    return f"| {corpus} | {name} | {cell(metrics['UA'], spread)} | {cell(metrics['WA'], spread)} |"


def run_case(corpus: str, root: Path, protocol: str, cache: Path, out: Path) -> list[str]:
    recipes = [f"{head}-{corpus}" for head in HEADS]
    for recipe in recipes:
        mer("extract", corpus, "--root", root, "--recipe", recipe, "--cache", cache)
    for recipe in recipes:
        again = mer("extract", corpus, "--root", root, "--recipe", recipe, "--cache", cache)
        assert again["computed"] == 0, again
    runs = {}
    for head, recipe in zip(HEADS, recipes, strict=True):
        where = ("--root", root, "--cache", cache, "--out", out / recipe)
        split = ("--seeds", "1,2,3", "--set", f"evaluation.protocol={protocol}")
        runs[head] = mer("train-head", recipe, *where, *split)
    vote = mer(
        "ensemble-vote",
        *(r["run"] for r in runs.values()),
        "--method",
        "soft",
        "--out",
        out / "vote",
    )
    first = runs[HEADS[0]]
    case = f"{corpus}, {protocol}, {len(first['folds'])} folds"
    rows = [
        row(case, text, first["baselines"][name]["metrics"])
        for name, text in BASELINES.items()
        if name in first["baselines"]
    ]
    rows += [row(case, f"`{head}`", run["metrics"], True) for head, run in runs.items()]
    rows.append(row(case, "soft vote of both", vote["metrics"]))
    seconds = " and ".join(f"{run['seconds']:.0f} s" for run in runs.values())
    trainings = len(first["folds"]) * 3
    print(
        f"{case}: {first['utterances']} utterances, validation {first['validation']}; "
        f"{trainings} trainings each in {seconds}",
        file=sys.stderr,
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parents[1]
    data = Path(os.environ.get("MER_SHARED_DATA", here.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache, out = options.cache or Path(folder) / "cache", options.out or Path(folder) / "runs"
        lines = ["| corpus, protocol | model | UA % | WA % |", "|---|---|---|---|"]
        for corpus, name, protocol in CASES:
            root = options.data / name
            lines += run_case(corpus, root, protocol, cache, out / f"{corpus}-{protocol}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

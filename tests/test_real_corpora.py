"""The whole path on real recordings, by the commands a researcher types."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.real_data, pytest.mark.timeout(1200)]

FEATURES = ("-f", "crepe:model=tiny", "-f", "logmel", "-f", "egemaps")
CASES = {"ravdess": ("RAVDESS", 240), "nemo": ("nEMO", 264)}


def mer(*argv, code=0):
    command = [sys.executable, "-m", "mer.cli", *map(str, argv), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("corpus", CASES)
def test_extract_train_vote_and_nothing_is_computed_twice(shared_data, tmp_path, corpus):
    folder, utterances = CASES[corpus]
    where = ("--root", shared_data / folder, "--cache", tmp_path / "cache")
    first = mer("extract", corpus, *where, *FEATURES)
    assert (first["utterances"], first["computed"], first["failed"]) == (
        utterances,
        3 * utterances,
        0,
    )
    again = mer("extract", corpus, *where, *FEATURES, "--verify", 2)
    assert (again["computed"], again["reused"]) == (0, 3 * utterances)
    assert all(difference < 1e-3 for difference in again["verified"].values())

    runs = {}
    for head in ("simple", "mdat"):
        out = tmp_path / head
        options = ("--extract", "--seeds", "1,2,3", "--out", out)
        runs[head] = mer("train-head", f"{head}-{corpus}", *where, *options)
        chance = runs[head]["baselines"]["majority"]["metrics"]["UA"]["mean"]
        logreg = runs[head]["baselines"]["logreg"]["metrics"]["UA"]["mean"]
        reached = runs[head]["metrics"]["UA"]["mean"]
        assert reached > chance + 0.1
        assert reached > logreg - 0.03  # the standard error of 240 test utterances
    vote = mer("ensemble-vote", tmp_path / "simple", tmp_path / "mdat", "--out", tmp_path / "vote")
    assert len(vote["members"]) == 2
    assert set(vote["gain"]) == {"UA", "WA", "WF1", "macro_F1"}


def test_emodb_is_read_as_distributed(shared_data, tmp_path):
    where = ("--root", shared_data / "EmoDB", "--cache", tmp_path)
    result = mer("extract", "emodb", *where, "-f", "logmel")
    assert (result["utterances"], result["computed"]) == (7, 7)


def test_git_lfs_pointers_are_reported_and_not_decoded(shared_data, tmp_path):
    where = ("--root", shared_data / "CREMA-D")
    result = mer("extract", "cremad", *where, "-f", "logmel", "--cache", tmp_path, code=3)
    assert (result["utterances"], result["computed"], result["failed"]) == (12, 0, 12)
    assert all("LFS pointer" in failure["reason"] for failure in result["failures"])
    assert mer("corpora", "check", "cremad", *where, code=3)

"""The page that explains extractors runs as printed."""

import re
from pathlib import Path

import numpy as np
import soundfile

README = Path(__file__).parents[2] / "extract" / "README.md"


def test_the_example_runs_and_its_features_are_reused(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 16_000)
    soundfile.write("a.wav", noise, 16_000)
    for printed in ("1 0 0", "0 1 0"):
        scope = {"__name__": "readme"}
        for block in blocks:
            exec(compile(block, str(README), "exec"), scope)
        assert capsys.readouterr().out.strip() == printed
    keys = list(scope["planned"].keys["audio"].values())
    frames = scope["cache"].open(scope["Loudness"]().spec).frames(keys[0], "loudness")
    assert frames.shape == (100, 1)

"""Extraction against its bound and against the customary loop, on one model and one set of clips.

    python benchmarks/bench_extract.py [--corpus ravdess --root DIR] [--family hubert] [--layers 4]

Three ways to bring the same features about, interleaved, best of ``--rounds``:

bare      forward passes alone, on inputs decoded, prepared, sorted by length and padded beforehand
mer       plan, hash, decode, prepare, forward, write a store (what `mer extract` does)
one-file  the customary script: for each file decode, forward, save one .npy

The model has random weights (the time does not depend on them) and is loaded before all three.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mer.cache.home import Cache
from mer.extract.audio import decode
from mer.extract.contract import Extractor, RaggedBatch
from mer.extract.engine import BATCH_SECONDS, blocks, resolve_device, run
from mer.extract.plan import plan
from mer.extract.registry import create
from mer.pipelines import corpora
from mer.pipelines.extraction import sources_of

SIZES = {"base": (768, 12, 3072), "large": (1024, 16, 4096)}


def checkpoint(folder: Path, family: str, size: str, layers: int) -> Path:
    import transformers

    width, attention_heads, inner = SIZES[size]
    options = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": attention_heads,
        "intermediate_size": inner,
    }
    if size == "large":
        options |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    prefix = {"hubert": "Hubert", "wavlm": "WavLM", "wav2vec2": "Wav2Vec2"}[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**options)
    getattr(transformers, f"{prefix}Model")(config).eval().save_pretrained(folder)
    return folder


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def padded_batches(extractor: Extractor, sources, seconds: float, device: str) -> list[RaggedBatch]:
    inputs = [extractor.prepare(decode(source.path)) for source in sources]
    durations = [len(data) / 16_000 for data in inputs]
    batches = []
    for block in blocks(range(len(inputs)), durations.__getitem__, seconds):
        data = torch.nn.utils.rnn.pad_sequence([inputs[i] for i in block], batch_first=True)
        lengths = torch.tensor([len(inputs[i]) for i in block])
        batches.append(RaggedBatch(data.to(device), lengths))
    return batches


def time_bare(extractor: Extractor, batches: list[RaggedBatch], device: str) -> float:
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            extractor.forward(batch)
    synchronise(device)
    return time.perf_counter() - started


def time_mer(extractor: Extractor, sources, seconds: float, device: str) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder))
        started = time.perf_counter()
        report = run(
            plan(sources, [("bench", extractor)], cache),
            cache,
            device=device,
            batch_seconds=seconds,
        )
        elapsed = time.perf_counter() - started
    assert report.computed == len(sources), report.failures[:3]
    return elapsed, report.padding_waste


def time_one_file(extractor: Extractor, sources, device: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with torch.inference_mode():
            for source in sources:
                data = extractor.prepare(decode(source.path))
                batch = RaggedBatch(data[None].to(device), torch.tensor([len(data)]))
                for name, output in extractor.forward(batch).items():
                    np.save(f"{folder}/{source.id.replace('/', '_')}-{name}.npy", output.data.cpu())
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", default="demo")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--family", default="hubert", choices=["hubert", "wavlm", "wav2vec2"])
    parser.add_argument("--size", default="base", choices=SIZES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--batch-seconds", type=float)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    device = resolve_device(options.device)
    seconds = options.batch_seconds or BATCH_SECONDS[device.split(":")[0], "audio"]
    with tempfile.TemporaryDirectory() as folder:
        manifest = corpora.load(options.corpus, options.root or Path(folder) / "demo")
        step = max(1, len(manifest.utterances) // options.clips)
        sources = sources_of(manifest)[::step][: options.clips]
        model = checkpoint(Path(folder) / "model", options.family, options.size, options.layers)
        extractor = create(f"{options.family}:model={model}")
        extractor.load(device)
        batches = padded_batches(extractor, sources, seconds, device)
        time_bare(extractor, batches[-1:], device)
        bare, mer, one, waste = [], [], [], 0.0
        for _ in range(options.rounds):
            bare.append(time_bare(extractor, batches, device))
            elapsed, waste = time_mer(extractor, sources, seconds, device)
            mer.append(elapsed)
            one.append(time_one_file(extractor, sources, device))
    audio = sum(float(batch.lengths.sum()) for batch in batches) / 16_000
    print(f"{options.family}-{options.size}, {options.layers} layers, {device}: ", end="")
    print(f"{len(sources)} clips, {audio:.0f} s of {options.corpus}, padding waste {waste:.1%}")
    print(f"{'':10}{'seconds':>9}{'× real time':>13}")
    for name, times in [("bare", bare), ("mer", mer), ("one-file", one)]:
        print(f"{name:10}{min(times):9.2f}{audio / min(times):13.1f}")
    print(f"mer ÷ bare        {min(mer) / min(bare):.3f}   (target ≤ 1.10)")
    target = "≥ 10" if device.startswith("cuda") else "≥ 1.5"
    print(f"one-file ÷ mer    {min(one) / min(mer):.2f}    (target {target})")


if __name__ == "__main__":
    sys.exit(main())

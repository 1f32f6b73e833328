"""Hypothesis strategies for the values that cross our interfaces."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mer.cache.spec import FeatureSpec, OutputSpec

FLOAT16_MAX = 65504.0

keys = st.binary(min_size=16, max_size=16)

json_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
json_values = st.recursive(
    json_scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), inner)
    ),
    max_leaves=8,
)
identities = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=4), json_values, min_size=1, max_size=6
)


@st.composite
def output_specs(draw: st.DrawFn, name: str) -> OutputSpec:
    """Any output a store may hold."""
    kind = draw(st.sampled_from(["frames", "codes", "pooled"]))
    dtypes = ["uint8", "uint16", "uint32"] if kind == "codes" else ["float16", "float32"]
    return OutputSpec(
        name=name,
        dim=draw(st.sampled_from([1, 2, 3, 17])),
        rate_hz=draw(st.sampled_from([None, 50.0, 100.0])),
        dtype=draw(st.sampled_from(dtypes)),
        kind=kind,
    )


@st.composite
def feature_specs(draw: st.DrawFn) -> FeatureSpec:
    """Any feature: one to three outputs."""
    names = draw(st.lists(st.sampled_from(["final", "layer_0", "code"]), min_size=1, unique=True))
    outputs = tuple(draw(output_specs(name)) for name in names)
    return FeatureSpec(slug="any", identity={"name": "any"}, outputs=outputs)


def frames(output: OutputSpec, max_frames: int = 40) -> st.SearchStrategy[np.ndarray]:
    """Arrays an extractor may yield for ``output``, (T, D); floats within the range of float16."""
    length = st.just(1) if output.kind == "pooled" else st.integers(0, max_frames)
    shape = length.map(lambda n: (n, output.dim))
    if output.kind == "codes":
        return hnp.arrays(output.dtype, shape)
    limit = float(FLOAT16_MAX)
    return hnp.arrays(np.float32, shape, elements=st.floats(-limit, limit, width=32))


def utterances(spec: FeatureSpec) -> st.SearchStrategy[dict[str, np.ndarray]]:
    """Every output of ``spec`` for one utterance."""
    return st.fixed_dictionaries({output.name: frames(output) for output in spec.outputs})


def as_stored(array: np.ndarray, output: OutputSpec) -> Any:
    """Return what reading must give back."""
    return array.astype(output.dtype)

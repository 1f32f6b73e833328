"""Text encoders: tokens, special tokens, limits, and parity with plain transformers."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import torch

from mer.cache.errors import CheckpointError, TextError, UsageError
from mer.extract import registry
from mer.extract.checkpoint import quiet_transformers
from mer.extract.contract import RaggedBatch
from mer.extract.text import TextEncoder

SENTENCE = "the lazy dog"


@pytest.fixture(scope="module", params=["roberta", "bert"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoints.text(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A RoBERTa that a test may change."""
    return tiny_checkpoints.text(tmp_path / "model")


def create(folder: Path, **options: str) -> TextEncoder:
    return TextEncoder.from_options("text", {"model": str(folder), **options})


def vectors(extractor: TextEncoder, *texts: str) -> list[dict[str, np.ndarray]]:
    extractor.load("cpu")
    ids = [extractor.prepare(text) for text in texts]
    data = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    out = extractor.forward(RaggedBatch(data, torch.tensor([len(row) for row in ids])))
    rows = {name: ragged.unpad() for name, ragged in out.items()}
    return [{name: values[i].numpy() for name, values in rows.items()} for i in range(len(texts))]


def upstream(folder: Path, text: str) -> tuple[list[int], list[np.ndarray]]:
    """Return token ids and hidden states of one text by transformers alone."""
    with quiet_transformers() as transformers:
        model = transformers.AutoModel.from_pretrained(folder).eval()
        tokens = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
        with torch.inference_mode():
            out = model(**tokens, output_hidden_states=True)
    states = [state[0].numpy() for state in (*out.hidden_states, out.last_hidden_state)]
    return tokens["input_ids"][0].tolist(), states


def test_tokens_and_layers_equal_plain_transformers(published: Path) -> None:
    extractor = create(published, layers="all")
    ids, states = upstream(published, SENTENCE)
    (ours,) = vectors(extractor, SENTENCE)
    assert extractor.prepare(SENTENCE).tolist() == ids
    assert list(ours) == ["layer_0", "layer_1", "layer_2", "final"]
    for name, state in zip(ours, states, strict=True):
        np.testing.assert_allclose(ours[name], state, atol=1e-5)


def test_special_tokens_are_kept_or_dropped_but_always_seen(published: Path) -> None:
    (kept,) = vectors(create(published), SENTENCE)
    (dropped,) = vectors(create(published, special="drop"), SENTENCE)
    np.testing.assert_array_equal(dropped["final"], kept["final"][1:-1])


def test_pooling_takes_real_tokens_only(published: Path) -> None:
    texts = (SENTENCE, "a")
    tokens = vectors(create(published, special="drop"), *texts)
    means = vectors(create(published, special="drop", pooled="mean"), *texts)
    firsts = vectors(create(published, pooled="first"), *texts)
    every = vectors(create(published), *texts)
    for token, mean, first, all_of_them in zip(tokens, means, firsts, every, strict=True):
        np.testing.assert_allclose(mean["final"], token["final"].mean(0, keepdims=True), atol=1e-5)
        np.testing.assert_allclose(first["final"], all_of_them["final"][:1], atol=1e-5)


def test_outputs_are_tokens_or_one_pooled_vector(published: Path) -> None:
    (tokens,), (pooled,) = create(published).outputs, create(published, pooled="mean").outputs
    assert (tokens.kind, tokens.rate_hz, pooled.kind, pooled.rate_hz) == (
        "frames",
        None,
        "pooled",
        None,
    )


def test_frames_are_known_before_the_model_is_loaded(published: Path) -> None:
    assert create(published, special="drop").num_frames(7) == {"final": 5}
    assert create(published).num_frames(7) == {"final": 7}


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_a_text_without_a_token_is_refused(published: Path, text: str) -> None:
    with pytest.raises(TextError, match="holds no token"):
        create(published).prepare(text)


def test_the_longest_text_runs_and_one_token_more_is_refused_or_cut_on_request(
    published: Path,
) -> None:
    extractor = create(published)
    room = extractor.max_tokens - 2
    (longest,) = vectors(extractor, "a" * 1 + " a" * (room - 1))
    assert len(longest["final"]) == extractor.max_tokens
    with pytest.raises(TextError, match=f"has {room + 1} tokens, the model sees at most {room}"):
        extractor.prepare("a" + " a" * room)
    (cut,) = vectors(create(published, long="truncate"), "a" + " a" * (room + 5))
    np.testing.assert_array_equal(cut["final"], longest["final"])


def test_limit_is_what_the_position_table_holds(published: Path) -> None:
    expected = {
        "roberta": 38,
        "bert": 40,
    }  # 40 positions, of which RoBERTa leaves the first two unused
    assert (
        create(published).max_tokens
        == expected[json.loads((published / "config.json").read_text())["model_type"]]
    )


def test_tokens_are_the_same_from_many_threads(published: Path) -> None:
    texts = [f"the dog {'a ' * i}" for i in range(1, 15)] * 4
    expected = [create(published).prepare(text).tolist() for text in texts[:14]] * 4
    shared = create(published)
    with ThreadPoolExecutor(8) as pool:
        assert [ids.tolist() for ids in pool.map(shared.prepare, texts)] == expected


@pytest.mark.parametrize("option", ["special", "pooled", "long", "precision", "dtype"])
def test_values_out_of_range_are_refused(published: Path, option: str) -> None:
    with pytest.raises(UsageError, match=f"{option}=odd is not known; expected "):
        create(published, **{option: "odd"})


@pytest.mark.parametrize("option", [{"special": "drop"}, {"pooled": "mean"}, {"long": "truncate"}])
def test_every_option_is_part_of_the_identity(published: Path, option: dict[str, str]) -> None:
    assert create(published).spec.identity != create(published, **option).spec.identity


# Checkpoints ------------------------------------------------------------------------------------


def test_another_tokenizer_is_another_feature(folder: Path) -> None:
    before = create(folder).spec.identity
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert create(folder).spec.identity != before


def test_a_registered_name_takes_models_of_its_family_only(tmp_path: Path) -> None:
    folder = tiny_checkpoints.text(tmp_path / "bert", "bert")
    with pytest.raises(
        CheckpointError, match="is a 'bert' model; feature 'roberta' takes roberta or"
    ):
        registry.create(f"roberta:model={folder}")


def test_a_model_that_is_no_text_encoder_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoints.speech(tmp_path / "hubert", "hubert")
    with pytest.raises(CheckpointError, match="is a 'hubert' model; feature 'text' takes roberta"):
        create(folder)


@pytest.mark.parametrize("cls", ["ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("model_type", ["roberta", "bert"])
def test_a_checkpoint_with_a_task_head_gives_its_encoders_features(
    model_type: str, cls: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoints.text(tmp_path / "head", model_type, cls=cls)
    _, states = upstream(folder, SENTENCE)
    (ours,) = vectors(create(folder), SENTENCE)
    np.testing.assert_allclose(ours["final"], states[-1], atol=1e-5)


def rewrite(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_key_is_refused_by_name(folder: Path) -> None:
    rewrite(folder, lambda state: state.pop("encoder.layer.1.output.dense.weight"))
    with pytest.raises(
        CheckpointError, match=r"missing key encoder\.layer\.1\.output\.dense\.weight"
    ):
        create(folder).load("cpu")


def test_position_ids_of_old_files_and_a_missing_pooler_do_no_harm(folder: Path) -> None:
    before = vectors(create(folder), SENTENCE)[0]["final"]

    def age(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.startswith("pooler.")]:
            del state[key]
        state["embeddings.position_ids"] = torch.arange(40)[None]

    rewrite(folder, age)
    np.testing.assert_array_equal(vectors(create(folder), SENTENCE)[0]["final"], before)


@pytest.mark.parametrize("model_type", ["roberta", "bert"])
def test_a_folder_without_tokenizer_is_refused(model_type: str, tmp_path: Path) -> None:
    folder = tiny_checkpoints.text(tmp_path / "bare", model_type)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer: expected one of tokenizer.json"):
        create(folder)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no tokenizer that can be read"):
        create(folder).load("cpu")


def test_code_beside_the_weights_is_never_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\nclass Model: ...\nclass Config: ...\n"
    )
    assert len(vectors(create(folder), SENTENCE)[0]["final"])
    assert not mark.exists()


def test_a_moved_folder_is_the_same_feature(folder: Path, tmp_path: Path) -> None:
    before = create(folder).spec
    assert create(Path(shutil.move(folder, tmp_path / "elsewhere"))).spec == before

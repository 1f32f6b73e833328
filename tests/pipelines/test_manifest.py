"""Manifests: what is read is what was written, and every fault names its place."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.cache.errors import ManifestError, MissingDependencyError
from mer.pipelines.manifest import Manifest, Utterance, read_manifest, write_manifest


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def full(folder: Path) -> Manifest:
    return Manifest(
        "full",
        (
            Utterance(
                id="a",
                path=folder / "sub" / "a.wav",
                start_s=0.5,
                end_s=1.25,
                channel=1,
                text='He said, "no"\nand left',
                speaker="s1",
                gender="female",
                session="1",
                dialogue="d1",
                label="angry",
                labels={"voice": "sad"},
                votes={"angry": 2.0, "sad": 0.5},
                split="train",
            ),
            Utterance(id="b", text="naïve – ża", speaker="007", label="happy", split="test"),
            Utterance(id="c", path=Path("/elsewhere/c.flac"), votes={"sad": 3.0}),
        ),
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_reading_returns_what_was_written(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    manifest = full(tmp_path)
    path = write_manifest(manifest, tmp_path / f"full{suffix}")
    assert read_manifest(path) == manifest
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file stays


word = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp")), min_size=1
)
text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",), exclude_characters="\0"))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(word, st.none() | text.map(str.strip).filter(bool), st.none() | word),
        min_size=1,
        unique_by=lambda row: row[0],
    ),
    suffix=st.sampled_from([".csv", ".jsonl"]),
)
def test_any_text_survives_the_round_trip(tmp_path_factory, rows, suffix):
    folder = tmp_path_factory.mktemp("manifest")
    manifest = Manifest(
        "m",
        tuple(
            Utterance(id=name, path=folder / "a.wav", text=words, label=label)
            for name, words, label in rows
        ),
    )
    assert read_manifest(write_manifest(manifest, folder / f"m{suffix}")) == manifest


@settings(max_examples=50, deadline=None)
@given(start=st.floats(0, 1e5), length=st.floats(1e-6, 1e4), channel=st.integers(0, 63))
def test_segment_bounds_survive_to_the_last_bit(tmp_path_factory, start, length, channel):
    end = start + length
    if end <= start:
        return
    folder = tmp_path_factory.mktemp("manifest")
    row = Utterance(id="a", path=folder / "a.wav", start_s=start, end_s=end, channel=channel)
    manifest = Manifest("m", (row,))
    assert read_manifest(write_manifest(manifest, folder / "m.csv")) == manifest


def test_relative_paths_start_at_the_manifest(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    path = write(tmp_path / "set" / "m.csv", "path,label\nx/a.wav,angry\n/abs/b.wav,sad\n")
    monkeypatch.chdir(tmp_path)
    for given_as in (path, Path("set/m.csv")):
        rows = read_manifest(given_as).utterances
        assert [u.path for u in rows] == [tmp_path / "set" / "x" / "a.wav", Path("/abs/b.wav")]
    assert read_manifest(path, tmp_path).utterances[0].path == tmp_path / "x" / "a.wav"


def test_ids_come_from_path_segment_and_channel_where_the_column_is_absent(tmp_path):
    path = write(
        tmp_path / "m.csv",
        "path,start,end,channel\na/1.wav,,,\nb/1.wav,,,\nlong.wav,0,1.5,\nlong.wav,1.5,,0\n",
    )
    ids = [u.id for u in read_manifest(path).utterances]
    assert ids == ["a/1.wav", "b/1.wav", "long.wav#0.000-1.500", "long.wav#1.500-#0"]


@pytest.mark.parametrize(
    "content",
    [
        "id,path,label\na,a.wav,angry\nb,b.wav,sad\n",
        "\ufeffid,path,label\r\na,a.wav,angry\r\nb,b.wav,sad\r\n",
        "id;path;label\na;a.wav;angry\nb;b.wav;sad",
        "id\tpath\tlabel\na\ta.wav\tangry\nb\tb.wav\tsad\n",
        " ID , Path ,LABEL\n a , a.wav , angry \n\n,,\nb,b.wav,sad\n\n",
        'id,path,label\n"a","a.wav","angry"\n"b","b.wav","sad"\n',
    ],
    ids=["plain", "bom-crlf", "semicolon", "tab", "blanks", "quoted"],
)
def test_csv_dialects_read_alike(tmp_path, content):
    rows = read_manifest(write(tmp_path / "m.csv", content)).utterances
    expected = [("a", tmp_path / "a.wav", "angry"), ("b", tmp_path / "b.wav", "sad")]
    assert [(u.id, u.path, u.label) for u in rows] == expected


def test_genders_and_splits_are_normalised(tmp_path):
    path = write(
        tmp_path / "m.csv",
        "path,gender,split\na.wav,F,train\nb.wav,male,dev\nc.wav,,TEST\nd.wav,unknown,\n",
    )
    rows = read_manifest(path).utterances
    assert [u.gender for u in rows] == ["female", "male", None, None]
    assert [u.split for u in rows] == ["train", "validation", "test", None]


def test_votes_and_further_labels_come_from_prefixed_columns(tmp_path):
    path = write(
        tmp_path / "m.csv",
        "path,label:voice,Votes:angry,votes:sad\na.wav,sad,1,2.5\nb.wav,,,0\n",
    )
    a, b = read_manifest(path).utterances
    assert (a.labels, a.votes) == ({"voice": "sad"}, {"angry": 1.0, "sad": 2.5})
    assert (b.labels, b.votes) == ({}, {"sad": 0.0})


def test_other_columns_are_noted_not_read(tmp_path):
    manifest = read_manifest(write(tmp_path / "m.csv", "path,label,age,take\na.wav,sad,27,3\n"))
    assert manifest.notes == ("Columns not read: 'age', 'take'.",)


def test_json_lines_may_have_numbers_gaps_and_different_keys(tmp_path):
    lines = [{"path": "a.wav", "speaker": 7, "start": 1}, {"id": "x", "path": "b.wav"}]
    lines[0]["id"] = "y"
    path = write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    a, b = read_manifest(path).utterances
    assert (a.id, a.speaker, a.start_s) == ("y", "7", 1.0)
    assert (b.id, b.speaker, b.start_s) == ("x", None, None)


def test_parquet_with_numeric_ids_and_gaps_reads_as_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table(
        {"path": ["a.wav", "b.wav"], "speaker": [3.0, math.nan], "end": [1.5, math.nan]}
    )
    parquet.write_table(table, tmp_path / "m.parquet")
    a, b = read_manifest(tmp_path / "m.parquet").utterances
    assert (a.speaker, a.end_s, b.speaker, b.end_s) == ("3", 1.5, None, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"m\.csv: the file is empty"),
        ("\ufeff\n \n", r"m\.csv: the file is empty"),
        ("path,label\n", r"m\.csv: a header and no rows"),
        ("label,speaker\nsad,1\n", r"m\.csv: required column 'path' \(or 'text'\) is missing"),
        ("path,speaker,speaker\na,b,c\n", r"m\.csv: column 'speaker' appears twice"),
        (
            "id,path\na,a.wav\nb,b.wav\na,c.wav\n",
            r"m\.csv, line 4, column 'id': 'a' was used in line 2; ids must be unique",
        ),
        ("path\na.wav\na.wav\n", r"m\.csv, line 3, column 'path': 'a\.wav' was used in line 2"),
        ("id,path\n,a.wav\n", r"m\.csv, line 2, column 'id': empty"),
        ("path,start\na.wav,0\nb.wav,x1\n", r"line 3, column 'start': expected a number, got 'x1'"),
        ("path,start\na.wav,nan\n", r"line 2, column 'start': .*at least 0, got 'nan'"),
        ("path,end\na.wav,inf\n", r"line 2, column 'end': .*at least 0, got 'inf'"),
        ("path,start\na.wav,-1\n", r"line 2, column 'start': .*at least 0, got '-1'"),
        ("path,start,end\na.wav,2,1.5\n", r"line 2, column 'end': 1\.5 s is not after .* 2 s"),
        ("path,start,end\na.wav,2,2\n", r"line 2, column 'end': 2 s is not after"),
        ("path,end\na.wav,0\n", r"line 2, column 'end': a segment that ends at 0 s is empty"),
        ("path,channel\na.wav,0.5\n", r"line 2, column 'channel': expected a whole number"),
        ("id,path,text,start\na,,hi,1\n", r"line 2, column 'start': 1 given, but .* no path"),
        ("id,path,text\na,,\n", r"line 2, column 'path': neither a recording nor a transcript"),
        ("text\nhello\n", r"without 'path' needs the column 'id'"),
        ("path,text\n,hello\n", r"line 2, column 'path': empty, so the row needs an 'id'"),
        ("path,gender\na.wav,x\n", r"line 2, column 'gender': 'x' is not one of female"),
        ("path,split\na.wav,fold1\n", r"line 2, column 'split': 'fold1' is not one of train"),
        ("path,votes:sad\na.wav,many\n", r"line 2, column 'votes:sad': expected a number"),
        ("path,label\na.wav\n", r"line 2: 1 cells, the header has 2"),
        ('path,text\na.wav,"x\ny"\nb.wav\n', r"line 4: 1 cells, the header has 2"),
        ('path,text\na.wav,"open\n', r"line 2: not CSV"),
        ("path,emotion\na.wav,sad\n", r"unknown column 'emotion'\. Did you mean 'label'"),
        ("path,speeker\na.wav,1\n", r"unknown column 'speeker'\. Did you mean 'speaker'"),
        ("file,label\na.wav,sad\n", r"unknown column 'file'\. Did you mean 'path'"),
        ("path,label:\na.wav,sad\n", r"column 'label:' lacks a name"),
    ],
)
def test_a_fault_in_csv_is_named_with_file_line_and_column(tmp_path, content, message):
    with pytest.raises(ManifestError, match=message):
        read_manifest(write(tmp_path / "m.csv", content))


def test_a_foreign_column_beside_the_right_one_is_no_fault(tmp_path):
    path = write(tmp_path / "m.csv", "path,label,emotion\na.wav,sad,1\n")
    assert read_manifest(path).notes == ("Columns not read: 'emotion'.",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"path": "a.wav"}\n{"path": \n', r"m\.jsonl, line 2: not JSON"),
        ('{"path": "a.wav"}\n["b.wav"]\n', r"m\.jsonl, line 2: expected a JSON object"),
        ('{"path": ["a.wav"]}\n', r"m\.jsonl, line 1, column 'path': expected text"),
        ('{"path": "a.wav", "start": true}\n', r"line 1, column 'start': expected a number"),
        ('{"path": "a.wav", "text": 1.5}\n', r"line 1, column 'text': expected text, got 1\.5"),
    ],
)
def test_a_fault_in_json_lines_is_named_with_file_and_line(tmp_path, content, message):
    with pytest.raises(ManifestError, match=message):
        read_manifest(write(tmp_path / "m.jsonl", content))


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    path = write(tmp_path / "m.csv", "path,label\na.wav,wütend\n", encoding="latin-1")
    with pytest.raises(ManifestError, match=r"m\.csv, line 2: byte 0xfc is not UTF-8"):
        read_manifest(path)
    with pytest.raises(ManifestError, match="NUL characters|not UTF-8"):
        read_manifest(write(tmp_path / "n.csv", "path\na.wav\n", encoding="utf-16"))


def test_files_that_are_no_manifest_are_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"absent\.csv: the manifest does not exist"):
        read_manifest(tmp_path / "absent.csv")
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(ManifestError, match=r"dir\.csv: the manifest is a folder"):
        read_manifest(tmp_path / "dir.csv")
    with pytest.raises(ManifestError, match=r"ends in \.csv, \.parquet, \.jsonl, not '\.txt'"):
        read_manifest(tmp_path / "m.txt")
    path = write(tmp_path / "m.csv", "path\na.wav\n")
    with pytest.raises(ManifestError, match=r"root folder .*nowhere does not exist"):
        read_manifest(path, tmp_path / "nowhere")


def test_a_damaged_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    path = write(tmp_path / "m.parquet", "path\n")
    with pytest.raises(ManifestError, match=r"m\.parquet: not a Parquet file"):
        read_manifest(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mer\[tables\]'"):
        read_manifest(write(tmp_path / "m.parquet", "path\n"))


def test_an_empty_manifest_is_not_written(tmp_path):
    with pytest.raises(ManifestError, match="holds no utterances"):
        write_manifest(Manifest("none", ()), tmp_path / "m.csv")
    assert not (tmp_path / "m.csv").exists()


def test_a_hundred_thousand_rows_keep_their_order_and_values(tmp_path):
    rows = [f"u{i},x/{i}.wav,{i / 8},{i / 8 + 1},s{i % 7}" for i in range(100_000)]
    path = write(tmp_path / "m.csv", "id,path,start,end,speaker\n" + "\n".join(rows))
    utterances = read_manifest(path).utterances
    assert len(utterances) == 100_000
    for i in (0, 4_711, 99_999):
        assert utterances[i] == Utterance(
            id=f"u{i}",
            path=tmp_path / "x" / f"{i}.wav",
            start_s=i / 8,
            end_s=i / 8 + 1,
            speaker=f"s{i % 7}",
        )


def test_planning_modules_import_neither_torch_nor_transformers():
    code = (
        "import sys; import mer.pipelines.manifest, mer.pipelines.labels, mer.pipelines.protocols\n"
        "from mer.pipelines import corpora\n"
        "corpora.describe()\n"
        "print(sorted({'torch', 'transformers', 'scipy', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"

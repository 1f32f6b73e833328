"""Protocols: nothing crosses the test border, and the same corpus always divides the same way."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.cache.errors import ProtocolError, UnknownNameError
from mer.pipelines import protocols
from mer.pipelines.manifest import Utterance
from mer.pipelines.protocols import Fold, make_folds, split_hash

LABELS = ("angry", "happy", "sad")


def rows(speakers: dict[str, int], **common) -> list[Utterance]:
    """Return `speakers[name]` utterances of each speaker, labels in turn."""
    return [
        Utterance(
            id=f"{speaker}-{i:03d}",
            path=Path(f"/x/{speaker}/{i}.wav"),
            speaker=speaker,
            gender="female" if index % 2 else "male",
            label=LABELS[i % 3],
            **common,
        )
        for index, (speaker, count) in enumerate(speakers.items())
        for i in range(count)
    ]


def ravdess(actors) -> list[Utterance]:
    return rows({f"{actor:02d}": 6 for actor in actors})


def speakers_of(names) -> set[str]:
    return {name.split("-")[0] for name in names}


ANY = {
    "loso": rows({f"s{i}": 4 + i for i in range(6)}),
    "emodb-loso": rows(dict.fromkeys(protocols.EMODB_SPEAKERS, 4)),
    "nemo-loso": rows(dict.fromkeys(("EB0", "IC0", "KS0", "WR0"), 6)),
    "demo-loso": rows({f"s0{i}": 6 for i in range(1, 7)}),
    "ravdess-6fold-emobox": ravdess(range(1, 25)),
    "speaker-kfold-3": rows({f"s{i}": 4 + i for i in range(7)}),
    "utterance-kfold-5": [
        Utterance(id=f"u{i}", path=Path(f"/x/{i}.wav"), label=LABELS[i % 3]) for i in range(40)
    ],
    "official": [
        *rows({"a": 6, "b": 6}, split="train"),
        *rows({"c": 6}, split="validation"),
        *rows({"d": 6}, split="test"),
    ],
}


def test_every_protocol_is_tried_here():
    tried = {name.rsplit("-", 1)[0] + "-K" if "kfold" in name else name for name in ANY}
    assert tried == set(protocols.names())


@pytest.mark.parametrize("name", ANY)
class TestEveryProtocol:
    def test_parts_are_disjoint_and_whole(self, name):
        utterances = ANY[name]
        ids = {u.id for u in utterances}
        for fold in make_folds(name, utterances):
            parts = (fold.train, fold.validation, fold.test)
            assert sum(map(len, parts)) == len(ids)
            assert set().union(*parts) == ids

    def test_every_utterance_is_tested_at_most_once(self, name):
        tested = Counter(i for fold in make_folds(name, ANY[name]) for i in fold.test)
        assert max(tested.values()) == 1
        if name != "official":
            assert tested.keys() == {u.id for u in ANY[name]}

    def test_order_of_utterances_does_not_matter(self, name):
        shuffled = ANY[name].copy()
        random.Random(4).shuffle(shuffled)
        assert make_folds(name, shuffled) == make_folds(name, ANY[name])

    def test_no_speaker_crosses_the_test_border(self, name):
        speaker = {u.id: u.speaker for u in ANY[name]}
        for fold in make_folds(name, ANY[name]):
            outside = {speaker[i] for i in (*fold.train, *fold.validation)}
            assert not (outside - {None}) & {speaker[i] for i in fold.test}

    def test_names_are_unique_and_result_is_described(self, name):
        folds = make_folds(name, ANY[name], seed=3)
        assert len({fold.name for fold in folds}) == len(folds)
        assert (folds.protocol, folds.version, folds.seed) == (name, 1, 3)
        assert folds.validation
        assert folds.leak is None
        assert folds.hash == split_hash(folds)


# --- the named protocols -------------------------------------------------------------------------


def test_emobox_folds_of_all_actors():
    folds = make_folds("ravdess-6fold-emobox", ravdess(range(1, 25)))
    assert [fold.name for fold in folds] == [f"fold-{i}" for i in range(1, 7)]
    assert [tuple(sorted(speakers_of(f.test))) for f in folds] == list(
        protocols.EMOBOX_RAVDESS_ACTORS
    )
    assert folds.validation == "next-fold"
    assert speakers_of(folds[5].validation) == {"01", "11", "20", "21"}


def test_emobox_folds_of_the_actors_at_hand_keep_their_numbers():
    folds = make_folds("ravdess-6fold-emobox", ravdess((1, 11, 20, 21, 4, 10, 12, 14)))
    assert [fold.name for fold in folds] == ["fold-1", "fold-2"]
    assert folds.validation == "stratified-20%"
    assert len([note for note in folds.notes if "dropped" in note]) == 4
    assert "Fold 3 dropped: none of its actors 08, 09, 19, 23 is there." in folds.notes
    for fold in folds:
        assert not speakers_of(fold.train) & speakers_of(fold.test)


def test_emobox_notes_a_fold_that_lacks_an_actor():
    folds = make_folds("ravdess-6fold-emobox", ravdess(a for a in range(1, 25) if a != 18))
    assert folds.notes == ("Fold 5 has only 02, 15, 16 of 02, 15, 16, 18.",)


def test_emobox_refuses_other_corpora_and_single_folds():
    with pytest.raises(ProtocolError, match=r"is for RAVDESS .* the corpus has 'a'.*'loso'"):
        make_folds("ravdess-6fold-emobox", rows({"a": 3, "01": 3}))
    with pytest.raises(ProtocolError, match=r"actors 01, 11 lie within one fold"):
        make_folds("ravdess-6fold-emobox", ravdess((1, 11)))


def test_loso_tests_every_speaker_and_validates_on_the_next():
    folds = make_folds("loso", ANY["loso"])
    assert [fold.name for fold in folds] == [f"s{i}" for i in range(6)]
    assert [speakers_of(f.validation).pop() for f in folds] == ["s1", "s2", "s3", "s4", "s5", "s0"]
    assert folds.validation == "next-fold"


def test_few_speakers_share_a_stratified_validation_part():
    folds = make_folds("loso", rows({"a": 30, "b": 30, "c": 30}))
    assert folds.validation == "stratified-20%"
    for fold in folds:
        assert len(fold.validation) == 12
        counts = Counter(int(name.split("-")[1]) % 3 for name in fold.validation)
        assert counts == {0: 4, 1: 4, 2: 4}


def test_named_loso_says_how_many_speakers_are_there():
    assert make_folds("nemo-loso", ANY["nemo-loso"]).notes == (
        "4 of the 9 speakers of 'nemo-loso' are there.",
    )
    assert make_folds("emodb-loso", ANY["emodb-loso"]).notes == ()
    with pytest.raises(ProtocolError, match=r"is for the speakers 03, 08.*has 's0'.*Use 'loso'"):
        make_folds("emodb-loso", rows({"s0": 3, "03": 3}))


def test_speaker_folds_balance_gender_and_size():
    utterances = rows({f"s{i:02d}": 40 if i < 4 else 10 for i in range(16)})
    folds = make_folds("speaker-kfold-4", utterances)
    gender = {u.speaker: u.gender for u in utterances}
    for fold in folds:
        assert Counter(gender[s] for s in speakers_of(fold.test)) == {"female": 2, "male": 2}
        assert len(fold.test) == 70


def test_utterance_folds_are_stratified_and_warn():
    folds = make_folds("utterance-kfold-5", ANY["utterance-kfold-5"])
    label = {u.id: u.label for u in ANY["utterance-kfold-5"]}
    for fold in folds:
        assert len(fold.test) == 8
        assert set(Counter(label[i] for i in fold.test).values()) <= {2, 3}
    assert "Speakers of 40 utterances are unknown" in folds.notes[0]
    other = make_folds("utterance-kfold-5", ANY["utterance-kfold-5"], seed=1)
    assert other.hash != folds.hash


def test_official_split_uses_its_own_validation_part():
    folds = make_folds("official", ANY["official"])
    (fold,) = folds
    assert folds.validation == "official"
    assert speakers_of(fold.validation) == {"c"}
    assert speakers_of(fold.test) == {"d"}


def test_official_split_without_validation_takes_a_share_of_training():
    utterances = [u for u in ANY["official"] if u.split != "validation"]
    folds = make_folds("official", utterances)
    assert folds.validation == "stratified-20%"
    by_speaker = make_folds("official", utterances, validation="speakers-20%")
    assert speakers_of(by_speaker[0].validation) in ({"a"}, {"b"})
    with pytest.raises(ProtocolError, match="official split has no validation part"):
        make_folds("official", utterances, validation="official")


def test_official_split_that_is_absent_is_refused():
    with pytest.raises(
        ProtocolError, match=r"splits 'train' and 'test'; the corpus has 6 of none\."
    ):
        make_folds("official", rows({"a": 3, "b": 3}))


def test_unlisted_utterances_of_an_official_split_take_no_part():
    utterances = [*ANY["official"], *rows({"e": 2})]
    folds = make_folds("official", utterances)
    assert "e" not in speakers_of((*folds[0].train, *folds[0].validation, *folds[0].test))
    assert "2 utterances without a split take no part." in folds.notes


def test_adding_an_utterance_keeps_the_others_in_place():
    before = make_folds("loso", ANY["loso"][1:], validation="stratified-20%")
    after = make_folds("loso", ANY["loso"], validation="stratified-20%")
    for a, b in zip(before, after, strict=True):
        assert set(a.test) <= set(b.test)
        assert len(set(a.validation) - set(b.validation)) <= 1


# --- validation rules ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["next-fold", "stratified-20%", "stratified-10%", "speakers-25%"])
def test_a_rule_asked_for_is_the_rule_taken(rule):
    folds = make_folds("loso", ANY["loso"], validation=rule)
    assert folds.validation == rule
    for fold in folds:
        assert not set(fold.validation) & set(fold.test)
        if not rule.startswith("stratified"):
            assert not speakers_of(fold.validation) & speakers_of(fold.train)


def test_the_seed_moves_a_drawn_validation_part_and_no_test_part():
    a = make_folds("loso", ANY["loso"], validation="stratified-20%", seed=0)
    b = make_folds("loso", ANY["loso"], validation="stratified-20%", seed=1)
    assert a.hash != b.hash
    assert [fold.test for fold in a] == [fold.test for fold in b]


def test_unknown_rules_are_refused():
    for rule in ("next-fld", "stratified-0%", "stratified-60%", "stratified"):
        with pytest.raises(UnknownNameError, match=f"Unknown validation rule '{rule}'"):
            make_folds("loso", ANY["loso"], validation=rule)


def test_rules_that_cannot_be_followed_say_what_to_do():
    two = rows({"a": 6, "b": 6})
    with pytest.raises(ProtocolError, match=r"'next-fold' needs three folds.*'stratified-20%'"):
        make_folds("loso", two, validation="next-fold")
    with pytest.raises(ProtocolError, match=r"two known training speakers.*'stratified-20%'"):
        make_folds("loso", two, validation="speakers-20%")


def test_one_utterance_per_class_still_gives_a_validation_part():
    folds = make_folds("loso", rows({"a": 3, "b": 3}))
    assert [len(fold.validation) for fold in folds] == [1, 1]
    assert any("in the train part of a: " in note for note in folds.notes)


def test_a_part_without_a_class_is_noted():
    utterances = [
        *rows({"a": 6, "b": 6, "c": 6, "d": 6}),
        Utterance(id="d-x", speaker="d", label="rare"),
    ]
    notes = make_folds("loso", utterances).notes
    assert "Classes without an utterance in the train part of c: rare; d: rare." in notes


# --- leaks ---------------------------------------------------------------------------------------


def test_a_speaker_on_both_sides_is_refused_and_can_be_allowed_with_a_reason():
    utterances = rows({"a": 10, "b": 10})
    with pytest.raises(ProtocolError, match=r"2 speakers are both in training and test: 'a', 'b'"):
        make_folds("utterance-kfold-2", utterances)
    folds = make_folds("utterance-kfold-2", utterances, allow_leak="to show what a leak buys")
    assert folds.leak.startswith("to show what a leak buys (in fold 'fold-1' 2 speakers are both")
    with pytest.raises(ProtocolError, match="allow_leak needs the reason"):
        make_folds("utterance-kfold-2", utterances, allow_leak=" ")


def test_allowing_leaks_that_are_not_there_records_none():
    assert make_folds("loso", ANY["loso"], allow_leak="just in case").leak is None


def test_a_dialogue_on_both_sides_is_refused():
    utterances = rows({"a": 4, "b": 4, "c": 4}, dialogue="d7")
    with pytest.raises(ProtocolError, match=r"one dialogue is both in training and test: 'd7'"):
        make_folds("loso", utterances)


@pytest.mark.parametrize(
    ("bounds", "leaks"),
    [
        ([(None, None, None), (None, None, None)], True),
        ([(0.0, 1.0, None), (1.0, 2.0, None)], False),
        ([(0.0, 1.5, None), (1.0, 2.0, None)], True),
        ([(None, 1.0, None), (1.0, None, None)], False),
        ([(0.0, 1.0, None), (None, None, None)], True),
        ([(0.0, 1.0, 0), (0.0, 1.0, 1)], False),
        ([(0.0, 1.0, 0), (0.0, 1.0, None)], True),
    ],
)
def test_one_stretch_of_a_recording_on_both_sides_is_refused(bounds, leaks):
    utterances = rows({"a": 6, "b": 6, "c": 6, "d": 6})
    for name, (start, end, channel) in zip("ab", bounds, strict=True):
        utterances.append(
            Utterance(
                id=f"{name}-x",
                path=Path("/x/long.wav"),
                start_s=start,
                end_s=end,
                channel=channel,
                speaker=name,
                label="sad",
            )
        )
    if leaks:
        with pytest.raises(ProtocolError, match=r"one recording is both .*: 'b-x and a-x'"):
            make_folds("loso", utterances)
    else:
        assert len(make_folds("loso", utterances)) == 4


def test_one_content_under_two_paths_is_refused():
    utterances = rows({"a": 6, "b": 6, "c": 6, "d": 6})
    content = {u.id: u.id.encode() for u in utterances}
    assert make_folds("loso", utterances, content=content).leak is None
    content["a-000"] = content["b-000"]
    with pytest.raises(ProtocolError, match=r"one recording is both .*: 'b-000 and a-000'"):
        make_folds("loso", utterances, content=content)


# --- what cannot be divided ----------------------------------------------------------------------


def test_corpora_that_cannot_be_divided_say_what_to_do():
    with pytest.raises(
        ProtocolError, match=r"3 of 3 utterances have no speaker .*'speaker' column"
    ):
        make_folds("loso", [Utterance(id=f"u{i}", label="sad") for i in range(3)])
    with pytest.raises(ProtocolError, match=r"needs at least two speakers, .* only '03'"):
        make_folds("emodb-loso", rows({"03": 7}))
    with pytest.raises(ProtocolError, match=r"'loso' got no utterances"):
        make_folds("loso", [])
    with pytest.raises(ProtocolError, match=r"needs 9 speakers, the corpus has 4.*speaker-kfold-4"):
        make_folds("speaker-kfold-9", ANY["nemo-loso"])
    with pytest.raises(ProtocolError, match=r"needs 50 utterances, the corpus has 40"):
        make_folds("utterance-kfold-50", ANY["utterance-kfold-5"])
    with pytest.raises(ProtocolError, match="ids are not unique"):
        make_folds("loso", [*ANY["loso"], ANY["loso"][0]])


def test_unknown_protocols_suggest_the_nearest():
    with pytest.raises(
        UnknownNameError, match=r"'speaker-kfld-5'\. Did you mean 'speaker-kfold-5'"
    ):
        make_folds("speaker-kfld-5", ANY["loso"])
    with pytest.raises(UnknownNameError, match=r"Unknown protocol 'speaker-kfold'"):
        make_folds("speaker-kfold", ANY["loso"])
    with pytest.raises(ProtocolError, match="at least two folds"):
        make_folds("speaker-kfold-1", ANY["loso"])


def test_a_fold_that_overlaps_or_is_empty_cannot_be_made():
    with pytest.raises(ProtocolError, match=r"both in its train and its test part: 'a'"):
        Fold("f", ("a",), ("b",), ("a",))
    with pytest.raises(ProtocolError, match=r"both in its train and its validation part: 'a'"):
        Fold("f", ("a",), ("a",), ("b",))
    with pytest.raises(ProtocolError, match=r"both in its validation and its test part: 'b'"):
        Fold("f", ("a",), ("b",), ("b",))
    with pytest.raises(ProtocolError, match="no utterance in its validation part"):
        Fold("f", ("a",), (), ("b",))
    with pytest.raises(ProtocolError, match="lists utterances twice in its test part: 'b'"):
        Fold("f", ("a",), ("c",), ("b", "b"))


def test_hash_tells_divisions_apart_but_not_orders():
    a = Fold("f", ("a", "b"), ("c",), ("d", "e"))
    assert split_hash([a]) == split_hash([Fold("f", ("b", "a"), ("c",), ("e", "d"))])
    assert split_hash([a]) != split_hash([Fold("f", ("a", "c"), ("b",), ("d", "e"))])
    assert split_hash([a]) != split_hash([Fold("g", ("a", "b"), ("c",), ("d", "e"))])
    assert split_hash(make_folds("loso", ANY["loso"])) == "316ddf876a118946"


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(3, 9), min_size=2, max_size=9),
    num_folds=st.integers(2, 5),
    rule=st.sampled_from([None, "stratified-20%"]),
    seed=st.integers(0, 99),
)
def test_any_corpus_divides_cleanly_or_is_refused(sizes, num_folds, rule, seed):
    utterances = rows({f"s{i}": n for i, n in enumerate(sizes)})
    name = f"speaker-kfold-{num_folds}"
    if len(sizes) < num_folds:
        with pytest.raises(ProtocolError, match=f"needs {num_folds} speakers"):
            make_folds(name, utterances, seed)
        return
    folds = make_folds(name, utterances, seed, validation=rule)
    assert sorted(i for f in folds for i in f.test) == sorted(u.id for u in utterances)
    for fold in folds:
        assert not speakers_of((*fold.train, *fold.validation)) & speakers_of(fold.test)

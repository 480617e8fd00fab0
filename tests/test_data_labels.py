"""Labels other than transcripts, and lists of trials."""

import json

import numpy as np
import pytest

from speech_flax.data.frame_labels import FrameEncoder, frame_label_names
from speech_flax.data.labels import ClassEncoder, LabelError, ValueEncoder
from speech_flax.data.sources import DataSource, open_source
from speech_flax.data.tables import SourceError
from speech_flax.data.trials import Trial, read_trials

TURNS = [{"start": 0.0, "end": 0.05, "label": "B"}, {"start": 0.03, "end": 0.1, "label": "A"}]


def test_classes_become_numbers_and_unknown_ones_are_ignored():
    encoder = ClassEncoder(("no", "yes"))
    assert [encoder.encode(name) for name in ("yes", "no", "maybe")] == [[1], [0], [-100]]


@pytest.mark.parametrize("text", ["high", "nan", "inf", ""])
def test_values_must_be_finite_numbers(text):
    assert ValueEncoder().encode("-2.5") == [-2.5]
    with pytest.raises(LabelError, match=repr(text)):
        ValueEncoder().encode(text)


def test_segments_may_overlap_where_several_labels_may_hold():
    encoder = FrameEncoder(("A", "B"), 0.02, several=True)
    # Centres of frames lie at 0.01, 0.03, 0.05, 0.07, 0.09 s; a segment holds from its start until before its end.
    assert encoder.encode(json.dumps(TURNS)) == [0b10, 0b11, 0b01, 0b01, 0b01, 0]
    assert encoder.encode("[]") == [0]


def test_frames_without_segment_are_silence_where_one_label_holds():
    encoder = FrameEncoder(("A", "B", "silence"), 0.02, several=False)
    assert encoder.encode(json.dumps([TURNS[1]])) == [2, 0, 0, 0, 0, 2]
    with pytest.raises(LabelError, match="multi_label_classification"):
        encoder.encode(json.dumps(TURNS))


def test_entries_of_frames_are_names_numbers_or_zeros_and_ones():
    one = FrameEncoder(("A", "B"), 0.02, several=False)
    for text in ('["B", "A"]', "[1, 0]", "[[0, 1], [1, 0]]"):
        assert one.encode(text) == [1, 0, -100]  # nothing is known of the frames that follow
    assert FrameEncoder(("A", "B"), 0.02, several=True).encode("[[1, 1], [0, 0]]") == [3, 0, -100]


@pytest.mark.parametrize("text", ["speech", '{"A": 1}', '[{"start": 0, "label": "A"}]', '["C"]', "[2]", "[null]"])
def test_other_labels_of_frames_are_refused(text):
    with pytest.raises(LabelError):
        FrameEncoder(("A", "B"), 0.02, several=True).encode(text)


def test_names_of_frame_labels_are_found():
    assert frame_label_names([json.dumps(TURNS), "[]"], several=True) == ("A", "B")
    assert frame_label_names([json.dumps(TURNS)], several=False) == ("A", "B", "silence")
    assert frame_label_names(["[0, 2]", "[1]"], several=False) == ("0", "1", "2")
    assert frame_label_names(["[[0, 1]]"], several=True) == ("0", "1")


def test_trials_are_read_with_and_without_header(tmp_path):
    expected = [Trial(True, "a.wav", "b.wav"), Trial(False, "a.wav", "c.wav")]
    for text in (
        "label,file_1,file_2\n1,a.wav,b.wav\n0,a.wav,c.wav\n",
        "file_1,file_2,label\na.wav,b.wav,1\na.wav,c.wav,0\n",
        "1 a.wav b.wav\n0 a.wav c.wav\n",
    ):
        (tmp_path / "trials").write_text(text)
        assert read_trials(tmp_path / "trials") == expected
    (tmp_path / "trials").write_text("1 a.wav b.wav\nsame a.wav c.wav\n")
    with pytest.raises(SourceError, match="line 2"):
        read_trials(tmp_path / "trials")
    with pytest.raises(SourceError, match="no list of trials"):
        read_trials(tmp_path / "nothing")


def test_labels_of_every_type_are_read_from_tables(tmp_path):
    rows = [
        {"file_name": "a.wav", "label": "yes", "score": 2, "segments": TURNS, "empty": ""},
        {"file_name": "b.wav", "label": " no ", "score": 0.5, "segments": [], "empty": ""},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def labels(**columns):
        source = DataSource(path=str(tmp_path), **columns)
        return list(open_source(source, label_columns=("segments", "label")).texts())

    assert labels(label_column="label") == ["yes", "no"]
    np.testing.assert_array_equal([float(value) for value in labels(label_column="score")], [2, 0.5])
    assert [json.loads(value) for value in labels()] == [TURNS, []]
    with pytest.raises(SourceError, match="empty label"):
        labels(label_column="empty")
    with pytest.raises(SourceError, match="label_column"):
        open_source(DataSource(path=str(tmp_path)), label_columns=("speaker",))

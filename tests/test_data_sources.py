"""What a source makes of a table: names, transcripts, lengths, dropped rows; and durations that are remembered."""

import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speech_flax.audio.decoding import AudioError
from speech_flax.data.durations import file_identity, scan_durations
from speech_flax.data.sources import DataSource, open_source
from speech_flax.data.tables import SourceError
from speech_flax.text.vocabulary import build_vocabulary

SECONDS = (0.1, 0.2, 0.3, 0.4)


@pytest.fixture
def table(tmp_path) -> Path:
    """A CSV of four utterances of ``SECONDS``, the third without a transcript."""
    for index, seconds in enumerate(SECONDS):
        soundfile.write(tmp_path / f"{index}.wav", np.full(round(seconds * 16_000), 0.5, np.float32), 16_000)
    rows = [("Ein Haus!", "A"), ("“It’s”  two-fold", "B"), ("  ", "C"), ("E\u0301tE\u0301 ŒUVRE", "D")]
    lines = [f'{index}.wav,"{text}",{name},{SECONDS[index]}' for index, (text, name) in enumerate(rows)]
    (tmp_path / "table.csv").write_text("audio,text,name,seconds\n" + "\n".join(lines) + "\n")
    return tmp_path / "table.csv"


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({}, ["Ein Haus!", "“It’s” two-fold", "ÉtÉ ŒUVRE"]),
        ({"case": "lower", "punctuation": "remove"}, ["ein haus", "it's two fold", "été œuvre"]),
        ({"case": "upper", "punctuation": "remove"}, ["EIN HAUS", "IT'S TWO FOLD", "ÉTÉ ŒUVRE"]),
        ({"punctuation": "remove", "keep_characters": "-"}, ["Ein Haus", "It s two-fold", "ÉtÉ ŒUVRE"]),
    ],
)
def test_transcripts_are_normalised_as_the_source_says(table, options, texts):
    assert list(open_source(DataSource(str(table), **options)).texts()) == texts


def test_a_vocabulary_covers_the_transcripts_that_it_was_built_from(table):
    """Decomposed accents, as macOS writes them, included."""
    texts = open_source(DataSource(str(table))).texts()
    assert set("".join(texts)) - {" "} <= set(build_vocabulary(texts))


def test_rows_without_a_transcript_are_dropped_and_reported(table, caplog):
    with caplog.at_level(logging.WARNING):
        utterances = open_source(DataSource(str(table)))
    assert list(utterances.ids()) == ["0.wav", "1.wav", "3.wav"]
    assert utterances.dropped == {"with an empty transcript": ["2.wav"]}
    assert "dropped 1 with an empty transcript: 2.wav" in caplog.text
    assert utterances[2].audio == str(table.parent / "3.wav")
    assert utterances.waveform(2).size == 6400


def test_a_transcript_of_punctuation_alone_counts_as_empty(tmp_path):
    (tmp_path / "table.csv").write_text("audio,text\na.wav,?!\nb.wav,words\n")
    source = DataSource(str(tmp_path / "table.csv"), punctuation="remove")
    assert list(open_source(source).texts()) == ["words"]


def test_lengths_are_limited_by_the_duration_column_or_by_the_headers(table):
    limits = {"min_seconds": 0.15, "max_seconds": 0.35}
    by_header = open_source(DataSource(str(table), **limits))
    assert list(by_header.ids()) == ["1.wav"]
    assert by_header.dropped["shorter than min_seconds = 0.15"] == ["0.wav"]
    assert by_header.dropped["longer than max_seconds = 0.35"] == ["3.wav"]
    for index in range(4):
        (table.parent / f"{index}.wav").unlink()  # the column is believed: no file is opened
    by_column = open_source(DataSource(str(table), duration_column="seconds", **limits))
    assert list(by_column.ids()) == ["1.wav"]
    np.testing.assert_array_equal(by_column.durations(), [0.2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("0.1", "soon"), "does not hold seconds: could not convert string to float: 'soon'"),
        (("0.1", "-2"), "holds '-2' in row 2, not seconds"),
        (("0.1", "nan"), "holds 'nan' in row 2, not seconds"),
        (("16000", "32000"), "has a median of 24000, which cannot be seconds"),
    ],
)
def test_a_duration_column_that_does_not_hold_seconds_is_refused(values, message, tmp_path):
    rows = "".join(f"{index}.wav,text,{value}\n" for index, value in enumerate(values))
    (tmp_path / "table.csv").write_text("audio,text,seconds\n" + rows)
    with pytest.raises(SourceError, match=message):
        open_source(DataSource(str(tmp_path / "table.csv"), duration_column="seconds"))


def test_only_the_first_rows_are_taken_with_a_limit(table):
    assert list(open_source(DataSource(str(table), limit=2)).ids()) == ["0.wav", "1.wav"]


def test_names_come_from_the_id_column_or_the_paths_or_the_row_numbers(table, tmp_path):
    assert list(open_source(DataSource(str(table), id_column="name")).ids()) == ["A", "B", "D"]
    (tmp_path / "same.csv").write_text("audio,text\n0.wav,one\n0.wav,two\n")
    assert list(open_source(DataSource(str(tmp_path / "same.csv"))).ids()) == ["train-0000000", "train-0000001"]


def test_relative_paths_start_at_the_audio_directory(table, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "moved.csv"
    moved.write_text(table.read_text())
    with pytest.raises(AudioError, match=r"elsewhere/0\.wav: no such file"):
        open_source(DataSource(str(moved))).waveform(0)
    assert open_source(DataSource(str(moved), audio_directory=str(tmp_path))).waveform(0).size == 1600


def test_a_source_of_which_nothing_is_left_is_refused(table):
    with pytest.raises(SourceError, match=r"no utterance .* is left: 1 with an empty transcript, 3 shorter than"):
        open_source(DataSource(str(table), min_seconds=10.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit of data source 'x' is 0"),
        ({"min_seconds": 5.0, "max_seconds": 5.0}, "must exceed min_seconds, which is 5"),
        ({"trim_silence_db": -3.0}, "must be positive"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataSource("x", **options)


def test_silence_is_trimmed_and_nothing_but_silence_is_an_error(tmp_path):
    times = np.arange(16_000) / 16_000
    tone = np.where((times > 0.4) & (times < 0.6), np.sin(2 * np.pi * 440 * times), 0).astype(np.float32)
    soundfile.write(tmp_path / "tone.wav", tone, 16_000)
    soundfile.write(tmp_path / "silence.wav", np.zeros(16_000, np.float32), 16_000)
    (tmp_path / "table.csv").write_text("audio,text\ntone.wav,a\nsilence.wav,b\n")
    utterances = open_source(DataSource(str(tmp_path / "table.csv"), trim_silence_db=30.0))
    assert 3200 <= utterances.waveform(0).size < 6400
    with pytest.raises(AudioError, match=r"silence\.wav: holds nothing but silence"):
        utterances.waveform(1)


def test_utterances_survive_pickling(table):
    utterances = open_source(DataSource(str(table)))
    copy = pickle.loads(pickle.dumps(utterances))
    assert list(copy.ids()) == list(utterances.ids())
    np.testing.assert_array_equal(copy.waveform(1), utterances.waveform(1))


class TestDurations:
    @pytest.fixture
    def files(self, table) -> list[str]:
        return [str(table.parent / f"{index}.wav") for index in range(4)]

    def scan(self, files: list[str], cache: Path) -> tuple[list[float], list[int]]:
        """Durations, and the rows whose audio was asked for."""
        asked = []

        def audio(row: int) -> str:
            asked.append(row)
            return files[row]

        found = scan_durations(audio, [file_identity(path) for path in files], cache=cache)
        return found.tolist(), sorted(asked)

    def test_a_file_is_read_again_only_when_it_has_changed(self, files, tmp_path):
        cache = tmp_path / "cache" / "durations.npz"
        assert self.scan(files, cache) == (list(SECONDS), [0, 1, 2, 3])
        assert self.scan(files, cache) == (list(SECONDS), [])
        soundfile.write(files[1], np.zeros(1600, np.float32), 16_000)
        os.utime(files[2], ns=(1, 1))
        assert self.scan(files, cache) == ([0.1, 0.1, 0.3, 0.4], [1, 2])

    def test_an_unreadable_file_has_no_duration_and_is_tried_again(self, files, tmp_path):
        Path(files[0]).write_bytes(b"not audio at all")
        Path(files[3]).unlink()
        for _ in range(2):
            assert self.scan(files, tmp_path / "durations.npz")[0] == [0.0, 0.2, 0.3, 0.0]
        assert self.scan(files, tmp_path / "durations.npz")[1] == [0, 3]

    @pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half a file", b"junk"])
    def test_a_damaged_cache_is_read_anew_and_replaced(self, files, tmp_path, damage, caplog):
        cache = tmp_path / "durations.npz"
        cache.write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            assert self.scan(files, cache)[0] == list(SECONDS)
        assert "is damaged" in caplog.text
        assert self.scan(files, cache) == (list(SECONDS), [])

    def test_an_interrupted_scan_keeps_what_it_has_read(self, files, tmp_path):
        cache = tmp_path / "durations.npz"

        def audio(row: int) -> str:
            if row == 3:
                raise KeyboardInterrupt
            return files[row]

        with pytest.raises(KeyboardInterrupt):
            scan_durations(audio, [file_identity(path) for path in files], cache=cache)
        assert self.scan(files, cache) == (list(SECONDS), [3])
        assert sorted(path.name for path in cache.parent.glob("durations*")) == ["durations.npz"]

    def test_audio_inside_a_table_is_remembered_by_table_and_row(self, table, tmp_path):
        import pyarrow
        import pyarrow.parquet

        audio = [{"bytes": (table.parent / f"{index}.wav").read_bytes(), "path": None} for index in range(4)]
        path = tmp_path / "table.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"audio": audio, "text": list("abcd")}), path)
        cache = tmp_path / "durations.npz"
        for _ in range(2):
            np.testing.assert_allclose(open_source(DataSource(str(path))).durations(cache), SECONDS)
        with np.load(cache) as arrays:
            assert arrays["keys"].size == 4

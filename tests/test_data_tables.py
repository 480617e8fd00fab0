"""Tables of utterances in every form that users have them in, and what is said about broken ones."""

import io
import json
import re
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from speech_flax.audio.decoding import load_audio
from speech_flax.data.sources import DataSource, open_source
from speech_flax.data.tables import SourceError, may_be_hub_id, read_table

TEXTS = ["one two", "drei vier", "five, six"]


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    """A directory with ``0.wav``, ``1.wav``, ``2.wav`` of 0.1, 0.2 and 0.3 s, each of another constant level."""
    directory = tmp_path_factory.mktemp("audio")
    for index in range(3):
        level = np.full(1600 * (index + 1), 2.0 ** -(index + 1), np.float32)
        soundfile.write(directory / f"{index}.wav", level, 16_000, subtype="PCM_16")
    return directory


def records(audio: Path) -> list[dict[str, str]]:
    return [{"audio": str(audio / f"{index}.wav"), "text": text} for index, text in enumerate(TEXTS)]


def csv_text(rows: list[dict[str, str]], separator: str = ",") -> str:
    quoted = (lambda value: f'"{value}"') if separator == "," else str
    lines = [separator.join(rows[0]), *(separator.join(quoted(value) for value in row.values()) for row in rows)]
    return "\n".join(lines) + "\n"


def write_csv(audio: Path, directory: Path) -> Path:
    (directory / "table.csv").write_text(csv_text(records(audio)))
    return directory / "table.csv"


def write_tsv(audio: Path, directory: Path) -> Path:
    (directory / "table.tsv").write_text(csv_text(records(audio), "\t"))
    return directory / "table.tsv"


def write_json_lines(audio: Path, directory: Path) -> Path:
    (directory / "table.jsonl").write_text("\n".join(json.dumps(row) for row in records(audio)) + "\n\n")
    return directory / "table.jsonl"


def write_json_list(audio: Path, directory: Path) -> Path:
    (directory / "table.json").write_text(json.dumps(records(audio), indent=1))
    return directory / "table.json"


def embedded(audio: Path) -> dict[str, list]:
    return {
        "audio": [{"bytes": (audio / f"{i}.wav").read_bytes(), "path": f"{i}.wav"} for i in range(3)],
        "text": TEXTS,
    }


def write_parquet_of_structs(audio: Path, directory: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(embedded(audio)), directory / "table.parquet")
    return directory / "table.parquet"


def write_parquet_of_audio(audio: Path, directory: Path) -> Path:
    """As on the hub: the same bytes, and metadata that call the column an Audio feature."""
    features = {"audio": {"sampling_rate": 16_000, "_type": "Audio"}, "text": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table(embedded(audio)).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, directory / "table.parquet")
    return directory / "table.parquet"


def write_parquet_of_paths(audio: Path, directory: Path) -> Path:
    rows = records(audio)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), directory / "table.parquet")
    return directory / "table.parquet"


def write_arrow(audio: Path, directory: Path) -> Path:
    table = pyarrow.table(embedded(audio))
    with pyarrow.ipc.new_stream(str(directory / "table.arrow"), table.schema) as stream:
        stream.write_table(table)
    return directory / "table.arrow"


def write_saved(audio: Path, directory: Path) -> Path:
    datasets.Dataset.from_list(records(audio)).save_to_disk(directory / "saved")
    return directory / "saved"


def write_saved_splits(audio: Path, directory: Path) -> Path:
    splits = {"train": datasets.Dataset.from_list(records(audio)), "test": datasets.Dataset.from_list(records(audio))}
    datasets.DatasetDict(splits).save_to_disk(directory / "saved")
    return directory / "saved"


def write_folder(audio: Path, directory: Path) -> Path:
    """``metadata.csv`` with paths relative to it, and a column that names the split."""
    rows = [{"file_name": f"clips/{i}.wav", "transcription": text, "split": "train"} for i, text in enumerate(TEXTS)]
    rows.append({"file_name": "clips/0.wav", "transcription": "for the test", "split": "test"})
    (directory / "metadata.csv").write_text(csv_text(rows))
    (directory / "clips").symlink_to(audio)
    return directory


def write_folder_per_split(audio: Path, directory: Path) -> Path:
    for split in ("train", "test"):
        (directory / split).mkdir()
        rows = [{"file_name": f"clips/{i}.wav", "text": text} for i, text in enumerate(TEXTS)]
        (directory / split / "metadata.csv").write_text(csv_text(rows))
        (directory / split / "clips").symlink_to(audio)
    return directory


def write_shards(audio: Path, directory: Path) -> Path:
    (directory / "data").mkdir()
    columns = embedded(audio)
    for shard, rows in enumerate((slice(0, 2), slice(2, 3))):
        part = pyarrow.table({name: values[rows] for name, values in columns.items()})
        pyarrow.parquet.write_table(part, directory / "data" / f"train-{shard:05d}-of-00002.parquet")
    return directory


def write_tar_shards(audio: Path, directory: Path) -> Path:
    """Two shards; transcripts as text in one and as JSON in the other."""
    for shard, rows in enumerate(((0, 1), (2,))):
        with tarfile.open(directory / f"train-{shard:03d}.tar", "w") as archive:
            for row in rows:
                add(archive, f"clips/{row}.wav", (audio / f"{row}.wav").read_bytes())
                if shard == 0:
                    add(archive, f"clips/{row}.txt", TEXTS[row].encode())
                else:
                    add(archive, f"clips/{row}.json", json.dumps({"text": TEXTS[row], "speaker": "x"}).encode())
    return directory


def write_one_tar(audio: Path, directory: Path) -> Path:
    write_tar_shards(audio, directory)
    with tarfile.open(directory / "all.tar", "w") as archive:
        for row, text in enumerate(TEXTS):
            add(archive, f"{row}.wav", (audio / f"{row}.wav").read_bytes())
            add(archive, f"{row}.txt", text.encode())
    return directory / "all.tar"


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


WRITERS = [value for name, value in globals().items() if name.startswith("write_")]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_every_form_of_a_table_gives_the_same_utterances(write, audio, tmp_path):
    utterances = open_source(DataSource(str(write(audio, tmp_path))))
    assert list(utterances.texts()) == TEXTS
    np.testing.assert_allclose(utterances.durations(), [0.1, 0.2, 0.3])
    for index in range(3):
        np.testing.assert_array_equal(utterances.waveform(index), load_audio(audio / f"{index}.wav"))
    assert len(set(utterances.ids())) == 3


def test_a_split_is_a_column_a_folder_or_a_part_of_a_saved_data_set(audio, tmp_path):
    for write in (write_folder, write_folder_per_split, write_saved_splits):
        directory = tmp_path / write.__name__
        directory.mkdir()
        path = str(write(audio, directory))
        assert open_source(DataSource(path, split="test")).texts()[0] in ("for the test", TEXTS[0])
        with pytest.raises(SourceError, match="'dev'"):
            read_table(path, "dev")


def test_values_that_look_like_numbers_or_nulls_stay_text(audio, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(f"audio,text\n{audio}/0.wav,null\n{audio}/1.wav,1e5\n{audio}/2.wav,007\n")
    assert list(open_source(DataSource(str(path))).texts()) == ["null", "1e5", "007"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "audio,text\na.wav,one\nb.wav,two,three\n", "line 3, has 3 fields, but the header has 2"),
        ("t.csv", 'audio,text\na.wav,"one\nb.wav,two\n', "line 3"),
        ("t.tsv", "audio\ttext\na.wav\n", "line 2, has 1 fields"),
        ("t.csv", "", "is empty; its first line must name the columns"),
        ("t.csv", "audio,text\n", "has no rows"),
        ("t.csv", "audio,text,text\na,b,c\n", "names a column twice"),
        ("t.jsonl", '{"audio": "a.wav", "text": "one"}\n{"audio": oops}\n', "line 2, is not JSON"),
        ("t.json", '[\n{"audio": "a.wav"},\n{"audio": oops}]', "line 3, is not JSON"),
        ("t.jsonl", '{"audio": "a.wav", "text": "one"}\n[1, 2]\n', "record 2 is no JSON object"),
        ("t.jsonl", '{"audio": "a", "text": "x"}\n{"audio": {"a": 1}, "text": "y"}\n', "mixes types"),
        ("t.csv", b"audio,text\na.wav,caf\xe9\n", "is not UTF-8 text"),
        ("t.txt", "audio,text\n", "is no manifest: expected .csv"),
        ("t.parquet", b"PAR1 but not really", "cannot read split"),
        ("t.tar", b"no tar at all", "cannot be read as a tar shard"),
    ],
)
def test_a_malformed_table_is_refused_with_its_name_and_line(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError, match=re.escape(message)) as raised:
        read_table(str(path), "train")
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_sample_of_a_shard_without_audio_is_refused(audio, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        add(archive, "one.wav", (audio / "0.wav").read_bytes())
        add(archive, "one.txt", b"one")
        add(archive, "two.txt", b"two")
    with pytest.raises(SourceError, match=r"train\.tar: sample 'two' has no audio file \(wav, flac"):
        read_table(str(tmp_path), "train")


def test_keys_of_json_replace_neither_the_audio_nor_the_name_of_a_sample(audio, tmp_path):
    fields = {"__key__": "same", "audio": "original/0.wav", "duration": 3.0}
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for row, text in enumerate(TEXTS):
            add(archive, f"{row}.wav", (audio / f"{row}.wav").read_bytes())
            add(archive, f"{row}.json", json.dumps({**fields, "text": text}).encode())
            add(archive, f"{row}.txt", text.encode())
    utterances = open_source(DataSource(str(tmp_path)))
    assert list(utterances.texts()) == TEXTS
    assert list(utterances.ids()) == ["0", "1", "2"]
    np.testing.assert_allclose(utterances.durations(), [0.1, 0.2, 0.3])
    assert open_source(DataSource(str(tmp_path), duration_column="duration")).durations().tolist() == [3.0] * 3


@pytest.mark.parametrize("write", [write_csv, write_parquet_of_paths, write_arrow, write_one_tar])
def test_a_single_file_without_a_column_of_splits_is_training_data(write, audio, tmp_path):
    path = str(write(audio, tmp_path))
    assert read_table(path, "train").rows.size == 3
    with pytest.raises(SourceError, match="has no split 'validation': it has no column 'split', so all its rows are"):
        read_table(path, "validation")


def test_a_single_tar_is_read_by_its_column_of_splits(audio, tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for row in range(3):
            add(archive, f"{row}.wav", (audio / f"{row}.wav").read_bytes())
            fields = {"text": TEXTS[row], "split": ("train", "test")[row % 2]}
            add(archive, f"{row}.json", json.dumps(fields).encode())
    assert list(open_source(DataSource(str(tmp_path / "all.tar"))).texts()) == TEXTS[::2]
    assert list(open_source(DataSource(str(tmp_path / "all.tar"), split="test")).texts()) == [TEXTS[1]]


def test_durations_of_shards_are_remembered(audio, tmp_path):
    write_tar_shards(audio, tmp_path)
    for _ in range(2):
        utterances = open_source(DataSource(str(tmp_path)))
        np.testing.assert_allclose(utterances.durations(tmp_path / "durations.npz"), [0.1, 0.2, 0.3])
        assert list(utterances.ids()) == ["clips/0", "clips/1", "clips/2"]
    with np.load(tmp_path / "durations.npz") as arrays:
        assert arrays["keys"].size == 3


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("mozilla-foundation/common_voice_16_1", True),
        ("MLCommons/peoples_speech_v1.0", True),
        ("corpora/table.csv", False),
        ("corpora/train.Parquet", False),
        ("corpora/train-0.tar.gz", False),
        ("no/such/directory", False),
        ("../corpora", False),
        ("/corpora", False),
    ],
)
def test_ids_on_the_hub_are_told_from_paths_that_do_not_exist(path, expected):
    assert may_be_hub_id(path) == expected


def test_a_missing_table_is_named():
    with pytest.raises(SourceError, match=r"'no/such/table\.csv' is neither a file nor a directory"):
        read_table("no/such/table.csv", "train")


def test_a_missing_column_is_refused_with_the_nearest_one(audio, tmp_path):
    path = str(write_csv(audio, tmp_path))
    with pytest.raises(SourceError, match=r"no column 'tekst' but 'audio', 'text'; did you mean 'text'\?"):
        open_source(DataSource(path, text_column="tekst"))
    with pytest.raises(SourceError, match=r"no column 'speaker'.*set id_column to one of them"):
        open_source(DataSource(path, id_column="speaker"))
    (tmp_path / "other.csv").write_text("recording,words\na.wav,one\n")
    with pytest.raises(SourceError, match=r"no column 'audio' or 'file_name' .*set audio_column to one of them"):
        open_source(DataSource(str(tmp_path / "other.csv")))


def test_columns_of_the_wrong_type_are_refused(tmp_path):
    (tmp_path / "numbers.jsonl").write_text('{"audio": "a.wav", "text": 5}\n')
    with pytest.raises(SourceError, match="holds int values such as 5, not text"):
        open_source(DataSource(str(tmp_path / "numbers.jsonl")))
    (tmp_path / "audio.jsonl").write_text('{"audio": 5, "text": "one"}\n')
    with pytest.raises(SourceError, match="holds int64, not paths or audio files"):
        open_source(DataSource(str(tmp_path / "audio.jsonl")))

"""Data sets of a few generated utterances, laid out as the real ones: configurations, splits, columns and types."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
from datasets import Audio, ClassLabel, Features, Value
from tone_corpus import RATE, speak, write_corpus

SIZE = 3
#: Splits of every configuration of openslr/librispeech_asr.
LIBRISPEECH = {
    "clean": ("train.100", "train.360", "validation", "test"),
    "other": ("train.500", "validation", "test"),
    "all": (
        *("train.clean.100", "train.clean.360", "train.other.500"),
        *("validation.clean", "validation.other", "test.clean", "test.other"),
    ),
}
FLEURS = {"en_us": ("train", "validation", "test")}
#: Columns of the tables in an archive of Common Voice 17.
COMMON_VOICE = ("client_id", "path", "sentence_id", "sentence", "sentence_domain", "up_votes", "down_votes", "age")
COMMON_VOICE += ("gender", "accents", "variant", "locale", "segment")


def write_librispeech(directory: Path) -> Path:
    """Transcripts in capitals; audio is FLAC."""
    features = Features(
        {
            "file": Value("string"),
            "audio": Audio(sampling_rate=RATE),
            "text": Value("string"),
            "speaker_id": Value("int64"),
            "chapter_id": Value("int64"),
            "id": Value("string"),
        }
    )

    def row(number: int, text: str) -> dict[str, Any]:
        name = f"374-180298-{number:04d}"
        audio = {"bytes": _encoded(text, "FLAC"), "path": f"{name}.flac"}
        values = {"file": f"{name}.flac", "audio": audio, "text": text.upper()}
        return {**values, "speaker_id": 374, "chapter_id": 180298, "id": name}

    return _write_hub_data(directory, LIBRISPEECH, features, row)


def write_fleurs(directory: Path) -> Path:
    """Lengths are numbers of samples; audio is WAV."""
    features = Features(
        {
            "id": Value("int32"),
            "num_samples": Value("int32"),
            "path": Value("string"),
            "audio": Audio(sampling_rate=RATE),
            "transcription": Value("string"),
            "raw_transcription": Value("string"),
            "gender": ClassLabel(names=["male", "female", "other"]),
            "lang_id": ClassLabel(names=["af_za", "en_us"]),
            "language": Value("string"),
            "lang_group_id": ClassLabel(names=["western_european_we", "eastern_european_ee"]),
        }
    )

    def row(number: int, text: str) -> dict[str, Any]:
        path = f"/cache/{number}.wav"  # of the machine on which the table was made
        values = {"id": number, "num_samples": 1280 * len(text), "path": path, "transcription": text}
        values |= {"raw_transcription": text.capitalize() + ".", "gender": 1, "lang_id": 1}
        audio = {"bytes": _encoded(text, "WAV"), "path": path}
        return {**values, "audio": audio, "language": "English", "lang_group_id": 0}

    return _write_hub_data(directory, FLEURS, features, row)


def write_common_voice(directory: Path) -> Path:
    """An unpacked archive: a table per split, and MP3 files in ``clips``."""
    (directory / "clips").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        lines = ["\t".join(COMMON_VOICE)]
        for number, text in enumerate(_texts()):
            name = f"common_voice_mn_{split}_{number}.mp3"
            (directory / "clips" / name).write_bytes(_encoded(text, "MP3"))
            row = {"client_id": "c" * 128, "path": name, "sentence": f'"{text.capitalize()}!"', "locale": "mn"}
            row |= {"up_votes": "2", "down_votes": "0"}
            lines.append("\t".join(row.get(column, "") for column in COMMON_VOICE))
        (directory / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return directory


def write_labelled(directory: Path, column: str) -> Path:
    """Folders of splits, whose ``metadata.csv`` names files and labels; and ``trials.csv``, pairs of test files."""
    for split in ("train", "validation", "test"):
        write_corpus(directory / split, {"audio": 4})
        rows = [f"audio-{number:03d}.wav,{'ab'[number % 2]},{split}" for number in range(4)]
        (directory / split / "metadata.csv").write_text("\n".join([f"file_name,{column},split", *rows]) + "\n")
    files = [f"audio-{number:03d}.wav" for number in range(4)]
    (directory / "trials.csv").write_text(f"1,{files[0]},{files[2]}\n0,{files[0]},{files[1]}\n")
    return directory


def _texts() -> list[str]:
    return ["abc ad", "dab", "cab da"][:SIZE]


def _encoded(text: str, kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, speak(text, np.random.default_rng(0)), RATE, format=kind)
    return file.getvalue()


def _write_hub_data(
    directory: Path,
    configurations: dict[str, tuple[str, ...]],
    features: Features,
    row: Callable[[int, str], dict[str, Any]],
) -> Path:
    """Parquet files, and the card that says which belongs to which split of which configuration."""
    card = ["---", "configs:"]
    for name, splits in configurations.items():
        card += [f"- config_name: {name}", "  data_files:"]
        for index, split in enumerate(splits):
            path = directory / name / split / "0000.parquet"
            path.parent.mkdir(parents=True)
            rows = [row(SIZE * index + number, text) for number, text in enumerate(_texts())]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, features.arrow_schema), path)
            card += [f"  - split: {split}", f"    path: {name}/{split}/*.parquet"]
    (directory / "README.md").write_text("\n".join([*card, "---", ""]))
    return directory

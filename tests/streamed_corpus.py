"""Shards of spoken tones, in the formats that streams come in."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet


def read_rows(corpus: Path, split: str = "train") -> list[dict[str, str]]:
    """Audio (file names) and texts of a corpus of tones."""
    with (corpus / f"{split}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_tar_shards(corpus: Path, directory: Path, sizes: list[int]) -> Path:
    """``train-000.tar``, ... with so many utterances each."""
    directory.mkdir()
    rows = iter(read_rows(corpus))
    for shard, size in enumerate(sizes):
        with tarfile.open(directory / f"train-{shard:03d}.tar", "w") as archive:
            for row in [next(rows) for _ in range(size)]:
                name = Path(row["audio"]).stem
                for suffix, content in (("wav", (corpus / row["audio"]).read_bytes()), ("txt", row["text"].encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return directory


def write_parquet_shards(corpus: Path, directory: Path, sizes: list[int]) -> Path:
    """Parquet files as the hub has them: columns of type Audio, groups of two rows."""
    from datasets import Audio, Features, Value

    (directory / "data").mkdir(parents=True)
    features = Features({"audio": Audio(sampling_rate=16_000), "text": Value("string")})
    described = {b"huggingface": json.dumps({"info": {"features": features.to_dict()}}).encode()}
    rows = iter(read_rows(corpus))
    for shard, size in enumerate(sizes):
        part = [next(rows) for _ in range(size)]
        audio = [{"bytes": (corpus / row["audio"]).read_bytes(), "path": row["audio"]} for row in part]
        table = pyarrow.table({"audio": audio, "text": [row["text"] for row in part]}).replace_schema_metadata(
            described
        )
        path = directory / "data" / f"train-{shard:05d}-of-{len(sizes):05d}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    return directory


def write_json_shards(corpus: Path, directory: Path, sizes: list[int]) -> Path:
    """JSON Lines with paths of audio files and their lengths, all of them stated as half a second."""
    directory.mkdir()
    rows = iter(read_rows(corpus))
    for shard, size in enumerate(sizes):
        records = [{**next(rows), "seconds": 0.5} for _ in range(size)]
        text = "".join(json.dumps({**record, "audio": str(corpus / record["audio"])}) + "\n" for record in records)
        (directory / f"train-{shard}.jsonl").write_text(text)
    return directory

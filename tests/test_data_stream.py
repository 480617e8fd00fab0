"""Streams: the order of the data whoever reads it, from wherever reading begins, in every format."""

import io
import itertools
import json
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamed_corpus import read_rows, write_json_shards, write_parquet_shards, write_tar_shards
from tone_corpus import write_corpus

from speech_flax.data.buckets import Bucket
from speech_flax.data.loader import Batch
from speech_flax.data.plan import EMPTY_ROW
from speech_flax.data.shards import open_shards
from speech_flax.data.sources import DataSource, open_source
from speech_flax.data.stream import BEGINNING, Stream
from speech_flax.data.stream_loader import StreamLoader
from speech_flax.data.stream_plan import StreamPlan, WindowPlan
from speech_flax.data.tables import SourceError

RATE = 16_000
SIZES = [5, 4, 3, 6, 2, 4]
BUCKETS = (Bucket(0.4, 8), Bucket(0.8, 4), Bucket(1.6, 4))
WRITERS = {"tar": write_tar_shards, "parquet": write_parquet_shards, "json": write_json_shards}


class Letters:
    """Code points as labels."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """The same 24 utterances in six shards of every format, and as single files ("files")."""
    directory = tmp_path_factory.mktemp("streams")
    files = write_corpus(directory / "files", {"train": sum(SIZES)})
    shards = {name: writer(files, directory / name, SIZES) for name, writer in WRITERS.items()}
    return {"files": files, **shards}


class OpenedShards:
    """Shards that note which of them are opened, and at which row."""

    def __init__(self, path: Path):
        self._shards = open_shards(str(path), "train")
        self.opened: list[tuple[int, int]] = []
        for name in ("columns", "directory", "origin", "identity"):
            setattr(self, name, getattr(self._shards, name))

    def __len__(self) -> int:
        return len(self._shards)

    def rows(self, shard: int, first: int = 0) -> Iterator:
        self.opened.append((shard, first))
        return self._shards.rows(shard, first)


def make_loader(path: Path, shards: OpenedShards | None = None, readers: int = 1, **options) -> StreamLoader:
    source = DataSource(str(path), streaming=True, duration_column="seconds" if path.name == "json" else None)
    plan = StreamPlan(BUCKETS, readers=readers, window_size=12 // readers, seed=3)
    return StreamLoader(plan, source, shards or OpenedShards(path), Letters(), labels_per_second=30.0, **options)


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert (one.step, one.ids, one.texts, one.bad) == (other.step, other.ids, other.texts, other.bad)
        for name in ("waveforms", "sample_lengths", "labels", "label_lengths", "valid"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def seen(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.ids if name]


class TestWindowPlan:
    @settings(deadline=None, max_examples=60)
    @given(st.sampled_from([1, 2, 4]), st.integers(1, 30), st.integers(0, 2**32 - 1), st.integers(0, 5))
    def test_every_utterance_comes_once_in_a_bucket_that_holds_it_and_in_its_readers_part(
        self, readers, count, seed, window
    ):
        lengths = np.random.default_rng(seed).integers(0, int(1.6 * RATE) + 1, (readers, count))
        plan = WindowPlan(lengths, BUCKETS, seed=seed, window=window, first_step=10)
        again = WindowPlan(lengths, BUCKETS, seed=seed, window=window, first_step=10)
        visited, empty = [], []
        for step in plan.steps:
            batch = plan.batch(step)
            np.testing.assert_array_equal(batch.row_indices, again.batch(step).row_indices)
            assert batch.row_indices.size == BUCKETS[batch.bucket_index].batch_size
            for reader, part in enumerate(np.split(batch.row_indices, readers)):
                rows = part[part != EMPTY_ROW]
                assert (rows // count == reader).all()
                visited += rows.tolist()
            held = batch.row_indices[batch.row_indices != EMPTY_ROW]
            assert held.size and plan.num_samples[held].max() <= plan.bucket_samples[batch.bucket_index]
            if held.size < batch.row_indices.size:
                empty.append(batch.bucket_index)
        assert sorted(visited) == list(range(readers * count))
        assert len(empty) <= 1 and all(
            index == min(b for b, n in enumerate(plan.batches_per_bucket) if n) for index in empty
        )

    def test_order_is_the_same_on_every_machine_and_in_every_version(self):
        """Resuming a run depends on this order: whoever changes it breaks the runs of others."""
        lengths = np.linspace(1000, 1.6 * RATE, 16).astype(np.int64).reshape(2, 8)
        plan = WindowPlan(lengths, BUCKETS, seed=7, window=1, first_step=0)
        assert [plan.batch(step).row_indices.tolist() for step in plan.steps] == GOLDEN

    def test_windows_and_seeds_differ(self):
        lengths = np.full((1, 16), RATE // 4)
        first, second, other = (
            WindowPlan(lengths, BUCKETS, seed=seed, window=window, first_step=0).batch(0).row_indices.tolist()
            for seed, window in ((0, 0), (0, 1), (1, 0))
        )
        assert len({tuple(first), tuple(second), tuple(other)}) == 3

    def test_more_readers_cost_little_padding(self):
        """Lengths like those of read speech, 4096 in a window: 16 readers have at most five percent more than one."""
        lengths = np.clip(np.random.default_rng(0).normal(12, 4, (16, 256)), 1, 20)
        buckets = [Bucket(seconds, int(640 / seconds) // 16 * 16) for seconds in (5.0, 10.0, 15.0, 20.0)]
        shares = []
        for readers in (1, 16):
            plan = WindowPlan(
                (lengths * RATE).astype(np.int64).reshape(readers, -1), buckets, seed=0, window=0, first_step=0
            )
            held = sum(
                plan.batch(s).row_indices.size * buckets[plan.batch(s).bucket_index].max_seconds for s in plan.steps
            )
            shares.append(1 - lengths.sum() / held)
        assert shares[0] < shares[1] < shares[0] + 0.05


GOLDEN = [[2, 0, 11, 8], [1, 3, 15, 10], [4, 5, 9, 13], [7, 6, 12, 14]]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_epoch_has_every_utterance_once_in_new_order(corpora, kind):
    stream = Stream(
        DataSource(str(corpora[kind])), open_shards(str(corpora[kind]), "train"), readers=1, window_size=24, seed=0
    )
    rows, start, orders = read_rows(corpora["files"]), BEGINNING, []
    for epoch in range(2):
        window = stream.read(0, start, threading.Event())
        orders.append([utterance.text for utterance in window.utterances])
        assert sorted(orders[-1]) == sorted(row["text"] for row in rows)
        start = window.end
        assert start[0] == epoch
        for utterance in window.utterances[:3]:
            single = open_source(DataSource(str(corpora["files"]))).waveform(
                [Path(row["audio"]).stem for row in rows].index(Path(utterance.id).stem)
            )
            np.testing.assert_array_equal(stream.decode(utterance), single)
            if kind != "json":
                assert utterance.num_samples == single.size
    assert orders[0] != orders[1]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("speeds", [(1.0,), (0.9, 1.0, 1.1)])
def test_reading_goes_on_at_any_position_without_the_shards_before_it(corpora, kind, speeds):
    shards = OpenedShards(corpora[kind])
    options = {"readers": 2, "window_size": 5, "seed": 1, "speeds": speeds}
    stream = Stream(DataSource(str(corpora[kind])), shards, **options)
    position, windows, positions = BEGINNING, [], []
    for _ in range(12):
        positions.append(position)
        windows.append(stream.read(1, position, threading.Event()))
        position = windows[-1].end
    whole = [[utterance.id for utterance in window.utterances] for window in windows]
    for index in (3, 7, 11):
        shards.opened.clear()
        at = positions[index]
        again = Stream(DataSource(str(corpora[kind])), shards, **options).read(1, at, threading.Event())
        assert [utterance.id for utterance in again.utterances] == whole[index]
        assert again.end == windows[index].end
        assert shards.opened[0][1] == at[2] // len(speeds), "reading begins where it stood in its shard"
        assert len(shards.opened) <= 1 + 5, "and goes on from there"
    assert any(name.endswith("@0.9") for names in whole for name in names) == (len(speeds) > 1)


class Meeting:
    """What several processes tell each other, here threads."""

    def __init__(self, count: int):
        self._told = [None] * count
        self._barrier = threading.Barrier(count)

    def exchange_of(self, index: int):
        def exchange(own):
            self._told[index] = json.loads(json.dumps(own))
            self._barrier.wait(60)
            everyone = list(self._told)
            self._barrier.wait(60)
            return everyone

        return exchange


@pytest.mark.parametrize("readers", [1, 4])
def test_order_does_not_change_with_the_number_of_hosts(corpora, readers):
    path, steps = corpora["tar"], 14
    alone = list(make_loader(path, readers=readers).batches(0, steps))
    for count in (2, 4):
        meeting, shards = Meeting(count), [OpenedShards(path) for _ in range(count)]
        loaders = [
            make_loader(path, shards[i], readers, shard=(i, count), exchange=meeting.exchange_of(i))
            for i in range(count)
        ]
        with ThreadPoolExecutor(count) as processes:
            parts = list(processes.map(lambda loader: list(loader.batches(0, steps)), loaders))
        for step, batch in enumerate(alone):
            assert [name for part in parts for name in part[step].ids] == batch.ids
            for name in ("waveforms", "sample_lengths", "labels", "label_lengths", "valid"):
                joined = np.concatenate([getattr(part[step], name) for part in parts])
                np.testing.assert_array_equal(joined, getattr(batch, name))
        if readers == count:
            first_epoch = [{shard for shard, _ in host.opened[:1]} for host in shards]
            assert not any(left & right for left, right in itertools.combinations(first_epoch, 2))


def test_processes_that_find_different_shards_are_refused(corpora):
    lie = lambda own: [own, [[0, [1] * 12, [0, 0, 1]]]]  # noqa: E731
    with pytest.raises(SourceError, match="processes do not find the same"):
        list(make_loader(corpora["tar"], exchange=lie).batches(0, 1))


@pytest.mark.parametrize("kind", WRITERS)
def test_batches_go_on_from_the_position_in_a_checkpoint(corpora, kind):
    """At every step, among them the first and last of a window."""
    path, steps = corpora[kind], 11
    loader, whole, windows = make_loader(path, readers=2, num_workers=1), [], []
    positions = [loader.position(0)]
    for batch in loader.batches(0, steps):
        whole.append(batch)
        windows.append(loader.plan.batch(batch.step).epoch)
        positions.append(json.loads(json.dumps(loader.position(batch.step + 1))))
    assert [position["window"] for position in positions[:-1]] == windows and len(set(windows)) >= 3
    for step in range(steps - 1):
        shards = OpenedShards(path)
        fresh = make_loader(path, shards, readers=2, num_workers=3)
        fresh.restore(positions[step])
        assert_equal(list(fresh.batches(step, 2)), whole[step : step + 2])
        rows = {taken for _, _, taken in positions[step]["readers"]}
        assert rows <= {first for _, first in shards.opened}, "shards are opened where the readers stood"


def test_a_loader_can_be_left_and_taken_up_again(corpora):
    loader = make_loader(corpora["tar"])
    whole = list(loader.batches(0, 8))
    assert_equal(list(loader.batches(7, 3))[:1], whole[7:])
    with pytest.raises(ValueError, match="behind step 0"):
        next(loader.batches(0, 1))
    for batch in loader.batches(9, 1000):
        assert batch.step == 9
        break


def test_plan_knows_the_steps_in_use_and_counts_those_to_come(corpora):
    loader = make_loader(corpora["tar"])
    buckets = []
    for batch in loader.batches(0, 20):
        planned = loader.plan.batch(batch.step)
        assert (planned.row_indices != EMPTY_ROW).sum() == batch.valid.sum()
        assert batch.waveforms.shape[1] == loader.plan.bucket_samples[planned.bucket_index]
        if batch.step:
            loader.plan.batch(batch.step - 1)  # metrics of the step before arrive now
        buckets.append(planned.bucket_index)
    with pytest.raises(IndexError, match="step 0 is in no window"):
        loader.plan.batch(0)
    expected = loader.plan.batches_between(20, 120)
    assert expected.sum() == pytest.approx(100)
    assert np.abs(expected / 100 - np.bincount(buckets, minlength=3) / 20).max() < 0.15
    for index, bucket in enumerate(BUCKETS):
        empty = loader.empty_batch(index)
        assert empty.waveforms.shape == (bucket.batch_size, loader.plan.bucket_samples[index])
        assert not empty.valid.any() and empty.labels.shape[1] == loader.label_widths[index]


def test_what_has_no_place_is_left_out_and_said(corpora, caplog):
    source = DataSource(str(corpora["tar"]), streaming=True, min_seconds=0.2)
    plan = StreamPlan((Bucket(0.4, 4),), readers=1, window_size=6, seed=0)
    shards = open_shards(str(corpora["tar"]), "train")
    batches = list(StreamLoader(plan, source, shards, Letters(), labels_per_second=10.0).batches(0, 12))
    lengths = np.concatenate([batch.sample_lengths[batch.valid] for batch in batches])
    assert lengths.min() >= 0.2 * RATE and lengths.max() <= 0.4 * RATE
    assert {len(text) for batch in batches for text in batch.texts if text} == {3, 4, 5}
    for reason in ("shorter than min_seconds = 0.2", "longer than the longest bucket, 0.4 s"):
        assert any(f"left out 1 so far {reason}" in message for message in caplog.messages)
        assert sum(reason in message for message in caplog.messages) < 5
    with pytest.raises(SourceError, match=r"no utterance to train on \(7 with more than 0 labels"):
        list(StreamLoader(plan, source, shards, Letters(), labels_per_second=0.0).batches(0, 1))


def test_bad_files_are_empty_rows_with_messages(corpora, tmp_path):
    files = write_corpus(tmp_path / "files", {"train": 8})
    (files / "train-002.wav").write_bytes(b"RIFF, but no audio")
    path = write_parquet_shards(files, tmp_path / "shards", [4, 4])
    loader = make_loader(path)
    batches = list(loader.batches(0, 4))
    bad = [message for batch in batches for message in batch.bad]
    assert bad and all("train-002.wav" in message for message in bad)
    assert not any(batch.valid[batch.ids.index("train-002.wav")] for batch in batches if batch.bad)


def test_other_mistakes_reach_the_caller(corpora):
    def fail(own):
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        list(make_loader(corpora["tar"], exchange=fail).batches(0, 1))


def test_damaged_shards_and_lengths_end_in_a_sentence(corpora, tmp_path):
    path = write_parquet_shards(corpora["files"], tmp_path / "parquet", [4, 4])
    damaged = path / "data" / "train-00001-of-00002.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with pytest.raises(SourceError, match=r"shard 1 of .*parquet cannot be read: "):
        list(make_loader(path).batches(0, 3))
    path = write_json_shards(corpora["files"], tmp_path / "json", [4])
    (path / "train-0.jsonl").write_text((path / "train-0.jsonl").read_text().replace("0.5", "-1"))
    with pytest.raises(SourceError, match=r"column 'seconds' of .*json holds -1, not seconds"):
        list(make_loader(path).batches(0, 1))


def test_single_files_are_streamed_by_their_split_column(corpora, tmp_path):
    rows = read_rows(corpora["files"])
    lines = [{"audio": str(corpora["files"] / row["audio"]), "text": row["text"]} for row in rows]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps({**line, "split": "ab"[i % 2]}) + "\n" for i, line in enumerate(lines)))
    shards = open_shards(str(path), "b")
    assert [number for number, _ in shards.rows(0, 4)] == [5, *range(7, 24, 2)]
    (tmp_path / "plain.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(SourceError, match=r"plain.jsonl has no split 'b'"):
        open_shards(str(tmp_path / "plain.jsonl"), "b")
    with pytest.raises(SourceError, match=r"train-000.tar has no split 'validation': it has no column 'split'"):
        open_shards(str(corpora["tar"] / "train-000.tar"), "validation")
    with pytest.raises(SourceError, match=r"train.csv cannot be streamed"):
        open_shards(str(corpora["files"] / "train.csv"), "train")


def test_a_single_tar_is_streamed_by_its_column_of_splits(tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for row in range(8):
            for name, content in ((f"{row}.wav", b"audio"), (f"{row}.json", b'{"split": "%c"}' % b"ab"[row % 2])):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    shards = open_shards(str(tmp_path / "all.tar"), "b")
    assert [(number, sample["__key__"]) for number, sample in shards.rows(0, 2)] == [(3, "3"), (5, "5"), (7, "7")]


def test_data_to_evaluate_on_are_the_first_rows_of_a_stream(corpora):
    source = DataSource(str(corpora["parquet"]), streaming=True, limit=7)
    streamed, whole = open_source(source), open_source(DataSource(str(corpora["parquet"])))
    assert streamed.texts() == whole.texts()[:7]
    np.testing.assert_array_equal(streamed.waveform(6), whole.waveform(6))
    with pytest.raises(SourceError, match="set limit"):
        open_source(DataSource(str(corpora["parquet"]), streaming=True))

"""Batches of audio: the same whoever reads them, whole over all hosts, and counted where a file is bad."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speech_flax.data.buckets import Bucket
from speech_flax.data.loader import IGNORED_LABEL, Batch, BatchLoader, load_batches
from speech_flax.data.plan import BatchPlan
from speech_flax.data.sources import DataSource, Utterances, open_source
from speech_flax.data.waveform_cache import WaveformCache

#: Samples of every utterance; two buckets, of 0.1 and 0.2 s.
LENGTHS = [800, 1600, 1601, 3200, 400, 2400, 1200, 3000, 1000, 600]
TEXTS = ["word " * (1 + index % 4) + "end" for index in range(len(LENGTHS))]


class Letters:
    """Code points as labels."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


@pytest.fixture
def corpus(tmp_path) -> tuple[Utterances, BatchPlan]:
    random = np.random.default_rng(0)
    for index, length in enumerate(LENGTHS):
        soundfile.write(tmp_path / f"{index}.wav", random.uniform(-0.9, 0.9, length), 16_000, subtype="PCM_16")
    rows = "".join(f"{index}.wav,{text}\n" for index, text in enumerate(TEXTS))
    (tmp_path / "table.csv").write_text("audio,text\n" + rows)
    return open_source(DataSource(str(tmp_path / "table.csv"))), make_plan()


def make_plan() -> BatchPlan:
    return BatchPlan(LENGTHS, [Bucket(0.1, 4), Bucket(0.2, 2)], seed=3)


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one.step, one.ids, one.texts, one.bad) == (other.step, other.ids, other.texts, other.bad)
        for name in ("waveforms", "sample_lengths", "labels", "label_lengths", "valid"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_a_batch_holds_each_utterance_as_it_is_and_padding_beside_it(corpus):
    utterances, plan = corpus
    seen = []
    for step, batch in enumerate(load_batches(plan, utterances, Letters())):
        planned = plan.batch(step)
        assert batch.step == step
        assert batch.waveforms.shape == (planned.row_indices.size, plan.bucket_samples[planned.bucket_index])
        for row, index in enumerate(planned.row_indices.tolist()):
            samples, labels = batch.sample_lengths[row], batch.label_lengths[row]
            assert not batch.waveforms[row, samples:].any()
            assert (batch.labels[row, labels:] == IGNORED_LABEL).all()
            assert batch.valid[row] == (index >= 0)
            if index < 0:
                assert (samples, labels, batch.ids[row], batch.texts[row]) == (0, 0, "", "")
                continue
            seen.append(index)
            assert (batch.ids[row], batch.texts[row]) == (f"{index}.wav", TEXTS[index])
            np.testing.assert_array_equal(batch.waveforms[row, :samples], utterances.waveform(index))
            assert batch.labels[row, :labels].tolist() == Letters().encode(TEXTS[index])
    assert sorted(seen) == list(range(len(LENGTHS)))


def test_labels_of_another_kind_are_numbers_of_their_type(corpus):
    class Length:
        def encode(self, text: str) -> list[float]:
            return [len(text) / 2]

    utterances, plan = corpus
    batch = next(load_batches(plan, utterances, Length(), label_dtype=np.float32))
    assert batch.labels.dtype == np.float32
    assert batch.labels[0, 0] == len(batch.texts[0]) / 2


def test_threads_and_processes_and_the_cache_do_not_change_batches(corpus):
    utterances, plan = corpus
    steps = 2 * plan.steps_per_epoch + 1
    alone = list(load_batches(plan, utterances, Letters(), 0, steps, num_workers=1))
    assert_equal(alone, list(load_batches(plan, utterances, Letters(), 0, steps, num_workers=8)))
    assert_equal(alone, list(load_batches(plan, utterances, Letters(), 0, steps, cache_decoded_mb=10)))
    assert_equal(alone[2:6], list(load_batches(plan, utterances, Letters(), 2, 4, num_processes=2)))


READ_ONE = """
import sys
from test_data_loader import DataSource, Letters, load_batches, make_plan, open_source

next(load_batches(make_plan(), open_source(DataSource(sys.argv[1])), Letters()))
print(*{"datasets", "pandas", "grain", "orbax.checkpoint"} & set(sys.modules))
"""


def test_audio_files_of_a_csv_table_are_read_without_libraries_that_take_seconds_to_import(corpus, tmp_path):
    command = [sys.executable, "-c", READ_ONE, str(tmp_path / "table.csv")]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_reading_can_begin_at_any_step(corpus):
    utterances, plan = corpus
    whole = list(load_batches(plan, utterances, Letters(), 0, 12))
    assert_equal(whole[5:], list(load_batches(plan, utterances, Letters(), 5, 7)))


def test_hosts_read_disjoint_rows_that_make_up_the_batch(corpus):
    utterances, plan = corpus
    whole = list(load_batches(plan, utterances, Letters()))
    hosts = [list(load_batches(plan, utterances, Letters(), shard=(index, 2))) for index in range(2)]
    for step, batch in enumerate(whole):
        parts = [batches[step] for batches in hosts]
        for name in ("waveforms", "sample_lengths", "labels", "label_lengths", "valid"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(batch, name))
        assert parts[0].ids + parts[1].ids == batch.ids
        assert not {*parts[0].ids} & {*parts[1].ids} - {""}


def test_a_bad_file_is_an_empty_row_with_a_message(corpus, tmp_path):
    utterances, plan = corpus
    (tmp_path / "0.wav").write_bytes(b"RIFF but nothing else")
    (tmp_path / "3.wav").unlink()
    soundfile.write(tmp_path / "6.wav", np.zeros(48_000, np.float32), 16_000)
    batches = list(load_batches(plan, utterances, Letters(), cache_decoded_mb=10))
    messages = sorted(message for batch in batches for message in batch.bad)
    assert len(messages) == 3
    for name, cause, message in zip(
        ("0.wav", "3.wav", "6.wav"), ("cannot be decoded", "no such file", "is 3.0 s long"), messages, strict=True
    ):
        assert name in message
        assert cause in message
    for batch in batches:
        for row in np.flatnonzero(~batch.valid):
            assert (batch.sample_lengths[row], batch.label_lengths[row]) == (0, 0)
            assert not batch.waveforms[row].any()
    assert sum(batch.valid.sum() for batch in batches) == len(LENGTHS) - 3


def test_other_mistakes_reach_the_caller_at_their_step(corpus):
    class Fails:
        def encode(self, text: str) -> list[int]:
            if text == TEXTS[2] and self.armed:
                raise ValueError("cannot encode this")
            return [1]

        armed = False

    utterances, plan = corpus
    encoder = Fails()
    loader = BatchLoader(plan, utterances, encoder)
    encoder.armed = True
    with pytest.raises(ValueError, match="cannot encode this"):
        list(loader.batches())


def test_a_loop_can_be_left_at_any_time(corpus):
    utterances, plan = corpus
    loader = BatchLoader(plan, utterances, Letters(), num_workers=4)
    for _ in range(3):
        for batch in loader.batches(0, 1000):
            assert batch.step == 0
            break


def test_an_empty_batch_has_the_shape_of_its_bucket(corpus):
    utterances, plan = corpus
    loader = BatchLoader(plan, utterances, Letters(), shard=(1, 2))
    for batch in loader.batches():
        index = plan.batch(batch.step).bucket_index
        empty = loader.empty_batch(index)
        assert empty.waveforms.shape == batch.waveforms.shape
        assert empty.labels.shape == batch.labels.shape
        assert not empty.valid.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": (0, 4)}, "4 processes cannot share batches of 2; choose a multiple"),
        ({"num_workers": 0}, "0 worker threads and 0 processes cannot read"),
    ],
)
def test_impossible_loaders_are_refused(corpus, options, message):
    utterances, plan = corpus
    with pytest.raises(ValueError, match=message):
        BatchLoader(plan, utterances, Letters(), **options)
    with pytest.raises(ValueError, match="plan is for 1 utterances, but there are 10"):
        BatchLoader(BatchPlan([1], [Bucket(1.0, 1)]), utterances, Letters())


class TestWaveformCache:
    sixteen_bit = (np.random.default_rng(0).integers(-32767, 32768, 1000) / 32768).astype(np.float32)
    resampled = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)

    @pytest.mark.parametrize(("name", "size"), [("sixteen_bit", 2000), ("resampled", 4000)])
    def test_waveforms_come_back_bit_for_bit(self, name, size):
        waveform = getattr(self, name)
        cache = WaveformCache(size)  # just enough: 16-bit audio takes two bytes a sample
        cache.put(5, waveform)
        np.testing.assert_array_equal(cache.get(5), waveform)
        assert cache.get(5).dtype == np.float32
        assert cache.get(4) is None

    @pytest.mark.parametrize("extreme", [-1.0, 1.0, 1.5])
    def test_full_scale_is_kept_exactly(self, extreme):
        waveform = np.array([0.0, extreme], np.float32)
        cache = WaveformCache(100)
        cache.put(0, waveform)
        np.testing.assert_array_equal(cache.get(0), waveform)

    def test_what_has_no_room_is_left_out_and_nothing_is_evicted(self):
        cache = WaveformCache(5000)
        for index in range(4):
            cache.put(index, self.sixteen_bit)
        assert [cache.get(index) is not None for index in range(4)] == [True, True, False, False]
        cache.put(4, self.sixteen_bit[:500])
        assert len(cache) == 3

    def test_a_view_does_not_keep_the_whole_alive(self):
        cache = WaveformCache(10_000)
        cache.put(0, self.resampled[:10])
        assert cache._waveforms[0].base is None

    def test_it_arrives_empty_in_another_process(self):
        cache = WaveformCache(10_000)
        cache.put(0, self.resampled)
        assert len(pickle.loads(pickle.dumps(cache))) == 0


def test_the_cache_spares_the_second_epoch_the_decoding(corpus, tmp_path: Path):
    utterances, plan = corpus
    loader = BatchLoader(plan, utterances, Letters(), cache_decoded_mb=1)
    first = list(loader.batches())
    for path in tmp_path.glob("*.wav"):
        path.unlink()
    assert_equal(first, list(loader.batches()))

"""How fast audio gets from files to batches, and what training loses by waiting for it.

    python benchmarks/data.py [--workers 1 2] [--minutes 10] [--steps 24] [--only files workers windows device training]

``files``: audio-hours per hour of one core, by format and sampling rate: decoded, resampled to 16 kHz, and made into
log-mel features (which training computes on the device instead). CPU time of all threads.

``workers``: audio-hours per hour of the clock through the loaders that training uses, by number of worker threads and
processes, from single files and from streamed shards.

``windows``: the share of padding in streams, by shuffle buffer and readers; computed, no audio.

``device``: time that a device would lose by waiting for batches, where the device is a clock: it takes so many seconds
of padded audio per second and leaves the cores to the workers, as an accelerator does.

``training``: the same steps of the compiled training program with batches from files and with batches that lie in
memory, by turns; on configs/quickstart.yaml and on the same model with long utterances. Here workers and training
share the cores.

The audio is the quickstart corpus, joined to the lengths of read speech (8 to 16 s) and written in every format.
"""

import argparse
import csv
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
import soundfile
import soxr

from speech_flax.audio.decoding import load_audio
from speech_flax.audio.log_mel import log_mel
from speech_flax.data.buckets import Bucket, buckets_up_to, duration_samples, equal_steps
from speech_flax.data.loader import Batch, BatchLoader
from speech_flax.data.plan import BatchPlan
from speech_flax.data.shards import open_shards
from speech_flax.data.sources import DataSource, open_source
from speech_flax.data.stream_loader import StreamLoader
from speech_flax.data.stream_plan import StreamPlan, WindowPlan
from speech_flax.training.experiment import Experiment, read_experiment
from speech_flax.training.loop import open_splits
from speech_flax.training.programs import training_programs
from speech_flax.training.run_directory import RunDirectory
from speech_flax.training.sharding import make_mesh
from speech_flax.training.task import make_task

ROOT = Path(__file__).parents[1]
RATE = 16_000
FORMATS = {"wav": "WAV", "flac": "FLAC", "mp3": "MP3", "opus": "OGG"}
RATES = (16_000, 8_000, 44_100, 48_000)
LONG_SECONDS = 16.0
#: One chip and four of a v5e slice, at the most that the preflight of w2v-bert-2.0 gives them.
DEVICE_SPEEDS = (755, 3020)


class Letters:
    """Characters as labels."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def long_utterances(minutes: float) -> Iterator[tuple[np.ndarray, str]]:
    """Neighbours of the quickstart corpus joined to 8 to 16 s, with their transcripts, at 16 kHz."""
    random = np.random.default_rng(0)
    utterances = open_source(DataSource(str(ROOT / "data/quickstart"), duration_column="seconds"))
    index, seconds = 0, 0.0
    while seconds < 60 * minutes:
        wanted, parts, texts = random.uniform(8, LONG_SECONDS - 0.1), [], []
        while sum(part.size for part in parts) < wanted * RATE:
            parts.append(utterances.waveform(index % len(utterances)))
            texts.append(utterances.texts()[index % len(utterances)])
            index += 1
        yield np.concatenate(parts)[: int(wanted * RATE)], " ".join(texts)
        seconds += wanted


def encoded(waveform: np.ndarray, suffix: str, rate: int) -> bytes:
    buffer = io.BytesIO()
    subtype = {"mp3": "MPEG_LAYER_III", "opus": "OPUS"}.get(suffix, "PCM_16")
    at_rate = waveform if rate == RATE else soxr.resample(waveform, RATE, rate)
    soundfile.write(buffer, np.clip(at_rate, -1, 1), rate, format=FORMATS[suffix], subtype=subtype)
    return buffer.getvalue()


def write_files(directory: Path, waveforms: Sequence[tuple[np.ndarray, str]], suffix: str, rate: int = RATE) -> Path:
    """Files and a table that names them, with their lengths."""
    directory.mkdir()
    with (directory / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "text", "seconds"])
        for index, (waveform, text) in enumerate(waveforms):
            (directory / f"{index:05d}.{suffix}").write_bytes(encoded(waveform, suffix, rate))
            writer.writerow([f"{index:05d}.{suffix}", text, f"{waveform.size / RATE:.4f}"])
    return directory


def write_shards(directory: Path, files: Path, number: int = 8) -> Path:
    """The files of a table as tar shards, lengths among the JSON of each sample."""
    directory.mkdir()
    with (files / "train.csv").open() as table:
        rows = list(csv.DictReader(table))
    for shard in range(number):
        with tarfile.open(directory / f"train-{shard:03d}.tar", "w") as archive:
            for row in rows[shard::number]:
                name, suffix = row["audio"].split(".")
                described = json.dumps({"text": row["text"], "seconds": float(row["seconds"])}).encode()
                for ending, content in ((suffix, (files / row["audio"]).read_bytes()), ("json", described)):
                    member = tarfile.TarInfo(f"{name}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return directory


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    def text(cell: object) -> str:
        if isinstance(cell, int):
            return f"{cell:,}"
        return f"{cell:.3g}" if isinstance(cell, float) else str(cell)

    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(text, row))} |", flush=True)


def hours_per_core(work: Callable[[bytes], object], files: Sequence[bytes], seconds: float, repeats: int = 3) -> int:
    """Audio-hours per hour of CPU time: the median of some runs of ``work`` over files of so many seconds in all."""
    rates = []
    for _ in range(repeats):
        began = time.process_time()
        for file in files:
            work(file)
        rates.append(seconds / (time.process_time() - began))
    return round(statistics.median(rates))


def log_mel_of(file: bytes) -> None:
    """Decode a file and compute its features, in one shape for all."""
    waveform = load_audio(file)[: round(LONG_SECONDS * RATE)]
    padded = np.zeros((1, round(LONG_SECONDS * RATE)), np.float32)
    padded[0, : waveform.size] = waveform
    jax.block_until_ready(_features(padded, np.full(1, waveform.size, np.int32)))


_features = jax.jit(log_mel)


def measure_files(waveforms: Sequence[tuple[np.ndarray, str]]) -> None:
    seconds = sum(waveform.size for waveform, _ in waveforms) / RATE
    rows = []
    for suffix in FORMATS:
        for rate in RATES:
            if suffix == "opus" and rate == 44_100:
                continue  # the format does not know that rate
            files = [encoded(waveform, suffix, rate) for waveform, _ in waveforms]
            log_mel_of(files[0])
            kinds = (partial(load_audio, sampling_rate=rate), load_audio, log_mel_of)
            megabytes = round(sum(map(len, files)) / seconds * 3600 / 1e6)
            rows.append([suffix, rate, megabytes, *(hours_per_core(work, files, seconds) for work in kinds)])
    header = ("format", "rate [Hz]", "MB per hour", "decoded", "and at 16 kHz", "and log-mel")
    print_table("Audio-hours per hour of one core", header, rows)


def rate_of(batches: Iterator[Batch], warm_up: float = 4.0, seconds: float = 8.0) -> int:
    """Audio-hours per hour of the clock, once all workers have long begun."""
    samples, first, began, now = 0, None, None, 0.0
    for batch in batches:
        now = time.perf_counter()
        first = first or now
        if began is not None:
            samples += int(batch.sample_lengths.sum())
        elif now - first > warm_up:
            began = now
        if began is not None and now - began > seconds:
            break
    batches.close()
    return round(samples / RATE / (now - began))


def streaming_loader(shards: Path, buckets: Sequence[Bucket], num_workers: int) -> StreamLoader:
    source = DataSource(str(shards), streaming=True, duration_column="seconds")
    plan = StreamPlan(buckets, readers=4, window_size=16, seed=0)
    opened = open_shards(source.path, source.split)
    return StreamLoader(plan, source, opened, Letters(), labels_per_second=40.0, num_workers=num_workers)


def measure_workers(directory: Path, waveforms: Sequence[tuple[np.ndarray, str]], workers: Sequence[int]) -> None:
    buckets = buckets_up_to(equal_steps(LONG_SECONDS, 4), seconds_per_batch=64.0, batch_multiple=4)
    rows = []
    for suffix, rate in (("flac", RATE), ("mp3", 48_000)):
        files = write_files(directory / f"{suffix}{rate}", waveforms, suffix, rate)
        shards = write_shards(directory / f"{suffix}{rate}-shards", files)
        utterances = open_source(DataSource(str(files), duration_column="seconds"))
        plan = BatchPlan(duration_samples(utterances.durations()), buckets)
        for number in workers:
            loaders = (
                BatchLoader(plan, utterances, Letters(), num_workers=number),
                BatchLoader(plan, utterances, Letters(), num_processes=number),
                streaming_loader(shards, buckets, number),
            )
            rates = (rate_of(loader.batches(0, 10**9)) for loader in loaders)
            rows.append([f"{suffix}, {rate} Hz", number, *rates])
    header = ("files", "workers", "threads", "processes", "threads, tar shards streamed")
    print_table("Audio-hours per hour of the clock, to batches of 64 s", header, rows)


def measure_training(directory: Path, waveforms: Sequence[tuple[np.ndarray, str]], steps: int) -> None:
    quickstart = str(ROOT / "configs/quickstart.yaml")
    fixed = [f"--data.train.path={ROOT / 'data/quickstart'}", "--cache_directory=null", "--data.validation=null"]
    fixed += ["--data.test=null", f"--run_directory={directory / 'run'}"]
    long_files = write_files(directory / "long", waveforms, "flac", 48_000)
    cases = {"quickstart, first epoch (opus, 1 to 5 s)": [*fixed, "--data.cache_decoded_mb=0"]}
    cases["quickstart, later epochs (its cache)"] = fixed
    cases["long (flac of 48 kHz, 8 to 16 s)"] = [
        *fixed[1:],
        f"--data.train={{path: {long_files}, duration_column: seconds}}",
        "--data.batch_seconds=64",
        "--data.cache_decoded_mb=0",
        "--data.speed_factors=[1.0]",
    ]
    rows = []
    for name, options in cases.items():
        rows.append([name, *training_times(read_experiment(quickstart, *options), steps)])
    header = (
        "corpus",
        "audio-s per step",
        "step, in memory [s]",
        "step, from files [s]",
        "lost",
        "of it waiting for data",
    )
    print_table("Training with and without reading", header, rows)


def training_times(experiment: Experiment, steps: int, rounds: int = 3) -> tuple[float, float, float, str, str]:
    """Median times of a step, by turns from memory and from files, and the share of time lost."""
    mesh = make_mesh(experiment.mesh)
    split = open_splits(experiment, mesh, RunDirectory(experiment))["train"]
    task, _ = make_task(experiment, split.labels())
    loader = split.loader(task.label_encoder, experiment.data, task.label_dtype)
    programs = training_programs(experiment, task, mesh)
    kept = list(loader.batches(0, steps))
    for batch in kept:
        programs.compile(batch, training=True)
    state = programs.initial_state()
    times: dict[str, list[float]] = {"memory": [], "files": []}
    waited = []
    for number in range(rounds + 1):
        for kind in times:
            batches = iter(kept) if kind == "memory" else loader.batches(0, steps)
            next_one, waiting = next(batches), 0.0
            began = time.perf_counter()
            while next_one is not None:
                state, metrics = programs.train(state, next_one)
                asked = time.perf_counter()
                next_one = next(batches, None)
                waiting += time.perf_counter() - asked
            jax.block_until_ready(metrics)
            if number:  # the first round warms up
                times[kind].append((time.perf_counter() - began) / steps)
                waited += [waiting / steps] if kind == "files" else []
    memory, files = statistics.median(times["memory"]), statistics.median(times["files"])
    seconds = sum(float(batch.sample_lengths.sum()) for batch in kept) / RATE / steps
    return seconds, memory, files, f"{files / memory - 1:.1%}", f"{statistics.median(waited) / files:.1%}"


def measure_device(directory: Path, waveforms: Sequence[tuple[np.ndarray, str]], workers: Sequence[int]) -> None:
    buckets = buckets_up_to(equal_steps(LONG_SECONDS, 4), seconds_per_batch=64.0)
    rows = []
    for suffix, rate in (("flac", RATE), ("mp3", 48_000)):
        utterances = open_source(
            DataSource(
                str(write_files(directory / f"{suffix}-device", waveforms, suffix, rate)), duration_column="seconds"
            )
        )
        plan = BatchPlan(duration_samples(utterances.durations()), buckets)
        for number in workers:
            loader = BatchLoader(plan, utterances, Letters(), num_workers=number)
            lost = (f"{time_lost(loader.batches(0, 10**9), speed):.1%}" for speed in DEVICE_SPEEDS)
            rows.append([f"{suffix}, {rate} Hz", number, *lost])
    header = ("files", "worker threads", *(f"{speed:,} audio-s/s" for speed in DEVICE_SPEEDS))
    print_table("Time lost by a device of that speed", header, rows)


def time_lost(batches: Iterator[Batch], speed: float, seconds: float = 10.0) -> float:
    """Share of time that a device has nothing to do. As in training, the next batch is taken while a step runs."""
    next(batches)
    began = free = time.perf_counter()
    busy = 0.0
    for batch in batches:
        step = batch.waveforms.size / RATE / speed
        free = max(free, time.perf_counter()) + step
        busy += step
        time.sleep(max(0.0, free - step - time.perf_counter()))
        if busy > seconds:
            break
    batches.close()
    return (free - began) / busy - 1


def measure_windows() -> None:
    """Padding of a stream with batches of 2560 s, for lengths like those of LibriSpeech."""
    buckets = buckets_up_to([5.0, 10.0, 15.0, 20.0], seconds_per_batch=2560.0, batch_multiple=64)
    rows = []
    for size in (1024, 4096, 16_384):
        lengths = np.random.default_rng(0).normal(12.3, 3.8, (5, size)).clip(1, 20)
        shares = []
        for readers in (1, 16, 64):
            held = 0.0
            for window, seconds in enumerate(lengths):
                samples = duration_samples(seconds).reshape(readers, -1)
                plan = WindowPlan(samples, buckets, seed=0, window=window, first_step=0)
                counts = zip(plan.batches_per_bucket, buckets, strict=True)
                held += sum(count * bucket.batch_size * bucket.max_seconds for count, bucket in counts)
            shares.append(f"{1 - lengths.sum() / held:.1%}")
        bounds = np.array([bucket.max_seconds for bucket in buckets])
        own = bounds[np.searchsorted(bounds, lengths)]
        rows.append([size, f"{1 - lengths.sum() / own.sum():.1%}", *shares])
    header = ("shuffle buffer", "each in its own bucket", "1 reader", "16 readers", "64 readers")
    print_table("Padding of a stream", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], help="numbers of worker threads and processes"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="audio per format")
    parser.add_argument("--steps", type=int, default=24, help="training steps per turn")
    parts = ("files", "workers", "windows", "device", "training")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="what is measured")
    options = parser.parse_args()
    waveforms = list(long_utterances(options.minutes))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        if "files" in options.only:
            measure_files(waveforms)
        if "workers" in options.only:
            measure_workers(directory, waveforms, options.workers)
        if "windows" in options.only:
            measure_windows()
        if "device" in options.only:
            measure_device(directory, waveforms, options.workers)
        if "training" in options.only:
            measure_training(directory, waveforms, options.steps)


if __name__ == "__main__":
    main()

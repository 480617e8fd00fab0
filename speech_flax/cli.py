"""The command ``speech-flax``: train, convert, transcribe, classify, evaluate.

A mistake of the user ends in one sentence on standard error and exit code 1. Set ``SPEECH_FLAX_TRACEBACK=1`` to see
where it was noticed.
"""

import argparse
import contextlib
import gc
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speech_flax.huge_pages import start_with_huge_pages

if TYPE_CHECKING:
    from speech_flax.training.experiment import Experiment


_USAGE = """usage: speech-flax COMMAND [OPTION]...

commands:
  train       train a model as a configuration file describes it
  convert     convert checkpoints from PyTorch and TensorFlow, and back
  transcribe  print the text of audio files
  classify    print what a model says of audio files: classes, values, speakers
  evaluate    score a trained model

Each command explains itself with --help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code; without ``arguments`` that of this process."""
    if arguments is None:
        start_with_huge_pages()
        arguments = sys.argv[1:]
    arguments = list(arguments)
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "train": _train,
        "convert": _convert,
        "transcribe": _transcribe,
        "classify": _classify,
        "evaluate": _evaluate,
    }
    if not arguments or arguments[0] not in commands:
        print(_USAGE)
        if arguments and arguments[0] not in ("-h", "--help"):
            print(f"error: there is no command {arguments[0]!r}", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    gc.set_threshold(100_000, 20, 100)  # a tenth of the start was the search for garbage in what is imported and traced
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of what is none of the user's business
    logging.getLogger("speech_flax").setLevel(logging.INFO)
    try:
        return commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("SPEECH_FLAX_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _train(arguments: Sequence[str]) -> int:
    from speech_flax.training.experiment import experiment_parser, parse_experiment
    from speech_flax.training.loop import train

    parser = experiment_parser()
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        help="Run directory to continue with the configuration it holds; the mesh and intervals may be overridden.",
    )
    parser.add_argument(
        "--preflight",
        type=str | None,
        default=None,
        help="TPU slice, as in v5e:4x4 or v5p:2x2x2: compile for it on this machine and print what training takes.",
    )
    parser.add_argument(
        "--detailed", type=bool, default=False, help="Preflight by the cycles of the compiled code; far slower."
    )
    parser.add_argument("--json", type=bool, default=False, help="Print the preflight as JSON.")
    experiment, options = parse_experiment(parser, _resumed(arguments))
    if options.preflight is not None:
        return _preflight(experiment, options.preflight, detailed=options.detailed, as_json=options.json)
    if options.detailed or options.json:
        raise ValueError("--detailed and --json say how to --preflight; give the slice too, as in v5e:4x4")
    with _memory_explained():
        train(experiment)
    return 0


@contextlib.contextmanager
def _memory_explained() -> Iterator[None]:
    """A device that runs out of memory in training, or a program that cannot fit it, is an experiment too large.

    Raises:
        ExperimentError: with the settings that make it smaller.
    """
    import jax

    from speech_flax.training.experiment import ExperimentError

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise ExperimentError(
            "a device has too little memory: lower data.batch_seconds, raise accumulation or let model.remat keep less "
            f"(dots, attention, full); JAX says {reason[:200]}"
        ) from error


def _resumed(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``--resume DIRECTORY`` replaced by the configuration of the run in it."""
    from speech_flax.storage import exists, storage_path

    own = argparse.ArgumentParser(prog="train.py", allow_abbrev=False, add_help=False)
    own.add_argument("--resume")
    options, others = own.parse_known_args(arguments)
    if options.resume is None:
        return others
    config = storage_path(options.resume) / "config.yaml"
    if not exists(config):
        raise FileNotFoundError(f"{options.resume} holds no run to resume: there is no {config}")
    if any(argument.split("=")[0] == "--config" for argument in others):
        raise ValueError("--resume takes the configuration of the run directory; leave --config out")
    return ["--config", str(config), "--run_directory", options.resume, *others]


def _preflight(experiment: "Experiment", slice_name: str, *, detailed: bool, as_json: bool) -> int:
    from speech_flax.training import preflight_report
    from speech_flax.training.preflight import preflight
    from speech_flax.training.tpu_slices import parse_slice

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report = preflight(experiment, parse_slice(slice_name), detailed=detailed, say=say)
    print(preflight_report.as_json(report) if as_json else preflight_report.as_text(report))
    return 0 if report.fits else 1


def _convert(arguments: Sequence[str]) -> int:
    from speech_flax.conversion.command import main as convert

    return convert(arguments)


def _transcribe(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="speech-flax transcribe", description="Print the text of audio files.")
    parser.add_argument("files", nargs="+", help="Audio files: WAV, FLAC, MP3, Ogg, Opus, AIFF, SPHERE; any rate.")
    parser.add_argument("--model", required=True, help="Directory or hub id of a CTC model with its processor.")
    parser.add_argument("--json", action="store_true", help="One JSON object per file, with the times of words.")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="Computation type.")
    parser.add_argument("--chunk_seconds", type=float, default=30.0, help="Longest stretch read at once [s].")
    parser.add_argument("--margin_seconds", type=float, default=4.0, help="Context kept on both sides of a cut [s].")
    options = parser.parse_args(arguments)
    for file in options.files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file}: no such file")

    import dataclasses

    from tqdm import tqdm

    from speech_flax.audio.decoding import AudioError, load_audio
    from speech_flax.transcription import Transcriber

    transcriber = Transcriber.from_pretrained(
        options.model,
        dtype=options.dtype,
        chunk_seconds=options.chunk_seconds,
        margin_seconds=options.margin_seconds,
    )
    unreadable = 0
    for file in tqdm(options.files, unit="file", disable=None, leave=False):
        try:
            transcript = transcriber(load_audio(file))
        except AudioError as error:
            unreadable += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
            continue
        if options.json:
            tqdm.write(json.dumps({"file": file, **dataclasses.asdict(transcript)}, ensure_ascii=False))
        else:
            tqdm.write(f"{file}: {transcript.text}" if len(options.files) > 1 else transcript.text)
    return 1 if unreadable else 0


def _classify(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="speech-flax classify",
        description="Print classes or values of audio files, what holds when in them, or how alike their speakers are.",
    )
    parser.add_argument("files", nargs="+", help="Audio files: WAV, FLAC, MP3, Ogg, Opus, AIFF, SPHERE; any rate.")
    parser.add_argument("--model", required=True, help="Directory or hub id of a model with such a head.")
    parser.add_argument("--json", action="store_true", help="One JSON object per file, with all that the model says.")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="Computation type.")
    options = parser.parse_args(arguments)
    for file in options.files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file}: no such file")

    import numpy as np
    from tqdm import tqdm

    from speech_flax.audio.decoding import load_audio
    from speech_flax.classification import Classifier, describe

    classifier = Classifier.from_pretrained(options.model, dtype=options.dtype)
    results = {}
    unreadable = 0
    for file in tqdm(options.files, unit="file", disable=None, leave=False):
        try:
            results[file] = classifier(load_audio(file))
        except ValueError as error:
            unreadable += 1
            tqdm.write(f"error: {error if file in str(error) else f'{file}: {error}'}", file=sys.stderr)
            continue
        if options.json:
            tqdm.write(json.dumps({"file": file, **results[file].known()}, ensure_ascii=False))
        elif results[file].embedding is None:
            tqdm.write(f"{file}: {describe(results[file])}" if len(options.files) > 1 else describe(results[file]))
    embeddings = {file: np.array(result.embedding) for file, result in results.items() if result.embedding}
    if embeddings and not options.json:
        _compare_speakers(embeddings)
    return 1 if unreadable else 0


def _compare_speakers(embeddings: dict[str, Any]) -> None:
    if len(embeddings) == 1:
        print("give several files to compare their speakers, or --json for the embedding")
    for first, second in itertools.combinations(embeddings, 2):
        print(f"{first} and {second}: cosine {embeddings[first] @ embeddings[second]:.3f}")


def _evaluate(arguments: Sequence[str]) -> int:
    from speech_flax.training.experiment import experiment_parser, parse_experiment
    from speech_flax.training.loop import evaluate_model
    from speech_flax.training.progress import say

    own = argparse.ArgumentParser(
        prog="speech-flax evaluate",
        description="Score a trained model on data that a configuration file describes.",
        epilog="All options of train.py describe the data, and override the configuration file.",
        allow_abbrev=False,
        add_help=False,
    )
    own.add_argument("--model", required=True, help="Directory of a trained model.")
    own.add_argument("--split", choices=("validation", "test"), default="test", help="Utterances to score.")
    parser = experiment_parser("speech-flax evaluate")
    if {"-h", "--help"} & set(arguments):
        own.print_help()
        parser.print_help()
        return 0
    options, others = own.parse_known_args(arguments)
    experiment = parse_experiment(parser, others)[0]
    evaluation = evaluate_model(experiment, options.model, options.split)
    say(json.dumps(evaluation.numbers(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

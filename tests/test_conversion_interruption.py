"""Real signals to the real command, while it writes: nothing stays, and the exit code says which signal it was."""

import contextlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conversion_fixtures import random_model, write_transformers

from speech_flax import Wav2Vec2BertConfig, Wav2Vec2BertModel
from speech_flax.conversion.command import main
from speech_flax.conversion.interruption import Interrupted, interruptible, uninterrupted
from speech_flax.conversion.transformers_names import transformers_layout
from speech_flax.pretrained import parameter_shapes

ROOT = Path(__file__).parents[1]
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """After an interruption the command leaves signals without effect, as its program is about to end."""
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def ctrl_c_is_not_ignored() -> Iterator[None]:
    """Programs inherit that a signal is ignored, as it is in the background of a shell script."""
    with handlers_restored():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield


@pytest.fixture(scope="module")
def large_model(tmp_path_factory) -> Path:
    """w2v-bert-2.0 with weights of zero: 2.3 GB to convert, in a sparse file of 100 kB."""
    directory = tmp_path_factory.mktemp("large")
    config = Wav2Vec2BertConfig(architectures=("Wav2Vec2BertModel",))
    config.save_pretrained(directory)
    header, position = {}, 0
    for name, (_, _, shape) in transformers_layout(parameter_shapes(Wav2Vec2BertModel(config))).items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + 4 * math.prod(shape)]}
        position += 4 * math.prod(shape)
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return directory


def start(arguments: list[str], temporary: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "convert_torch_weights.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


def assert_ended_by(process: subprocess.Popen, number: signal.Signals) -> None:
    error = process.communicate(timeout=60)[1]
    assert error == f"interrupted by {number.name}; nothing incomplete was left behind\n"
    assert process.returncode == SIGNALS[number]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("kind", ["torch", "orbax"])
def test_a_conversion_that_is_interrupted_leaves_an_empty_folder(large_model, tmp_path, kind, number):
    folder = tmp_path / "folder"
    folder.mkdir()
    process = start([str(large_model), str(folder / "new/ours"), "--to", kind], folder)
    written = "model.safetensors" if kind == "torch" else "params*/*"
    wait_until(lambda: any(folder.glob(f"new/.ours.*.incomplete/{written}")), process)
    process.send_signal(number)
    assert_ended_by(process, number)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_reference_that_is_interrupted_leaves_an_empty_folder(tmp_path, monkeypatch, capsys, number):
    """A pipe in the place of the file makes sure that it is being written when the signal comes."""
    write_transformers(random_model("hubert base"), tmp_path / "source", "safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    pipe = folder / ".reference.safetensors.incomplete"
    os.mkfifo(pipe)
    found = []

    def interrupt() -> None:
        with pipe.open("rb") as file:
            found.append(file.read(8))
            found.append([path for path in folder.iterdir() if path != pipe])
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with handlers_restored():
        arguments = [str(tmp_path / "source"), "--write-reference", str(folder / "reference.safetensors")]
        assert main(arguments) == SIGNALS[number]
        thread.join()
    beginning, kept_aside = found
    assert int.from_bytes(beginning, "little") > 0
    assert len(kept_aside) == 1
    assert capsys.readouterr().err == f"interrupted by {number.name}; nothing incomplete was left behind\n"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_impatient_signals_do_not_disturb_the_tidying_up(number):
    done = []
    with handlers_restored():
        with pytest.raises(Interrupted) as raised, interruptible(), uninterrupted() as check:
            try:
                signal.raise_signal(number)
                done.append("works on")
                check()
            finally:
                signal.raise_signal(signal.SIGINT)
                done.append("tidied")
        signal.raise_signal(signal.SIGTERM)
    assert done == ["works on", "tidied"]
    assert raised.value.exit_code == SIGNALS[number]


def test_a_conversion_that_is_not_interrupted_gives_the_signals_back():
    handlers = {one: signal.getsignal(one) for one in (*SIGNALS, signal.SIGHUP)}
    with interruptible(), uninterrupted() as check:
        check()
    with pytest.raises(OSError, match="full"), interruptible(), uninterrupted():
        raise OSError("the disk is full")
    assert {one: signal.getsignal(one) for one in handlers} == handlers

"""The bar that a conversion draws on a terminal, and that it draws on nothing else."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conversion_fixtures import random_model, write_transformers

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write_transformers(random_model("w2v-bert"), directory, "safetensors")
    return directory


def convert(source: Path, destination: Path, kind: str, stderr: int) -> subprocess.Popen:
    """The real command; every tensor moves the bar, however quick it was."""
    command = [sys.executable, str(ROOT / "convert_torch_weights.py"), str(source), str(destination), "--to", kind]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TQDM_MININTERVAL": "0"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)


def read_terminal(terminal: int) -> str:
    """All that is shown there until nobody has it open any more, which Linux reports as an error."""
    shown = b""
    while True:
        try:
            received = os.read(terminal, 65536)
        except OSError:
            received = b""
        if not received:
            return shown.decode()
        shown += received


@pytest.mark.parametrize("kind", ["torch", "orbax"])
def test_a_terminal_shows_how_much_is_converted_and_is_clean_in_the_end(source, tmp_path, kind):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = convert(source, tmp_path / "ours", kind, theirs)
    os.close(theirs)
    shown = read_terminal(ours)
    os.close(ours)
    assert process.communicate()[0].endswith(f"written: {tmp_path / 'ours'}\n")
    assert process.returncode == 0
    percentages = [int(number) for number in re.findall(r"\rconverting: +(\d+)%", shown)]
    assert percentages[0] == 0
    assert percentages == sorted(percentages)
    assert percentages[-1] > 75  # the bar skips a few of the smallest tensors, which may be the last
    assert len(set(percentages)) > 5
    totals = set(re.findall(r"k/([\d.]+)k \[", shown))
    file = (source / "model.safetensors").stat().st_size / 1000  # with a header, which is not counted
    assert len(totals) == 1
    assert 0.5 * file < float(totals.pop()) < file
    assert shown.split("\r")[-1] == ""
    assert shown.split("\r")[-2].strip() == ""


def test_a_file_or_a_pipe_shows_nothing_but_results(source, tmp_path):
    process = convert(source, tmp_path / "ours", "torch", subprocess.PIPE)
    output, error = process.communicate()
    assert error == ""
    assert "\r" not in output
    assert output.endswith(f"written: {tmp_path / 'ours'}\n")

"""Checkpoints are not trusted: nothing in them is run, and damage ends in one sentence with nothing written."""

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import sys
from pathlib import Path

import h5py
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from conversion_fixtures import fairseq_file, random_model, write_transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from speech_flax import cli
from speech_flax.conversion import convert as conversion
from speech_flax.conversion.command import main
from speech_flax.conversion.orbax_directory import read_orbax_directory, write_orbax_directory
from speech_flax.conversion.safetensors_file import read_safetensors, write_safetensors
from speech_flax.conversion.source import open_source
from speech_flax.conversion.stored_tensor import CheckpointFileError, StoredTensor
from speech_flax.conversion.torch_file import load_torch_file
from speech_flax.conversion.tree import flat


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class SubtleBomb(Bomb):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("kind", [Bomb, SubtleBomb])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, kind, legacy):
    content = {"model": {"weight": torch.zeros(2)}, "args": kind(tmp_path / "exploded")}
    torch.save(content, tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointFileError, match=r"is refused: it wants to run (posix.system|eval)"):
        open_source(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "hubert"}))
    (tmp_path / "checkpoint.pt").rename(tmp_path / "model/pytorch_model.bin")
    with pytest.raises(CheckpointFileError, match="is refused"):
        open_source(tmp_path / "model")
    assert not (tmp_path / "exploded").exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(CheckpointFileError):
        open_source(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for padding in range(256):
        path = tmp_path / f"{padding}.safetensors"
        save_file({"feature_projection.projection.weight": np.zeros(1)}, path, {"padding": padding * "-"})
        if path.read_bytes()[0] == 0x80:
            assert open_source(path).format == "Transformers weights"
            return
    raise AssertionError("no header of such a length was made")


def test_objects_of_fairseq_come_back_inert(tmp_path):
    fairseq_file(random_model("hubert base ctc"), tmp_path / "checkpoint.pt")
    dictionary = load_torch_file(tmp_path / "checkpoint.pt")["task_state"]["target_dictionary"]
    assert type(dictionary).__name__ == "Inert"
    assert dictionary.state["symbols"][:5] == ["<s>", "<pad>", "</s>", "<unk>", "|"]


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/file.safetensors", "..", "", "a\\b.bin"]
)
def test_shards_outside_of_the_directory_are_refused(tmp_path, name):
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"weight": np.zeros(2, np.float32)}, tmp_path / "outside.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    index = {"metadata": {}, "weight_map": {"weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointFileError, match="is not a weight file beside it"):
        open_source(directory)


def header(content: object, tail: bytes = b"") -> bytes:
    text = json.dumps(content).encode() if not isinstance(content, bytes) else content
    return struct.pack("<Q", len(text)) + text + tail


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": (b"", "is no safetensors file: it has 0 bytes"),
    "short": (b"abc", "it has 3 bytes"),
    "oversized header": (struct.pack("<Q", 2**62) + b"{}", "announces a header of 4611686018427387904 bytes"),
    "header beyond the end": (struct.pack("<Q", 50) + b"{}", "announces a header of 50 bytes"),
    "no JSON": (header(b"{nonsense"), "its header is not valid JSON"),
    "not UTF-8": (header(b"\xff\xfe{}"), "its header is not valid JSON"),
    "deep nesting": (header(b"[" * 100_000), "its header is not valid JSON"),
    "a list": (header([1]), "is no JSON object"),
    "entry is no object": (header({"x": 3}), "the shape of 'x' is None"),
    "negative shape": (header({"x": F32 | {"shape": [-2]}}, bytes(8)), "the shape of 'x' is"),
    "fractional shape": (header({"x": F32 | {"shape": [2.0]}}, bytes(8)), "the shape of 'x' is"),
    "unknown type": (header({"x": F32 | {"dtype": "F4"}}, bytes(8)), "has the type 'F4'"),
    "too few bytes": (header({"x": F32 | {"data_offsets": [0, 4]}}, bytes(4)), "has 4 bytes, which is not what"),
    "huge shape": (header({"x": F32 | {"shape": [2**40, 2**40]}}, bytes(8)), "which is not what"),
    "reversed range": (header({"x": F32 | {"data_offsets": [8, 0]}}, bytes(8)), "has -8 bytes"),
    "truncated": (header({"x": F32}, bytes(7)), "is truncated: its tensors need 8 bytes and it has 7"),
    "surplus": (header({"x": F32}, bytes(9)), "is damaged: its tensors need 8 bytes and it has 9"),
    "overlap": (header({"x": F32, "y": F32}, bytes(8)), "do not follow those of the tensor before"),
    "twice": (
        header(b'{"x": ' + json.dumps(F32).encode() + b', "x": ' + json.dumps(F32).encode() + b"}", bytes(8)),
        "JSON",
    ),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of Git LFS"),
    "text": (b"<html>404 not found, sorry about that, but there is nothing here at all</html>", "no safetensors file"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_safetensors_are_one_sentence(tmp_path, damage, capsys):
    content, message = DAMAGED[damage]
    (tmp_path / "model.safetensors").write_bytes(content)
    assert cli.main(["convert", str(tmp_path / "model.safetensors"), str(tmp_path / "ours")]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert "Traceback" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("suffix", ["bin", "pt", "safetensors", "h5"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_one_sentence(tmp_path, suffix, keep, capsys):
    path = tmp_path / f"model.{suffix}"
    if suffix == "h5":
        with h5py.File(path, "w") as file:
            file["hubert/tf_hubert_model/hubert/encoder/layer_norm/beta:0"] = np.zeros(4000, np.float32)
    elif suffix == "safetensors":
        save_file({"weight": np.zeros(4000, np.float32)}, path)
    else:
        torch.save({"weight": torch.zeros(4000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert cli.main(["convert", str(path), str(tmp_path / "ours")]) == 1
    printed = capsys.readouterr().err
    assert str(path) in printed
    assert printed.count("\n") == 1
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model_type": "bert"}', '{"model_type": "hubert", "hidden_size": "x"}']
)
def test_damaged_configurations_are_one_sentence(tmp_path, content, capsys):
    write_transformers(random_model("hubert base"), tmp_path / "model", "safetensors")
    (tmp_path / "model/config.json").write_text(content)
    assert cli.main(["convert", str(tmp_path / "model"), str(tmp_path / "ours")]) == 1
    printed = capsys.readouterr().err
    assert "config.json" in printed
    assert printed.count("\n") == 1


def test_data_that_an_hdf5_file_keeps_elsewhere_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(16))
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file.create_dataset("a/b/c:0", (4,), "float32", external=[(str(tmp_path / "secret"), 0, 16)])
    with pytest.raises(CheckpointFileError, match="is kept in another file"):
        open_source(tmp_path / "model.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a/b/c:0"] = h5py.ExternalLink(str(tmp_path / "model.h5"), "a/b/c:0")
    assert not open_source(tmp_path / "other.h5").tensors


ORBAX_LEAVES = {
    "masked_spec_embed": np.arange(300, dtype=np.float32),
    "encoder/layers/ffn1/output_dense/kernel": np.arange(3 * 20 * 30, dtype=np.float16).reshape(3, 20, 30),
}


@pytest.fixture(scope="module")
def orbax_checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("orbax")
    leaves = {path: StoredTensor(leaf.shape, leaf.dtype, lambda leaf=leaf: leaf) for path, leaf in ORBAX_LEAVES.items()}
    write_orbax_directory(directory, leaves)
    (directory / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    return directory


def read_all(directory: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in read_orbax_directory(directory).items()}


def test_layers_of_an_orbax_checkpoint_are_read_one_by_one(orbax_checkpoint):
    found = read_all(orbax_checkpoint)
    path, stacked = list(ORBAX_LEAVES.items())[1]
    np.testing.assert_array_equal(found.pop("masked_spec_embed"), ORBAX_LEAVES["masked_spec_embed"])
    assert list(found) == [f"{path}[{layer}]" for layer in range(3)]
    for layer, tensor in enumerate(found.values()):
        assert tensor.dtype == np.float16
        np.testing.assert_array_equal(tensor, stacked[layer])


def test_orbax_restores_what_is_written_for_it(orbax_checkpoint):
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = flat(checkpointer.restore(orbax_checkpoint / "params"))
    assert set(found) == set(ORBAX_LEAVES)
    for path, leaf in ORBAX_LEAVES.items():
        assert found[path].dtype == leaf.dtype
        np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize("pattern", ["params/manifest.ocdbt", "params/d/*", "params/*/d/*"])
@pytest.mark.parametrize("keep", [None, 0.0, 0.7])
def test_damaged_orbax_checkpoints_are_one_sentence(orbax_checkpoint, tmp_path, pattern, keep, capsys):
    damaged = shutil.copytree(orbax_checkpoint, tmp_path / "damaged")
    files = list(damaged.glob(pattern))
    assert files
    for file in files:
        content = file.read_bytes()
        file.unlink()
        if keep is not None:
            file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointFileError) as raised:
        read_all(damaged)
    assert str(damaged / "params") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert cli.main(["convert", str(damaged), str(tmp_path / "ours")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "ours").exists()


class Interrupted(BaseException):
    """Stands for whatever may end a program."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted, OSError])
@pytest.mark.parametrize("kind", ["torch", "orbax"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, error, kind):
    write_transformers(random_model("w2v-bert"), tmp_path / "source", "safetensors")
    reads = iter(range(1000))
    original = conversion._read

    def interrupted(*arguments):
        if next(reads) == 20:
            raise error("stop")
        return original(*arguments)

    monkeypatch.setattr(conversion, "_read", interrupted)
    with pytest.raises(error):
        main([str(tmp_path / "source"), str(tmp_path / "ours"), "--to", kind])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_there_already_is_not_overwritten(tmp_path):
    write_transformers(random_model("w2v-bert"), tmp_path / "source", "safetensors")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="exists already"):
        main([str(tmp_path / "source"), str(tmp_path / "ours")])
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["thesis.txt"]


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**63) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "BOOL", "X"]) | ANY_JSON,
        "shape": st.lists(st.integers(0, 3), max_size=3) | ANY_JSON,
        "data_offsets": st.lists(st.integers(0, 20), min_size=2, max_size=2) | ANY_JSON,
    }
)


@FUZZ
@given(content=st.dictionaries(st.text(max_size=5), ENTRY | ANY_JSON, max_size=3), tail=st.binary(max_size=24))
def test_any_header_is_read_or_refused(tmp_path, content, tail):
    (tmp_path / "x").write_bytes(header(content, tail))
    try:
        tensors = read_safetensors(tmp_path / "x")
    except CheckpointFileError:
        return
    for tensor in tensors.values():
        assert tensor.read().shape == tensor.shape


def _flipped(content: bytes, changes: list[tuple[float, int]]) -> bytes:
    damaged = bytearray(content)
    for position, byte in changes:
        damaged[int(position * len(damaged))] = byte
    return bytes(damaged)


CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory) -> dict[str, bytes]:
    """Small valid files of every kind."""
    directory = tmp_path_factory.mktemp("valid")
    state = {"encoder.layer_norm.weight": torch.arange(3.0), "masked_spec_embed": torch.ones(2)}
    torch.save(state, directory / "zip.bin")
    torch.save(state, directory / "legacy.bin", _use_new_zipfile_serialization=False)
    fairseq_file(random_model("hubert base ctc"), directory / "fairseq.pt")
    save_file({name: tensor.numpy() for name, tensor in state.items()}, directory / "x.safetensors")
    with h5py.File(directory / "x.h5", "w") as file:
        file["hubert/tf_hubert_model/hubert/masked_spec_embed:0"] = np.ones(3, np.float32)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin", "fairseq.pt", "x.safetensors", "x.h5"])
@settings(FUZZ, max_examples=60)
@given(changes=CHANGES, keep=st.floats(0.2, 1.0) | st.just(1.0))
def test_any_damage_is_read_or_refused(tmp_path, valid_files, name, changes, keep):
    content = _flipped(valid_files[name], changes)
    (tmp_path / name).write_bytes(content[: int(len(content) * keep)])
    try:
        source = open_source(tmp_path / name)
        conversion.plan(source)
        for tensor in source.tensors.values():
            tensor.read()
    except (CheckpointFileError, conversion.ConversionError):
        pass


@settings(FUZZ, max_examples=30)
@given(changes=CHANGES, choice=st.floats(0, 1, exclude_max=True), keep=st.floats(0.2, 1.0) | st.just(1.0))
def test_any_damage_of_an_orbax_checkpoint_is_read_or_refused(
    tmp_path_factory, orbax_checkpoint, changes, choice, keep
):
    damaged = shutil.copytree(orbax_checkpoint, tmp_path_factory.mktemp("damaged") / "x")
    files = sorted(path for path in damaged.rglob("*") if path.is_file())
    file = files[int(choice * len(files))]
    content = _flipped(file.read_bytes(), changes)
    file.write_bytes(content[: int(len(content) * keep)])
    with contextlib.suppress(CheckpointFileError, conversion.ConversionError):
        conversion.plan(open_source(damaged))
    with contextlib.suppress(CheckpointFileError):
        read_all(damaged)


@FUZZ
@given(
    content=ANY_JSON
    | st.fixed_dictionaries(
        {"weight_map": ANY_JSON | st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=3)}
    )
)
def test_any_index_is_read_or_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with contextlib.suppress(CheckpointFileError, FileNotFoundError):
        open_source(tmp_path)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    kind=st.sampled_from(["float32", "float16", "int64"]),
)
def test_what_is_written_is_read_back(tmp_path, shapes, kind):
    tensors = {f"t{i}": np.random.default_rng(i).integers(0, 99, shape).astype(kind) for i, shape in enumerate(shapes)}
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x", layout, tensors.values(), {"format": "pt"})
    found = read_safetensors(tmp_path / "x")
    assert list(found) == list(tensors) or {math_size(t) for t in tensors.values()} & {0}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].read(), tensor)


def math_size(tensor: np.ndarray) -> int:
    return tensor.size


def test_messages_do_not_show_what_was_read(tmp_path):
    """A pointer to a private file must not print it."""
    (tmp_path / "x").write_bytes(b"root:x:0:0:root:/root:/bin/bash and more of it, so that it is long enough\n")
    with pytest.raises(CheckpointFileError) as raised:
        open_source(tmp_path / "x")
    assert not re.search("bash", str(raised.value))

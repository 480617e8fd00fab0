"""Weights that Keras wrote as HDF5 (``tf_model.h5``), read one tensor at a time."""

from functools import partial
from pathlib import Path

import numpy as np

from speech_flax.conversion.stored_tensor import CheckpointFileError, StoredTensor


def read_hdf5(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors in the file at ``path``, by name without the layer group, the model's name and the output number.

    ``hubert/tf_hubert_for_ctc/hubert/encoder/layer_norm/beta:0`` is called ``hubert/encoder/layer_norm/beta``. Links to
    other places and files are not followed.

    Raises:
      CheckpointFileError: the file is damaged, is no HDF5 file, or keeps data elsewhere.
      ImportError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise ImportError(f"reading {path} needs h5py: pip install h5py") from None
    tensors: dict[str, StoredTensor] = {}

    def visit(full_name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            if item.is_virtual or item.external:
                raise CheckpointFileError(f"{path}: the data of {full_name!r} is kept in another file")
            name = full_name.split(":")[0].split("/", 2)[-1]
            if name in tensors:
                raise CheckpointFileError(f"{path} holds two tensors for {name!r}")
            tensors[name] = StoredTensor(item.shape, item.dtype, partial(_read_dataset, path, full_name))

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except CheckpointFileError:
        raise
    except Exception as error:  # h5py raises whatever fits the place where the damage was noticed
        raise CheckpointFileError(f"{path} is damaged or no HDF5 file: {_first_line(error)}") from None
    return tensors


def _read_dataset(path: str | Path, name: str) -> np.ndarray:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return file[name][()]
    except Exception as error:
        raise CheckpointFileError(f"{path} is damaged: {name!r} cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

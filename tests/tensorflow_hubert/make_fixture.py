"""Write ``tf_model.h5``, ``config.json`` and ``outputs.npz`` beside this file, with TensorFlow.

    python tests/tensorflow_hubert/make_fixture.py      # transformers==4.37.2, tensorflow-cpu==2.15.1, numpy<2

A tiny TFHubertForCTC in which no parameter is trivial, saved by TensorFlow itself; and its logits, hidden states and
loss for two utterances.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf
import transformers

HERE = Path(__file__).parent

CONFIG = {
    "vocab_size": 7,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "conv_dim": (8, 8, 8),  # TensorFlow takes the width of a layer for that of its input too
    "conv_kernel": (6, 3, 2),
    "conv_stride": (4, 2, 1),
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
    "layer_norm_eps": 1e-5,
}


def main() -> None:
    if transformers.__version__ != "4.37.2":
        raise SystemExit(f"the fixture is that of Transformers 4.37.2, not of {transformers.__version__}")
    random = np.random.RandomState(0)
    model = transformers.TFHubertForCTC(transformers.HubertConfig(**CONFIG))
    waveforms = random.standard_normal((2, 160)).astype(np.float32)
    mask = (np.arange(160) < np.array([[160], [99]])).astype(np.int32)
    labels = np.array([[3, 1, 4], [5, 2, -100]], np.int32)
    model(tf.constant(waveforms))  # makes the parameters
    for weight in model.weights:
        weight.assign_add(0.2 * tf.constant(random.standard_normal(weight.shape).astype(np.float32)))
    output = model(tf.constant(waveforms), attention_mask=tf.constant(mask), output_hidden_states=True)
    model.save_pretrained(HERE)
    np.savez_compressed(
        HERE / "outputs.npz",
        waveforms=waveforms,
        mask=mask,
        labels=labels,
        logits=output.logits.numpy(),
        hidden_states=np.stack([state.numpy() for state in output.hidden_states]),
        loss=model(tf.constant(waveforms), attention_mask=tf.constant(mask), labels=tf.constant(labels)).loss.numpy(),
    )
    for file in sorted(HERE.iterdir()):
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

"""Names of the classification heads that s3prl trains for SUPERB (keyword, intent, speaker, emotion)."""

from speech_flax.conversion.rules import NameTable, Rule, linear

S3PRL = NameTable(
    rules=(
        Rule("Featurizer.weights", "layer_weights"),
        *linear("Downstream.projector", "projector"),
        *linear("Downstream.model.post_net.linear", "classifier"),
    )
)

"""The reference side: Transformers 4.37.2 or 5."""

import numpy as np
import torch
import transformers

from .variant import Variant, inputs, probe, random_weight


def build(variant: Variant) -> torch.nn.Module:
    """The model, with every parameter and statistic drawn by name."""
    config_class = getattr(transformers, f"{variant.family}Config")
    config = config_class(**variant.fields, attn_implementation="eager")
    model = getattr(transformers, variant.model)(config).eval()
    weights = {
        name: torch.tensor(random_weight(name, tuple(value.shape))) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(weights)
    return model


def run(variant: Variant, batch: str, model: torch.nn.Module | None = None) -> dict[str, np.ndarray]:
    """Outputs by name (``hidden_states.0``, ...), ``loss``, and ``gradients.<parameter>``."""
    model = build(variant) if model is None else model
    model.zero_grad()
    arguments = {name: torch.tensor(value) for name, value in inputs(variant, batch).items()}
    if "labels" in arguments and not arguments["labels"].is_floating_point():
        arguments["labels"] = arguments["labels"].long()
    output = model(**arguments, output_hidden_states=True, output_attentions=True)
    loss = output.loss if variant.labels else (output[0] * torch.tensor(probe(tuple(output[0].shape)))).sum()
    loss.backward()
    results = {"loss": loss}
    for name, value in output.items():
        if isinstance(value, tuple):
            results.update({f"{name}.{index}": one for index, one in enumerate(value)})
        else:
            results[name] = value
    gradients = {f"gradients.{name}": parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.detach().numpy() for name, value in (results | gradients).items() if value is not None}

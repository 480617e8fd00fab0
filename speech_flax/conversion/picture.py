"""The error by depth, drawn."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from speech_flax.conversion.evidence import Evidence, Row

_LEAST = 1e-9  # errors of zero are drawn here


def draw_evidence(evidence: "Evidence", path: Path) -> None:
    """Draw the errors of the hidden states, and of the gradients if there are any, over the depth of the network."""
    from matplotlib.figure import Figure

    panels = 2 if evidence.gradients else 1
    figure = Figure(figsize=(5.6 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    states = [row for row in evidence.rows if row.name.startswith("hidden_states.")]
    depth = [int(row.name.split(".")[1]) for row in states]
    for measure, label in (("relative", "largest error / RMS of the layer"), ("l2", "norm of error / norm of layer")):
        values = [max(getattr(row, measure), _LEAST) for row in states]
        axes[0].semilogy(depth, values, marker="o", markersize=3.5, linewidth=1.2, label=label)
    limited = "largest" if evidence.tolerance.measure == "relative" else "norm"
    _finish(axes[0], evidence.tolerance.activations, f"limit ({limited})")
    axes[0].set(title="Hidden states", xlabel="encoder layer (0: input of the first)", ylabel="relative error")
    if evidence.gradients:
        _draw_gradients(axes[1], evidence.gradients, max(depth, default=0))
        _finish(axes[1], evidence.tolerance.gradients, "limit")
        axes[1].set(
            title="Gradients of all parameters",
            xlabel="encoder layer (-1: below; heads at the last)",
            ylabel="norm of error / norm",
        )
    figure.suptitle(f"{evidence.architecture}, {evidence.dtype}, against PyTorch {evidence.reference.get('torch', '')}")
    figure.savefig(path, dpi=110)


def _finish(axes: "Axes", limit: float, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(limit, color="tab:red", linestyle="--", linewidth=1, label=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_gradients(axes: "Axes", rows: "Sequence[Row]", depth: int) -> None:
    """One point per parameter; what lies below the encoder stands at -1, heads and adapters after the last layer."""
    positions = []
    for row in rows:
        layer = re.search(r"encoder\.layers\.(\d+)\.", row.name)
        below = re.search(r"feature_|masked_spec|pos_conv", row.name)
        positions.append(int(layer[1]) if layer else -1 if below else depth)
    axes.semilogy(positions, [max(row.l2, _LEAST) for row in rows], ".", markersize=4, alpha=0.5, label="parameter")

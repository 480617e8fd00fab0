"""The picture of a run: loss, learning rate and metrics by step."""

import io
import json

from speech_flax.storage import AnyPath
from speech_flax.training.evaluation import RATIOS


def draw_curves(metrics: AnyPath, picture: AnyPath) -> None:
    """Draw ``metrics.jsonl`` as a PNG with two panels: losses and learning rate; validation metrics that are ratios."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, errors = figure.subplots(1, 2)
    losses.plot(*series("train/loss"), label="training loss", color="tab:blue")
    losses.plot(*series("validation/loss"), label="validation loss", color="tab:orange", marker="o", markersize=3)
    losses.set(xlabel="step", ylabel="loss", yscale="log")
    rate = losses.twinx()
    rate.plot(*series("train/learning_rate"), label="learning rate", color="tab:gray", linestyle=":")
    rate.set(ylabel="learning rate", ylim=(0, None))
    lines = [*losses.get_lines(), *rate.get_lines()]
    losses.legend(lines, [line.get_label() for line in lines], loc="upper right")
    for name, title in RATIOS.items():
        steps, values = series(f"validation/{name}")
        if steps:
            errors.plot(steps, [100 * value for value in values], label=title, marker="o", markersize=3)
    errors.set(xlabel="step", ylabel="validation [%]", ylim=(0, 105))
    errors.grid(alpha=0.3)
    if errors.get_lines():
        errors.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    picture.write_bytes(drawn.getvalue())

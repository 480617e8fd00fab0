"""AdamW with the learning-rate schedules of speech fine-tuning."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from speech_flax.training.experiment import ExperimentError, OptimizerSettings

#: The last name on the path of a parameter that weight decay applies to: matrices and embedding tables.
_DECAYED = ("kernel", "embedding", "weight", "weight_g", "weight_v")
#: What the base model is called among the parameters of a model with a head; the head is all the rest.
_BASE_MODELS = ("wav2vec2_bert", "hubert")


def learning_rate_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Learning rate by step (0-based) of a run of ``steps`` steps.

    The tri-stage schedule is that of SpecAugment (Park et al. 2019, section 4.1): linear warm-up, constant, then
    exponential decay to ``final_scale`` of the peak.
    """
    warmup = max(1, round(settings.warmup * steps))
    peak, final = settings.learning_rate, settings.learning_rate * settings.final_scale
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1)
    decay_steps = max(1, steps - warmup)
    if settings.schedule == "linear":
        return optax.join_schedules([rise, optax.linear_schedule(peak, final, decay_steps)], [warmup])
    if settings.schedule == "cosine":
        return optax.join_schedules(
            [rise, optax.cosine_decay_schedule(peak, decay_steps, settings.final_scale)], [warmup]
        )
    hold = round(settings.hold * steps)
    decay_steps = max(1, steps - warmup - hold)
    decay = optax.exponential_decay(peak, decay_steps, max(settings.final_scale, 1e-8), end_value=final)
    return optax.join_schedules([rise, optax.constant_schedule(peak), decay], [warmup, warmup + hold])


def decay_mask(params: PyTree) -> PyTree:
    """``True`` for every parameter that weight decay applies to: no norm, no bias, no mask embedding."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _DECAYED, params)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Clipping by global norm, then AdamW (Loshchilov and Hutter 2019) with masked decay and a schedule, for the base
    model and the head apart.

    Args:
        settings: Rates and their schedule.
        steps: Steps of the run.
        frozen: Regular expressions; parameters in whose path one is found keep their values, and have no moments.
    """

    settings: OptimizerSettings
    steps: int
    frozen: tuple[str, ...] = ()

    def learning_rate(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The schedule's rate after ``step`` steps that were not skipped."""
        return jnp.asarray(learning_rate_schedule(self.settings, self.steps)(step), jnp.float32)

    def init(self, params: PyTree) -> PyTree:
        """The state before the first step."""
        return self._transformation(head_only=False).init(params)

    def update(
        self, gradients: PyTree, state: PyTree, params: PyTree, *, head_only: bool = False
    ) -> tuple[PyTree, PyTree]:
        """What to add to ``params``, and the next state. With ``head_only`` the base model and its moments stay."""
        return self._transformation(head_only).update(gradients, state, params)

    def held(self, params: PyTree, *, head_only: bool = False) -> PyTree:
        """``True`` for every parameter that a step does not change.

        Raises:
            ExperimentError: when a pattern of ``frozen`` matches nothing, or all is held.
        """
        kept = ("frozen", "base") if head_only else ("frozen",)
        return jax.tree.map(lambda group: group in kept, self._groups(params))

    def trained(self, params: PyTree) -> list[str]:
        """Paths of the parameters that a step changes, as in ``hubert/encoder/layer_norm/scale``.

        Raises:
            ExperimentError: see :meth:`held`.
        """
        paths, _ = jax.tree_util.tree_flatten_with_path(self.held(params))
        return [_name(path) for path, held in paths if not held]

    def _groups(self, params: PyTree) -> PyTree:
        """``"frozen"``, ``"base"`` or ``"head"`` for every parameter."""
        unused = set(self.frozen)

        def group(path: tuple, _: Any) -> str:
            name = _name(path)
            matches = {pattern for pattern in self.frozen if re.search(pattern, name)}
            unused.difference_update(matches)
            return "frozen" if matches else "base" if path[0].key in _BASE_MODELS else "head"

        groups = jax.tree_util.tree_map_with_path(group, params)
        if unused:
            raise ExperimentError(
                f"model.frozen: no parameter's path matches {min(unused)!r}; paths look like {_example(params)}"
            )
        kinds = set(jax.tree.leaves(groups))
        if kinds == {"frozen"} or (self.settings.head_only_steps and "head" not in kinds):
            raise ExperimentError("model.frozen leaves nothing to train; freeze less")
        return groups

    def _is_head(self, params: PyTree) -> PyTree:
        return jax.tree.map(lambda group: group == "head", self._groups(params))

    def _transformation(self, head_only: bool) -> optax.GradientTransformation:
        settings = self.settings
        adamw = optax.chain(
            optax.scale_by_adam(settings.betas[0], settings.betas[1], settings.epsilon),
            optax.add_decayed_weights(settings.weight_decay, mask=decay_mask),
        )
        groups = {"frozen": optax.set_to_zero(), "base": _held(adamw) if head_only else adamw, "head": adamw}
        rate, norm = settings.head_learning_rate, settings.max_gradient_norm
        relative = 1.0 if rate is None else rate / settings.learning_rate
        return optax.chain(
            optax.clip_by_global_norm(norm) if norm else optax.identity(),
            optax.partition(groups, self._groups),
            optax.scale_by_learning_rate(self.learning_rate),
            optax.masked(
                optax.scale(relative), lambda tree: jax.tree.map(lambda kind: kind == "head", self._groups(tree))
            ),
        )


def _held(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same state, neither used nor changed."""
    return optax.GradientTransformation(
        transformation.init, lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), state)
    )


def _example(params: PyTree) -> str:
    path, _ = jax.tree_util.tree_flatten_with_path(params)[0][0]
    return _name(path)


def _name(path: tuple) -> str:
    return "/".join(entry.key for entry in path)

"""AdamW with the learning-rate schedules of speech fine-tuning."""

import jax
import optax

from speech_flax.training.experiment import OptimizerSettings

#: The last name on the path of a parameter that weight decay applies to: matrices and embedding tables.
_DECAYED = ("kernel", "embedding")


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


def decay_mask(params: dict) -> dict:
    """``True`` for every parameter that weight decay applies to: no norm, no bias, no mask embedding."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _DECAYED, params)


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov and Hutter 2019) with masked decay and a schedule."""
    return optax.chain(
        optax.clip_by_global_norm(settings.max_gradient_norm),
        optax.adamw(
            learning_rate_schedule(settings, steps),
            b1=settings.betas[0],
            b2=settings.betas[1],
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            mask=decay_mask,
        ),
    )

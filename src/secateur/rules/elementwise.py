"""Operations that act on every position by itself: the channels stay where they are."""

from __future__ import annotations

from secateur.labels import Factors, on_axis
from secateur.propagation import Call, Rule


def same(call: Call) -> Factors:
    """One tensor in, the same positions out."""
    return call.factors(call.tensors()[0])


def merge(call: Call) -> Factors:
    """Several tensors, broadcast against each other: channels that meet are tied."""
    return call.merge([(call.factors(x), call.shape(x)) for x in call.tensors()])


def carries_nothing(call: Call) -> Factors:
    """A new tensor of constants, whatever the argument was."""
    return []


def prelu(call: Call) -> Factors:
    """``weight``: one slope per channel, or one for all."""
    x, weight = call.args["self"], call.args["weight"]
    rank = len(call.shape(x))
    call.set_role(weight, 0, "scales")
    slopes = [on_axis(f, 1, rank) for f in call.factors(weight)]
    return call.merge([(call.factors(x), call.shape(x)), (slopes, on_axis_shape(call.shape(weight), rank))])


def on_axis_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape of a per-channel vector as it broadcasts against ``[B, C, ...]``."""
    return (1, shape[0]) + (1,) * (rank - 2)


_SAME = """
    relu relu6 gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu softplus mish celu selu rrelu
    threshold softsign tanhshrink hardshrink softshrink log_sigmoid square abs neg exp exp2 expm1 log log2 log10 log1p
    sqrt rsqrt reciprocal erf erfc sin cos tan asin acos atan sinh cosh floor ceil round trunc frac sign sgn isnan isinf
    isfinite logical_not bitwise_not positive nan_to_num logit special_expit deg2rad
    dropout feature_dropout alpha_dropout feature_alpha_dropout bernoulli
    to _to_copy type_as contiguous clone detach alias lift_fresh_copy zeros_like ones_like full_like rand_like
    randn_like empty_like float_power
"""
_MERGE = """
    add sub mul div true_divide floor_divide maximum minimum fmax fmin pow where addcmul addcdiv lerp rsub eq ne lt gt
    le ge __and__ __or__ __xor__ bitwise_and bitwise_or bitwise_xor logical_and logical_or logical_xor masked_fill atan2
    fmod remainder copy clamp clamp_min clamp_max hypot xlogy
"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), same),
    **dict.fromkeys(_MERGE.split(), merge),
    **dict.fromkeys("new_zeros new_ones new_empty new_full new_tensor".split(), carries_nothing),
    "prelu": prelu,
}

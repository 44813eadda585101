"""Normalisation and reductions.

A normalisation over channels takes its statistics over the channels that are kept: that is what the smaller network
does, and ``masked`` computes it so by definition. Any other mean, maximum or softmax over channels is locked.
"""

from __future__ import annotations

from collections.abc import Sequence

from secateur.labels import Factors, Shape, on_axis, varying
from secateur.propagation import Call, Result, Rule
from secateur.rules.elementwise import on_axis_shape


def _vector(call: Call, x: object, rank: int) -> tuple[Factors, Shape]:
    """A per-channel vector as it broadcasts against ``[B, C, ...]``."""
    return [on_axis(f, 1, rank) for f in call.factors(x)], on_axis_shape(call.shape(x), rank)


def batch_norm(call: Call) -> Result:
    """Per channel (axis 1); if other axes carry channels and batch statistics are taken (weight standardisation), the
    statistics run over the kept ones."""
    x = call.args["input"]
    rank = len(call.shape(x))
    vectors = [k for k in ("weight", "bias", "running_mean", "running_var") if call.args.get(k) is not None]
    for key in vectors:
        call.set_role(call.args[key], 0, "scales" if key == "weight" else "follows")
    beside = [f for f in call.factors(x) if any(d != 1 for d in varying(f))]
    if beside and (call.args.get("training") or call.args.get("use_input_stats")):
        if call.in_norm():
            call.mark_norm()
        else:
            call.lock(beside, "statistics are taken over it")
    return call.merge([(call.factors(x), call.shape(x)), *(_vector(call, call.args[k], rank) for k in vectors)])


def layer_norm(call: Call) -> Factors:
    """Statistics over the last axes."""
    x = call.args["input"]
    call.mark_norm()
    items = [(call.factors(x), call.shape(x))]
    for key in ("weight", "bias"):
        vector = call.args.get(key)
        if vector is not None:
            call.set_role(vector, 0, "scales" if key == "weight" else "follows")
            items.append((call.factors(vector), call.shape(vector)))
    return call.merge(items)


def group_norm(call: Call) -> Factors:
    """Statistics over each partition of the channels: the same position of every partition is tied, so that the
    partitions stay equal and in place. One channel per partition is an instance norm, one partition a layer norm."""
    x, partitions = call.args["input"], call.args["num_groups"]
    rank, channels = len(call.shape(x)), call.shape(x)[1]
    labels, rest = call.axis(x, 1)
    call.lock(rest, "statistics are taken over it")
    if labels is not None and 1 < partitions < channels:
        rows = labels.view(partitions, -1)
        call.labels.join(rows, rows[:1])
    call.mark_norm()
    items = [([on_axis(labels, 1, rank)] if labels is not None else [], call.shape(x))]
    for key in ("weight", "bias"):
        vector = call.args.get(key)
        if vector is not None:
            call.set_role(vector, 0, "scales" if key == "weight" else "follows")
            items.append(_vector(call, vector, rank))
    return call.merge(items)


def weight_norm(call: Call) -> Factors:
    """``g * v / ||v||``, the norm over all axes of ``v`` but ``dim``."""
    v, g = call.args["v"], call.args["g"]
    call.mark_norm()
    return call.merge([(call.factors(v), call.shape(v)), (call.factors(g), call.shape(g))])


def softmax(call: Call) -> Factors:
    return _reduced(call, [call.args["dim"] % len(call.out_shape)], True, "a softmax")


def ordered(call: Call) -> Result:
    """sort, topk, argmax, cumsum: the order or number of channels matters."""
    x = call.tensors()[0]
    axis = call.args.get("dim")
    axis = axis if axis is not None else (0 if len(call.shape(x)) == 1 else None)
    axes = list(range(len(call.shape(x)))) if axis is None else [axis % len(call.shape(x))]
    keep = bool(call.args.get("keepdim", call.name in ("sort", "argsort", "topk", "cumsum", "cumprod")))
    found = _reduced(call, axes, keep, call.name)
    return tuple(found for _ in call.out_shapes) if call.several else found


def reduced(call: Call) -> Result:
    """mean, sum, max, var, norm ... over some axes."""
    if "other" in call.args:
        return call.merge([(call.factors(x), call.shape(x)) for x in call.tensors()])
    x = call.args.get("self", call.tensors()[0])
    rank = len(call.shape(x))
    dim = call.args.get("dim")
    axes = (
        list(range(rank))
        if dim in (None, [])
        else [d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
    )
    found = _reduced(call, axes, bool(call.args.get("keepdim", False)), f"a {call.name.replace('linalg_vector_', '')}")
    return tuple(found for _ in call.out_shapes) if call.several else found


def _sums(call: Call) -> bool:
    """Whether a zero adds nothing to the result, so that reading zeros is the same as reading fewer channels."""
    order = call.args.get("ord", call.args.get("p", 2))
    return call.name == "sum" or (call.name in ("linalg_vector_norm", "norm") and order in (None, 1, 2, 3, 4))


_SAME_SIZE = ("softmax", "log_softmax", "_softmax", "_log_softmax", "sort", "argsort", "cumsum", "cumprod")
"""They lock the axis but keep its length."""


def _reduced(call: Call, axes: Sequence[int], keepdim: bool, what: str) -> Factors:
    found: Factors = []
    for factor in call.factors(call.tensors()[0]):
        on = [d for d in varying(factor) if d in axes]
        if on and len(on) < len(varying(factor)):
            for d in on:
                factor = call.labels.join_along(factor, d)
        elif on:
            if _sums(call):
                call.mark_reader()
            elif call.in_norm() and call.name in ("mean", "var", "std", "var_mean", "std_mean"):
                call.mark_norm()
            else:
                call.labels.lock(factor, f"{what} is taken over it")
            if call.name not in _SAME_SIZE:
                continue
        found.append(factor)
    if not keepdim:
        for d in sorted(axes, reverse=True):
            found = [f.squeeze(d) for f in found]
    return found


RULES: dict[str, Rule] = {
    **dict.fromkeys("batch_norm instance_norm".split(), batch_norm),
    **dict.fromkeys("layer_norm rms_norm".split(), layer_norm),
    **dict.fromkeys("softmax log_softmax _softmax _log_softmax".split(), softmax),
    **dict.fromkeys("cumsum cumprod argmax argmin sort argsort topk".split(), ordered),
    **dict.fromkeys(
        "mean sum amax amin var std max min linalg_vector_norm norm prod all any var_mean std_mean logsumexp".split(),
        reduced,
    ),
    "group_norm": group_norm,
    "_weight_norm": weight_norm,
}

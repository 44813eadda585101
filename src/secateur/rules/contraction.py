"""Operations that sum over channels, so that zeroing a removed channel where it is read is the same as removing it."""

from __future__ import annotations

import torch

from secateur.labels import Factors, Shape, on_axis
from secateur.propagation import Call, Rule

_UNREAD = "the layer reads an input that carries no channels (a network input, or a fixed tensor)"


def _joined_across(call: Call, labels: torch.Tensor | None, partitions: int) -> None:
    """Tie the same position of every partition of a grouped convolution."""
    if labels is not None:
        rows = labels.view(partitions, -1)
        call.labels.join(rows, rows[:1])


def _with_bias(call: Call, labels: torch.Tensor | None) -> Factors:
    """The output ``[B, O, ...]`` of a convolution (``[O, ...]`` without a batch), its bias tied to it."""
    bias = call.args["bias"]
    if bias is not None:
        call.set_role(bias, 0, "follows")
        call.tie(labels, call.axis(bias, 0)[0], "only one of the output and its bias carries channels")
    return [] if labels is None else [on_axis(labels, _channels_axis(call), len(call.out_shape))]


def _channels_axis(call: Call) -> int:
    """Of what a convolution reads and puts out: 1, or 0 without a batch."""
    return len(call.shape(call.args["input"])) - len(call.shape(call.args["weight"])) + 1


def convolution(call: Call) -> Factors:
    """``weight [O, I / groups, ...]``: writes axis 0, reads axis 1; grouped: same position of every partition tied;
    depthwise (any multiplier): output tied to input."""
    if call.args.get("transposed"):
        return transposed_convolution(call)
    x, weight, groups = call.args["input"], call.args["weight"], call.args["groups"]
    axis = _channels_axis(call)
    channels, filters = call.shape(x)[axis], call.shape(weight)[0]
    into, rest = call.axis(x, axis)
    call.lock(rest, "a convolution slides over its axis")
    written, rest = call.axis(weight, 0)
    call.set_role(weight, 0, "writes")
    read = next((f for f in rest if f.shape[1] > 1), None)
    for kernel in [f for f in rest if f.shape[1] == 1]:
        call.labels.lock_kernel(kernel)
    read = None if read is None else call.single(read, (1,)).reshape(-1)
    if groups == channels > 1:
        if into is None or written is None:
            call.tie(into, written, _UNREAD)
        else:
            call.labels.join(written.view(groups, -1), into.view(groups, 1))
        return _with_bias(call, written)
    call.set_role(weight, 1, "reads")
    call.mark_reader()
    if groups > 1:
        _joined_across(call, into, groups)
        _joined_across(call, written, groups)
    if read is not None and into is not None:
        call.labels.join(read.view(1, -1), into.view(groups, -1))
    elif filters:
        call.tie(read, into, _UNREAD)
    return _with_bias(call, written)


def transposed_convolution(call: Call) -> Factors:
    """``weight [I, O / groups, ...]``: reads axis 0, writes axis 1."""
    x, weight, groups = call.args["input"], call.args["weight"], call.args["groups"]
    axis = _channels_axis(call)
    channels, outputs = call.shape(x)[axis], call.shape(weight)[1] * groups
    into, rest = call.axis(x, axis)
    call.lock(rest, "a convolution slides over its axis")
    read, rest = call.axis(weight, 0)
    written = next((f for f in rest if f.shape[1] > 1), None)
    written = None if written is None else call.single(written, (1,)).reshape(-1)
    for kernel in [f for f in rest if f.shape[1] == 1]:
        call.labels.lock_kernel(kernel)
    if groups == channels > 1:
        call.set_role(weight, 0, "writes")
        call.tie(into, read, _UNREAD)
        if written is not None:
            call.labels.lock(written, "it is the multiplier of a depthwise transposed convolution")
        return _with_bias(call, None if into is None else into.repeat_interleave(outputs // groups))
    call.set_role(weight, 0, "reads")
    call.set_role(weight, 1, "writes")
    call.mark_reader()
    if groups > 1:
        _joined_across(call, into, groups)
        _joined_across(call, read, groups)
    call.tie(read, into, _UNREAD)
    return _with_bias(call, None if written is None else written.repeat(groups))


def linear(call: Call) -> Factors:
    """``x [..., I] @ weight [O, I].T + bias [O]``; axes in front of the last may carry channels of their own."""
    x, weight, bias = call.args["input"], call.args["weight"], call.args["bias"]
    front = [f"b{i}" for i in range(len(call.shape(x)) - 1)]
    call.set_role(weight, 0, "writes")
    call.set_role(weight, 1, "reads")
    items = [(call.factors(x), call.shape(x)), (call.factors(weight), call.shape(weight))]
    out = call.contract(items, [[*front, "i"], ["o", "i"]], [*front, "o"])
    if bias is None:
        return out
    call.set_role(bias, 0, "follows")
    return call.merge([(out, call.out_shape), (call.factors(bias), call.shape(bias))])


def _matmul(call: Call, a: tuple[Factors, Shape], b: tuple[Factors, Shape]) -> Factors:
    left, right = len(a[1]), len(b[1])
    batch = [f"b{i}" for i in range(max(left, right) - 2)]
    rows = [*batch[len(batch) - (left - 2) :], "n", "k"] if left > 1 else ["k"]
    columns = [*batch[len(batch) - (right - 2) :], "k", "m"] if right > 1 else ["k"]
    out = [x for x in [*batch, "n", "m"] if x in batch or x in rows or x in columns]
    return call.contract([a, b], [rows, columns], out)


def matmul(call: Call) -> Factors:
    """``[..., n, k] @ [..., k, m]``, leading axes broadcasting; vectors too."""
    a, b = call.tensors()[:2]
    _note_matrix_roles(call, a, b)
    return _matmul(call, (call.factors(a), call.shape(a)), (call.factors(b), call.shape(b)))


def _note_matrix_roles(call: Call, a: object, b: object) -> None:
    if len(call.shape(b)) == 2:
        call.set_role(b, 0, "reads")
        call.set_role(b, 1, "writes")
    if len(call.shape(a)) == 2:
        call.set_role(a, 0, "writes")
        call.set_role(a, 1, "reads")


def matmul_added(call: Call) -> Factors:
    """addmm, baddbmm: a matmul plus a tensor that broadcasts against it."""
    base, a, b = call.tensors()[:3]
    product = _matmul(call, (call.factors(a), call.shape(a)), (call.factors(b), call.shape(b)))
    return call.merge([(product, call.out_shape), (call.factors(base), call.shape(base))])


def einsum(call: Call) -> Factors:
    equation = str(call.args["equation"]).replace(" ", "")
    tensors = call.args["tensors"]
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = sorted({x for term in terms for x in term})
        out = "".join(x for x in letters if inputs.count(x) == 1)
    if "." in equation or any(len(set(term)) < len(term) for term in terms):
        raise NotImplementedError(f"the einsum {equation!r} has an ellipsis or a repeated letter")
    for tensor, term in zip(tensors, terms, strict=True):
        for axis, letter in enumerate(term):
            call.set_role(tensor, axis, "writes" if letter in out else "reads")
    return call.contract([(call.factors(t), call.shape(t)) for t in tensors], [list(t) for t in terms], list(out))


def attention(call: Call) -> Factors:
    """``softmax(q k^T / sqrt(d)) v``: d ties q to k, the tokens are locked by the softmax, v's channels go through."""
    q, k, v, mask = (call.args[name] for name in ("query", "key", "value", "attn_mask"))
    batch = [f"b{i}" for i in range(len(call.shape(q)) - 2)]
    q_item, k_item, v_item = ((call.factors(x), call.shape(x)) for x in (q, k, v))
    weights = call.contract([q_item, k_item], [[*batch, "n", "d"], [*batch, "m", "d"]], [*batch, "n", "m"])
    shape = (*call.shape(q)[:-1], call.shape(k)[-2])
    if mask is not None:
        weights = call.merge([(weights, shape), (call.factors(mask), call.shape(mask))])
    call.lock([f for f in weights if f.shape[-1] > 1], "a softmax is taken over it")
    return call.contract([(weights, shape), v_item], [[*batch, "n", "m"], [*batch, "m", "e"]], [*batch, "n", "e"])


RULES: dict[str, Rule] = {
    **dict.fromkeys("conv1d conv2d conv3d convolution".split(), convolution),
    **dict.fromkeys("conv_transpose1d conv_transpose2d conv_transpose3d".split(), transposed_convolution),
    **dict.fromkeys("matmul bmm mm mv dot vdot".split(), matmul),
    **dict.fromkeys("addmm baddbmm".split(), matmul_added),
    "linear": linear,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
}

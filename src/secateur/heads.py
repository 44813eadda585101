"""Pooled heads: global average pooling and one linear layer in place of all that follows the last feature map.

The fully connected layers of VGG-16 hold nine tenths of its parameters; ThiNet-GAP puts the average over the map in
front of the last pooling, and one linear layer, in their place (Luo et al., ThiNet, ICCV 2017). It is no matter of
widths, so no plan makes it: the new network is the dense one, to be planned, pruned, saved and loaded like any other.

The head is found on the captured graph, by what its calls do, and replaced by modules, where they were called. What the
new network puts out is compared with the same computed from the last feature map itself; nothing else is handed out.

Shapes: ``B`` examples, ``C`` channels of the last map, ``K`` classes.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from secateur.capture import all_tensors, in_mode
from secateur.errors import BadRequest, CannotPrune, SecateurWarning
from secateur.graph import Graph, Inputs, trace, with_free_batch
from secateur.groups import Coupling, couple
from secateur.interpreter import walk
from secateur.last_map import (
    AFFINE,
    PASSED,
    RESHAPES,
    Head,
    collapses,
    find_head,
    moving_nodes,
    not_understood,
    source_of,
)
from secateur.nests import flatten, unflatten
from secateur.nodes import module_stack, op_name, shape_of, source_line
from secateur.processes import sum_over_processes_
from secateur.proofs import perturbed, relative_difference, telling_inputs
from secateur.recover.equations import least_change
from secateur.statistics import accumulator, batches, check_repeatable, no_batches, place_of
from secateur.surgery import record

RIDGE = 1e-2
"""Of the mean variance of the features, added to each of them in ``fit_``, as where readers are fitted."""


def pool_head(
    model: nn.Module | Graph,
    example_inputs: Inputs | None = None,
    *,
    classes: int | None = None,
    data: Iterable[Any] | None = None,
    seed: int = 0,
    check: bool = True,
) -> nn.Module:
    """A copy of ``model`` whose head is the average over its last feature map and one linear layer; ``model`` is
    untouched, and nothing of it is shared.

    The last feature map is that of the last convolution, behind its norm and activation function, in front of all
    pooling: 14x14 in VGG-16. Convolutions that see the whole map at once, or stand behind the average, belong to the
    head; where nothing else does (SqueezeNet), the last convolution is the classifier, and is replaced too. Modules
    keep their names; a head in an ``nn.Sequential`` becomes one of a single layer. What is put in is in the mode of
    what it replaces; hooks on the latter go with it, and a ``SecateurWarning`` names their modules. The outputs have
    ``classes`` scores, by default as many as now.

    The linear layer begins with normal weights of deviation 0.01 drawn by ``seed``, and biases of zero; with ``data``,
    batches as ``plan`` takes them, it is fitted to what ``model`` puts out on them, by least squares. ``check=False``
    skips the comparison, for a network whose head was pooled before.

    Raises ``CannotPrune`` for a head that is not understood, saying where, for a second one that only train mode calls,
    and for a network that was pruned already; ``BadRequest`` for ``classes`` that no head has, or that data cannot fit,
    and for data that can be read only once; what ``trace`` raises.
    """
    _check(classes, data)
    graph = trace(model, example_inputs)
    if record(graph.model) is not None:
        raise CannotPrune(
            "the network was pruned already, and its plan speaks of the head that it has\n"
            "  do: pool the head of the dense network, then plan and apply"
        )
    head = find_head(graph)
    linear = _linear(graph.model, head.channels, head.classes if classes is None else classes, seed)
    substitutes = _substitutes(graph, head, linear)
    _check_train_mode(graph, substitutes)
    pooled = _replaced(graph.model, substitutes)
    if check:
        _prove(graph, head, pooled, linear)
    if data is not None:
        fit_(pooled, graph, linear, data)
    _warn_of_hooks(graph.model, substitutes)
    return pooled


def _check(classes: int | None, data: Iterable[Any] | None) -> None:
    if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 1):
        raise BadRequest(f"classes={classes!r}: a head has a whole number of them, 1 or more")
    if classes is not None and data is not None:
        raise BadRequest(
            f"classes={classes} is for another task than the network was trained for, whose outputs data cannot fit\n"
            "  do: leave data out, and train the new layer"
        )
    if data is not None:
        check_repeatable(data, "the fit of a head")


def _check_train_mode(graph: Graph, replaced: Iterable[str]) -> None:
    """Raises ``CannotPrune`` where parameters outside of the modules ``replaced`` serve train mode only: a second head
    would keep its classes. Where the train pass cannot be captured, those that eval mode does not use may be such."""
    gone = tuple(f"{path}." for path in replaced)
    in_eval = replace(graph, captures=graph.captures[:1]).used
    extra = [name for name, _ in graph.model.named_parameters() if name not in in_eval and not name.startswith(gone)]
    why = "are used in train mode only, as by a second head, which would stay as it is"
    if graph.train_note:
        why = f"are not used in eval mode, and what train mode does with them is not known ({graph.train_note})"
    else:
        extra = [name for name in extra if name in graph.used]
    if extra:
        raise not_understood(
            f"its parameters {_some(extra)} {why}",
            "build it without (aux_logits=False), or remove them in your own code, and pass the network as it is then",
        )


def _warn_of_hooks(model: nn.Module, replaced: Iterable[str]) -> None:
    """A ``SecateurWarning`` that names the modules which go with hooks on them."""
    gone = tuple(f"{path}." for path in replaced)
    hooked = [
        name
        for name, m in model.named_modules()
        if f"{name}.".startswith(gone)
        and (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
    ]
    if hooked:
        warnings.warn(
            f"hooks on {_some(hooked)} are gone, with the modules that the pooled head replaces\n"
            "  do: register them anew on what pool_head returns, if they are still meant",
            SecateurWarning,
            stacklevel=3,
        )


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")


# ------------------------------------------------------------------------------------------------- what takes its place


@dataclass(frozen=True, eq=False)
class Call:
    """A module called in a head: its ``path``, and the shapes of what it reads and puts out."""

    path: str
    given: tuple[int, ...]
    made: tuple[int, ...]
    affine: bool


def _substitutes(graph: Graph, head: Head, linear: nn.Linear) -> dict[str, nn.Module]:
    """``{module: what takes its place}``: each puts out as many axes as what it replaces."""
    calls = _calls(graph, head)
    places = [number for number, call in enumerate(calls) if call.affine]
    if not places:
        raise not_understood("its layers are computed in the forward itself, by no module of their own")
    found: dict[str, nn.Module] = {}
    pooled = False
    for number, call in enumerate(calls):
        layers: list[nn.Module] = []
        if number <= places[-1] and not pooled and math.prod(call.given[2:]) > 1:
            layers.append(getattr(nn, f"AdaptiveAvgPool{len(call.given) - 2}d")(1))
            pooled = True
        if len(call.given) > 2 and (number == places[-1] or len(call.made) == 2):
            layers.append(nn.Flatten())
        if number == places[-1]:
            layers.append(linear)
            if len(call.made) > 2:
                layers.append(nn.Unflatten(1, (linear.out_features, *[1] * (len(call.made) - 2))))
        if call.path in found and (layers or not isinstance(found[call.path], nn.Identity)):
            raise not_understood(f"its module {call.path!r} is called several times")
        container = isinstance(graph.model.get_submodule(call.path), nn.Sequential)
        one = layers[0] if len(layers) == 1 and not container else nn.Sequential(*layers)
        found[call.path] = one if layers else nn.Identity()
    return found


def _calls(graph: Graph, head: Head) -> list[Call]:
    """The outermost modules whose calls all lie in the head, in the order of their calls. Layers with a weight outside
    of them are refused; for all else that the forward does itself, the proof tells whether it does harm."""
    tail = set(head.tail)
    outside = {path for node in moving_nodes(graph) if node not in tail for path in _paths(node)}
    found: list[tuple[str, list[fx.Node]]] = []
    for node in head.tail:
        path = next((path for path in _paths(node) if path not in outside), "")
        if not path and AFFINE.fullmatch(op_name(node)):
            raise not_understood(f"{source_line(node)} computes a layer that no module of the head holds alone")
        if found and found[-1][0] == path:
            found[-1][1].append(node)
        else:
            found.append((path, [node]))
    return [
        Call(
            path,
            shape_of(source_of(nodes[0])) or (),
            shape_of(nodes[-1]) or (),
            any(AFFINE.fullmatch(op_name(node)) for node in nodes),
        )
        for path, nodes in found
        if path
    ]


def _paths(node: fx.Node) -> list[str]:
    """The modules that a call was made in, the root aside, outermost first."""
    return [path.partition("@")[0] for path, _ in module_stack(node) if path]


def _linear(model: nn.Module, channels: int, classes: int, seed: int) -> nn.Linear:
    floats = [p for p in model.parameters() if p.is_floating_point()]
    linear = nn.utils.skip_init(nn.Linear, channels, classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.normal_(0, 0.01, generator=generator)
        linear.bias.zero_()
    return linear.to(floats[0].device, floats[0].dtype) if floats else linear


def _replaced(model: nn.Module, substitutes: Mapping[str, nn.Module]) -> nn.Module:
    """A deep copy of ``model``, but for the modules that are replaced: what takes their place is in their mode."""
    for path, module in substitutes.items():
        module.train(model.get_submodule(path).training)
    return copy.deepcopy(model, {id(model.get_submodule(path)): module for path, module in substitutes.items()})


# ------------------------------------------------------------------------------------------------------------ the proof


def _prove(graph: Graph, head: Head, pooled: nn.Module, linear: nn.Linear) -> None:
    """Raises ``CannotPrune`` unless ``pooled`` puts out ``linear`` of the average over the last map of ``graph``: in
    float64, at weights and inputs that tell."""
    coupling = couple(graph)
    inputs = telling_inputs(coupling, 1)
    value, state = _value_of(coupling, head.value, inputs)
    twins: dict[int, Any] = {}
    trial = copy.deepcopy(pooled, twins).double().cpu()
    own = twins[id(linear)]
    assert isinstance(own, nn.Linear)
    new = {id(own.weight), id(own.bias)}
    _, skeleton = flatten((graph.args, dict(graph.kwargs)))
    args, kwargs = unflatten(skeleton, [t.clone() for t in inputs])
    problem = "something else is computed on the way"
    with torch.no_grad(), in_mode(trial, False):
        for name, tensor in all_tensors(trial):
            if id(tensor) not in new and name in state:
                tensor.copy_(state[name])
        own.weight.normal_(generator=torch.Generator().manual_seed(0))
        wanted = own(value.flatten(2).mean(2))
        try:
            if relative_difference(flatten(trial(*args, **kwargs))[0], [wanted]) <= 1e-5:
                return
        except Exception as error:  # a forward that no longer fits may raise anything
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise not_understood(_told(graph, head) or problem)


def _told(graph: Graph, head: Head) -> str:
    """What the forward itself does between the modules of a head, if that explains why it stays in the way."""
    alone = {call.path for call in _calls(graph, head)}
    pooled = False
    for node in head.tail:
        name = op_name(node)
        if any(path in alone for path in _paths(node)) or name in PASSED:
            pooled = pooled or len(shape_of(source_of(node)) or ()) > 2
            continue
        if name in RESHAPES and collapses(node) and not pooled:
            return f"its map is laid out as a vector in the forward itself, before any pooling ({source_line(node)})"
        averages = name == "mean" or "avg_pool" in name
        pooled = pooled or averages
        if not (averages or name in RESHAPES):
            return f"the forward itself, or a module with other uses, goes on computing {name} ({source_line(node)})"
    return ""


def _value_of(
    coupling: Coupling, node: fx.Node, inputs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What ``node`` gives on ``inputs`` with telling weights, and those weights."""
    capture = coupling.graph.captures[0]
    needed, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                todo.append(source)
    names = {capture.names.get(str(n.target)) for n in needed if n.op == "get_attr"}
    tensors = coupling.graph.tensors
    state = perturbed({name: tensor for name, tensor in tensors.items() if name in names})
    everything = torch.ones(len(coupling.group_of), dtype=torch.bool)
    with torch.no_grad():
        walking = walk(coupling, everything, {**state, **without(tensors, state)}, inputs, 0, set(node.users))
        _, env = next(walking)
        return env[node], state


def without(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """``tensors`` but for those called ``names``."""
    left = set(names)
    return {name: tensor.detach() for name, tensor in tensors.items() if name not in left}


# -------------------------------------------------------------------------------------------------------- least squares


def fit_(pooled: nn.Module, graph: Graph, linear: nn.Linear, data: Iterable[Any]) -> None:
    """Fit ``linear``, a layer of ``pooled``, in place, so that ``pooled`` puts out what the network of ``graph`` does.

    Least squares with an intercept over all images of all processes; ``RIDGE`` of the mean variance is added to every
    variance. Raises ``BadRequest`` for data that are empty, do not fit, or give what is not finite.
    """
    _, device, _ = place_of(graph)
    channels, wide = linear.in_features, accumulator(device)
    sums = torch.zeros(channels + 1, channels + 1 + linear.out_features, device=device, dtype=wide)
    seen: list[torch.Tensor] = []
    _, skeleton = flatten((graph.args, dict(graph.kwargs)))
    hook = linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad(), in_mode(graph.model, False), in_mode(pooled, False):
            for inputs in batches(data, with_free_batch(graph), device, linear.weight.dtype):
                args, kwargs = unflatten(skeleton, inputs)
                (wanted,) = flatten(graph.model(*args, **kwargs))[0]
                pooled(*args, **kwargs)
                features = seen.pop().to(wide)
                ones = features.new_ones(len(features), 1)
                sums += torch.cat([ones, features], 1).mT @ torch.cat([ones, features, wanted.to(wide)], 1)
    finally:
        hook.remove()
    sum_over_processes_([sums])
    count = sums[0, 0]
    if not count:
        raise no_batches()
    if not bool(torch.isfinite(sums).all()):
        raise BadRequest(
            "the head cannot be fitted: the features or outputs on the data are not finite (NaN or infinite)\n"
            "  do: check the data and the network's weights"
        )
    means = sums[0, 1:] / count
    centred = sums[1:, 1:] / count - torch.outer(means[:channels], means)
    weight = least_change(centred[None, :, :channels], centred[None, :, channels:].mT, RIDGE)[0]
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(means[channels:] - weight @ means[:channels])

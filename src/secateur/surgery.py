"""``apply``: a plan carried out for good, and proved.

Three ways are tried, each checked before it is accepted: slice the tensors inside the user's own modules; also set the
integer attributes that the forward computes with (``expand_chs``, ``head_dim`` ...), or have modules scatter and gather
(``wiring``); return the captured graph with its constants recomputed. The check (``proofs``) runs the candidate against
the masked dense network in float64. Constants that the plan folds (``folding``) need the user's own modules.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from secateur import graph_network
from secateur.attributes import add_biases_, attribute_edits, bare_norm_edits, set_attributes
from secateur.core import Edit
from secateur.errors import CannotPrune, LawBroken, SecateurWarning
from secateur.folding import check_constant, fold, shifted
from secateur.graph import Graph, unwrap, with_free_batch, with_train_pass
from secateur.groups import Coupling, freed, same_groups
from secateur.interpreter import run_masked
from secateur.masks import coupling_for, meaning_of
from secateur.plan_checks import WIRINGS
from secateur.plans import Plan, check_model, compose
from secateur.proofs import Proof, casts, difference, prove
from secateur.rewrites import Rewritten, rewrite
from secateur.slicing import RECORD, State, keep_attention_scale_, like, named, sliced, small_tensor
from secateur.wiring import CONSTANTS, Spread, Wiring, fill_, find_wiring, rewire_, scatter_edit

Tier = Literal["module", "attributes", "graph"]


@dataclass(frozen=True)
class Applied:
    """What ``apply`` did, kept on the module it returned.

    ``plan``: relative to the original dense network, even after several rounds, with the edits that were needed.
    ``tier``: how it was done. ``difference``: largest relative difference to the masked dense network, or ``None`` if
    it was not checked; ``casts`` says that it is above 1e-9 because the network itself computes in float32 somewhere.
    """

    plan: Plan
    tier: Tier
    difference: float | None
    casts: bool = False


@dataclass(frozen=True)
class Way:
    """One way of making the smaller network: on ``coupling``, by ``tier``, with ``edits``. ``spreads``: where modules
    scatter."""

    tier: Tier
    edits: tuple[Edit, ...]
    coupling: Coupling
    spreads: Sequence[Spread] = ()


def record(module: nn.Module) -> Applied | None:
    """How ``module`` was made by ``apply``; ``None`` for any other module."""
    return module.__dict__.get(RECORD)


def apply(model: nn.Module | Graph, plan: Plan, *, check: bool = True) -> nn.Module:
    """A new, smaller network without the channels that ``plan`` removes; ``model`` is untouched.

    Parameter names, dtype, device, memory format, train or eval mode, ``requires_grad``, hooks and buffers stay, and so
    do the module classes, unless the forward's own numbers had to change so deeply that the captured graph is returned
    (``record(small).tier == "graph"``). ``check=False`` skips the proof where slicing alone is known to be enough.

    Raises ``WrongModel`` if the plan belongs to another network, ``LawBroken`` if no way gives the masked network's
    outputs (to 1e-9 relative, 1e-5 where the network itself casts to float32), ``CannotPrune`` if nothing can be proved
    because they are NaN or constant, and where constants cannot be folded. Warns (``SecateurWarning``) where the graph
    loses hooks or a train-mode path.
    """
    coupling = coupling_for(model, plan)
    dense = coupling.graph.model
    way, gap = _choose(coupling, plan, check)
    small = build(way, plan, dense, coupling.graph.tensors)
    if way.tier == "graph":
        _warn_of_losses(way, dense)
    full, tier = replace(plan, edits=way.edits, graph=None), way.tier
    before = record(dense)
    if before is not None:
        if tier == "graph" and any(edit.kind in WIRINGS for edit in before.plan.edits):
            raise CannotPrune(
                "this cut needs the captured graph, which has no place for what an earlier cut rewired "
                f"(residual='scatter' or constants='fold')\n  do: {_FROM_THE_START}"
            )
        full = compose(before.plan, full)
        tier = "graph" if "graph" in (tier, before.tier) else tier
    small.__dict__[RECORD] = Applied(full, tier, gap, gap is not None and gap > 1e-9 and casts(coupling))
    return small


def rebuild(model: nn.Module, plan: Plan) -> nn.Module:
    """The structure that ``apply`` gave, for weights that are loaded next: no search and no check.

    ``plan.edits`` says which way was taken; a plan that ends in the graph is captured again.
    """
    dense = unwrap(model)
    if any(edit.kind == "graph" for edit in plan.edits):
        small = build(_graph_way(coupling_for(dense, plan), plan), plan, dense, named(dense))
        tier: Tier = "graph"
    else:
        check_model(plan, dense)
        small = sliced(dense, plan.kept(), named(dense))
        set_attributes(small, plan.edits)
        add_biases_(small, plan.edits)
        rewire_(small, plan.edits)
        tier = "attributes" if _structural(plan.edits) else "module"
    small.__dict__[RECORD] = Applied(replace(plan, graph=None), tier, None)
    return small


def _choose(coupling: Coupling, plan: Plan, check: bool) -> tuple[Way, float | None]:
    """The first way that passes the check, and by how much it differs."""
    keep, meaning = coupling.class_keep(plan.keep), meaning_of(coupling, plan)
    rewritten = _rewritten(coupling, keep)
    changed = rewritten is None or any(r.changed for r in rewritten) or bool(_structural(plan.edits) or meaning.zeros)
    bare = (*bare_norm_edits(coupling, keep), *(edit for edit in plan.edits if edit.kind == "bias"))
    if not check and not changed:
        return Way("module", bare, coupling), None
    proof = prove(coupling, meaning)
    if proof.coarse:
        loose = freed(coupling)
        proof = prove(loose, meaning_of(loose, plan), copies=32) if loose.graph.captures[0].free else proof
    tried: list[str] = []
    for way in _ways(coupling, plan, rewritten, bare):
        if proof.coarse and changed and way.tier != "graph":
            tried.append(f"{way.tier}: the outputs are whole numbers, which could hide a mistake")
            continue
        try:
            if way.tier == "graph":
                way = _graph_way(coupling, plan)
                copies = 32 if proof.coarse and way.coupling.graph.captures[0].free else 1
                proof = prove(way.coupling, meaning_of(way.coupling, plan), copies=copies)
                _check_capture(proof, coupling.graph.model)
            gap = difference(proof, build(way, plan, coupling.graph.model, proof.state))
            if changed and way.tier != "graph" and gap <= proof.tolerance:
                again = prove(coupling, meaning, anew=True)
                gap = max(gap, difference(again, build(way, plan, coupling.graph.model, again.state)))
        except Exception as error:  # a forward that no longer fits: the next way may
            first = str(error).splitlines()[0] if str(error) else ""
            tried.append(f"{way.tier}: {type(error).__name__}: {first}"[:200])
            continue
        if gap <= proof.tolerance:
            return way, gap
        tried.append(f"{way.tier}: outputs differ by {gap:.1e} (relative)")
    ways = "\n  ".join(tried)
    if meaning.zeros and (rewritten is None or any(r.changed for r in rewritten)):
        raise CannotPrune(
            f"constants='fold' needs the network's own modules, and these cannot be cut as they are:\n  {ways}\n"
            "  do: constants='drop', which falls back on the captured graph, or prefer='module', or exclude such groups"
        )
    raise LawBroken(
        f"no way of removing the channels gives the masked network's outputs:\n  {ways}\n"
        "  do: exclude the groups around the operation named above, and please report the network"
    )


def _rewritten(coupling: Coupling, keep: torch.Tensor) -> list[Rewritten] | None:
    """Every pass with its constants recomputed; ``None`` if some cannot be (the user's own modules may still do)."""
    try:
        return [rewrite(coupling, i, keep) for i in range(len(coupling.passes))]
    except Exception:
        return None


def _ways(coupling: Coupling, plan: Plan, rewritten: list[Rewritten] | None, bare: tuple[Edit, ...]) -> list[Way]:
    graph = Way("graph", (Edit("graph", ""),), coupling)
    if any(edit.kind == "graph" for edit in plan.edits):
        return [graph]
    ways = []
    wiring = find_wiring(coupling, coupling.class_keep(plan.keep))
    spreads = wiring[0] if wiring is not None else ()
    if _structural(plan.edits):
        ways.append(Way("attributes", plan.edits, coupling, spreads))
    wired = _wired(coupling, plan, wiring)
    own = (*(edit for edit in bare if edit.kind != "bias" or edit not in wired), *wired) if wired else bare
    if wired is not None:
        ways.append(Way("attributes" if _structural(wired) else "module", own, coupling, spreads))
    if rewritten is None:
        return ways
    edits = attribute_edits(coupling.graph.model, [note for r in rewritten for note in r.notes])
    if edits and wired is not None:
        ways.append(Way("attributes", (*own, *edits), coupling, spreads))
    stays = any(edit.kind == "bias" for edit in plan.edits) or "fold" in plan.constants.values()
    return ways if stays else [*ways, graph]


def _wired(coupling: Coupling, plan: Plan, wiring: Wiring | None) -> tuple[Edit, ...] | None:
    """The edits that rewire modules, and hold constants; ``None`` where no module has a place for a scatter.

    Raises ``CannotPrune`` where constants cannot be folded.
    """
    if wiring is None:
        if meaning_of(coupling, plan).zeros:
            raise CannotPrune(
                "constants='fold' needs a module of the network's own in front of every sum that a narrow branch is "
                "scattered into, and there is one without\n  do: constants='drop', or residual='inner'"
            )
        return None
    spreads, gathers = wiring
    folded = fold(coupling, plan, coupling.graph.tensors, spreads)
    check_constant(coupling, plan, spreads, folded)
    scatters = (scatter_edit(s, constants=f"{s.target}.{CONSTANTS}" in folded.values) for s in spreads)
    edits = (*scatters, *gathers, *folded.edits)
    _refuse_again(coupling.graph.model, edits)
    return edits


def _refuse_again(dense: nn.Module, edits: tuple[Edit, ...]) -> None:
    """A module holds one table: raises ``CannotPrune`` where an earlier cut has given it that. Kernels add up."""
    before = record(dense)
    tables = ("scatter", "gather")
    wired = {(e.kind, e.target) for e in before.plan.edits if e.kind in tables} if before is not None else set()
    twice = [edit for edit in edits if (edit.kind, edit.target) in wired]
    if twice:
        raise CannotPrune(
            f"{twice[0].target!r} was rewired by an earlier cut (residual='scatter' or constants='fold'), and cannot "
            f"be once more\n  do: {_FROM_THE_START}"
        )


_FROM_THE_START = (
    "cut the dense network once, with the ratios of both cuts; or make the second cut with residual='inner' and "
    "constants='drop'"
)


def _structural(edits: tuple[Edit, ...]) -> tuple[Edit, ...]:
    """The edits that change what the forward computes: an added bias is zero."""
    return tuple(edit for edit in edits if edit.kind != "bias")


def _graph_way(coupling: Coupling, plan: Plan) -> Way:
    """The graph, captured anew with a free batch, and with its train pass where that couples the same channels."""
    edits = (Edit("graph", ""),)
    free = with_free_batch(coupling.graph)
    for graph in (with_train_pass(free), free):
        found = same_groups(graph, plan.groups, scatter=coupling.scatter)
        if found is not None:
            return Way("graph", edits, found)
    return Way("graph", edits, coupling)


def _check_capture(proof: Proof, dense: nn.Module) -> None:
    """The captured graph may stand for the model only if it still computes what the model does."""
    everything = torch.ones(len(proof.coupling.group_of), dtype=torch.bool)
    with torch.no_grad():
        wanted = run_masked(proof.coupling, everything, proof.state, proof.inputs)
    gap = difference(replace(proof, wanted=wanted, wanted_train=None), sliced(dense, {}, proof.state))
    if gap > proof.tolerance:
        raise LawBroken(f"the model no longer computes what was captured (differs by {gap:.1e}): trace it again")


def build(way: Way, plan: Plan, dense: nn.Module, state: State) -> nn.Module:
    """The smaller network by one of the ways, with the values in ``state`` (canonical name -> dense tensor)."""
    keep = way.coupling.class_keep(plan.keep)
    if way.tier != "graph":
        folded = fold(way.coupling, plan, state, way.spreads)
        small = sliced(dense, plan.kept(), shifted(state, folded.shifts))
        keep_attention_scale_(small, way.coupling, keep)
        set_attributes(small, way.edits)
        add_biases_(small, way.edits)
        rewire_(small, way.edits)
        fill_(small, folded.values)
        return small
    kept, originals = plan.kept(), named(dense)
    used = {name for c in way.coupling.graph.captures for name in c.names.values()} | set(dense.state_dict())
    tensors = {n: like(originals[n], small_tensor(n, t, kept)) for n, t in state.items() if n in used}
    passes = {
        c.mode: graph_network.Pass(rewrite(way.coupling, i, keep), c.names, c.constants, c.skeleton)
        for i, c in enumerate(way.coupling.graph.captures)
    }
    network = graph_network.build(passes, way.coupling.graph.inputs, dense, tensors)
    network._forward_hooks.update(dense._forward_hooks)
    network._forward_pre_hooks.update(dense._forward_pre_hooks)
    return network


def _warn_of_losses(way: Way, dense: nn.Module) -> None:
    lost = []
    hooked = [n for n, m in dense.named_modules() if n and (m._forward_hooks or m._forward_pre_hooks)]
    if hooked:
        lost.append(f"forward hooks on submodules are gone ({', '.join(hooked[:3])}{' ...' if hooked[3:] else ''})")
    if len(way.coupling.passes) < 2:
        note = with_train_pass(way.coupling.graph).train_note or "it couples other channels than the eval pass"
        lost.append(f"in train mode only batch norm and dropout differ from eval mode (no train pass: {note})")
    if not way.coupling.graph.captures[0].free:
        lost.append("it runs on the example's batch size only, which the model writes down")
    if lost:
        warnings.warn(
            f"the captured graph stands for the model: {'; '.join(lost)}\n"
            "  do: plan with prefer='module', or exclude the groups in front of splits and shuffles",
            SecateurWarning,
            stacklevel=3,
        )

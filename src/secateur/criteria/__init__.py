"""Criteria: how much a channel matters.

A criterion is a pure function from a ``GroupView`` to ``[C]`` scores, higher is kept longer. It is short, states its
formula, shapes and source, and is tested against a naive loop. One family a file; this dict is the registry. A user's
own criterion is any function of the same shape and needs no registration; an attribute ``reads`` on it says what it
looks at, without one it is shown the weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from secateur.core import Criterion
from secateur.criteria.ablation import largest, random
from secateur.criteria.activations import apoz, mean_l1, mean_l2, mean_mean, mean_std, var_l2
from secateur.criteria.distances import fpgm, fpgm_cosine, fpgm_l1, fpgm_with, whc
from secateur.criteria.gradients import taylor
from secateur.criteria.medians import geometric_median
from secateur.criteria.mixtures import fpgm_mix, fpgm_mix_with
from secateur.criteria.norms import l1, l2
from secateur.criteria.outputs import (
    LOCATIONS,
    thinet,
    thinet_omp,
    thinet_sampled,
    thinet_sampled_omp,
    thinet_sequential,
    thinet_with,
)
from secateur.criteria.pairs import similarity
from secateur.criteria.scales import bn_scale
from secateur.errors import BadRequest, nearest
from secateur.views import FIELDS

__all__ = [
    "CRITERIA",
    "READS",
    "check_given",
    "fpgm_mix_with",
    "fpgm_with",
    "locations",
    "needs_data",
    "needs_loss",
    "needs_width",
    "reads",
    "resolve",
    "thinet_with",
]

CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "random": random,
    "largest": largest,
    "mean_mean": mean_mean,
    "mean_std": mean_std,
    "mean_l1": mean_l1,
    "mean_l2": mean_l2,
    "var_l2": var_l2,
    "apoz": apoz,
    "bn_scale": bn_scale,
    "taylor": taylor,
    "whc": whc,
    "fpgm": fpgm,
    "fpgm_l1": fpgm_l1,
    "fpgm_cosine": fpgm_cosine,
    "fpgm_mix": fpgm_mix,
    "geometric_median": geometric_median,
    "similarity": similarity,
    "thinet": thinet,
    "thinet_omp": thinet_omp,
    "thinet_sampled": thinet_sampled,
    "thinet_sampled_omp": thinet_sampled_omp,
    "thinet_sequential": thinet_sequential,
}

READS: dict[Criterion, tuple[str, ...]] = {
    l1: ("filters",),
    l2: ("filters",),
    random: ("filters",),
    largest: ("filters",),
    mean_mean: ("maps",),
    mean_std: ("maps",),
    mean_l1: ("maps",),
    mean_l2: ("maps",),
    var_l2: ("maps",),
    apoz: ("activations",),
    bn_scale: ("scales",),
    taylor: ("products",),
    whc: ("filters",),
    fpgm: ("filters",),
    fpgm_l1: ("filters",),
    fpgm_cosine: ("filters",),
    fpgm_mix: ("filters", "n_keep"),
    geometric_median: ("filters",),
    similarity: ("filters",),
    thinet: ("outputs",),
    thinet_omp: ("outputs",),
    thinet_sampled: ("samples",),
    thinet_sampled_omp: ("samples",),
    thinet_sequential: ("outputs",),
}
"""Which fields of the view a criterion of ours reads, so that the others need not be gathered or measured; and whether
it depends on how many channels stay (``WIDTH``)."""

WEIGHTS = FIELDS
"""The fields that are gathered from the network's tensors: what a function that does not say is shown."""
EVIDENCE = ("maps", "activations", "products", "outputs", "samples")
"""The fields that calibration data are needed for; ``products`` needs a loss as well."""
WIDTH = "n_keep"
"""What a criterion reads whose scores depend on how many channels of the group stay."""


def resolve(criterion: str | Criterion) -> Criterion:
    """The criterion of that name, or the callable itself. Raises ``BadRequest`` for an unknown name."""
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise BadRequest(f"there is no criterion {criterion!r}{nearest(criterion, CRITERIA)}")
        return CRITERIA[criterion]
    if not callable(criterion):
        raise BadRequest(
            f"a criterion is a name or a function from a GroupView to [channels] scores, not {criterion!r}\n"
            f"  names: {', '.join(CRITERIA)}"
        )
    return criterion


def is_ours(criterion: Criterion) -> bool:
    """Whether the function is one of this registry, which are known not to write into what they are shown."""
    return bool(getattr(criterion, "__hash__", None)) and criterion in READS


def reads(criterion: str | Criterion) -> tuple[str, ...]:
    """The fields of the view that a criterion reads, out of ``filters``, ``readers``, ``scales`` (gathered from the
    weights) and ``maps``, ``activations``, ``products``, ``outputs``, ``samples`` (measured on calibration data).

    A user's own function says so in its attribute ``reads``, a tuple of these names; without one it is shown the
    weights. Raises ``BadRequest`` for an unknown criterion, and for an attribute that names anything else.
    """
    return tuple(name for name in _stated(criterion) if name != WIDTH)


def needs_width(criterion: str | Criterion) -> bool:
    """Whether the scores depend on how many channels of a group stay (``view.n_keep``), so that they are taken anew
    once that is decided. A user's own function says so with ``"n_keep"`` in its attribute ``reads``."""
    return WIDTH in _stated(criterion)


def _stated(criterion: str | Criterion) -> tuple[str, ...]:
    function = resolve(criterion)
    if is_ours(function):
        return READS[function]
    stated: object = getattr(function, "reads", WEIGHTS)
    known = (*WEIGHTS, *EVIDENCE, WIDTH)
    if isinstance(stated, str) or not isinstance(stated, Iterable):
        stated = (stated,)
    names = tuple(stated)
    wrong = [name for name in names if name not in known]
    if wrong:
        raise BadRequest(
            f"the criterion {label(function)!r} says that it reads {wrong[0]!r}, which is no field of a GroupView\n"
            f"  do: set its attribute reads to a tuple out of {', '.join(known)}"
        )
    return tuple(name for name in known if name in names)


def needs_data(criterion: str | Criterion) -> bool:
    """Whether a criterion looks at activations or gradients, so that calibration data must be given."""
    return any(name in EVIDENCE for name in reads(criterion))


def locations(criterion: str | Criterion) -> int:
    """How many outputs of an image are drawn for a criterion that reads ``samples``: a function's attribute
    ``locations``, 10 where it has none. Raises ``BadRequest`` for one that is no number of outputs."""
    found: object = getattr(resolve(criterion), "locations", LOCATIONS)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise BadRequest(
            f"the criterion {label(criterion)!r} says locations={found!r}, which is not a number of outputs of an "
            "image, 1 or more\n  do: set its attribute locations to one, or leave it out"
        )
    return found


def is_sequential(criterion: str | Criterion) -> bool:
    """Whether what it looks at is to be measured front to back, each group after all before it are decided."""
    return resolve(criterion) is thinet_sequential


def needs_loss(criterion: str | Criterion) -> bool:
    """Whether a criterion looks at gradients, so that a loss must be given beside the data."""
    return "products" in reads(criterion)


def check_given(criterion: str | Criterion, data: object, loss: object) -> None:
    """Raises ``BadRequest`` unless what the criterion looks at is there. More than that is no mistake: who compares
    criteria gives the same to all of them."""
    name = label(criterion)
    if needs_data(criterion) and data is None:
        also = ", and loss=, a function of outputs and targets" if needs_loss(criterion) else ""
        what = ", ".join(field for field in reads(criterion) if field in EVIDENCE)
        raise BadRequest(f"criterion {name!r} looks at {what}\n  do: give data=, batches to measure them on{also}")
    if needs_loss(criterion) and loss is None:
        raise BadRequest(
            f"criterion {name!r} looks at gradients, and nothing says of what\n"
            "  do: give loss=, a function of outputs and targets, such as torch.nn.functional.cross_entropy"
        )


def label(criterion: str | Criterion) -> str:
    """What to call a criterion in messages and plans."""
    return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)

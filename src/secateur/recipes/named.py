"""The papers' own networks as recipes, by name: ``named_recipe("li/resnet56-A")``, ``secateur run thinet/conv``.

``NETWORKS`` is the literal table, put together of those in ``li``, ``thinet`` and ``fpgm``: the dense network, the
fraction removed of every group (of ``n`` channels it leaves ``floor(n (1 - ratio) + 1e-9)``) or the width that is left,
and the layers that stay whole, in the paper's numbers. The names are those of the rows in ``secateur.zoo.papers``,
whose parameters and FLOPs the pruned networks have to the integer. ``VARIANTS`` are the ways to get there, by paper;
each file says what its mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from secateur.errors import BadRequest, nearest
from secateur.recipes import fpgm, li, thinet
from secateur.recipes.entries import Network
from secateur.recipes.reading import make_recipe
from secateur.recipes.schema import RANDOM, Recipe

NETWORKS: Mapping[str, Network] = {**li.NETWORKS, **thinet.NETWORKS, **fpgm.NETWORKS}
VARIANTS: Mapping[str, tuple[str, ...]] = {"li": li.VARIANTS, "thinet": thinet.VARIANTS, "fpgm": fpgm.VARIANTS}
UNTRAINED: Mapping[str, tuple[str, ...]] = {"li": ("scratch",), "thinet": ("scratch",), "fpgm": fpgm.UNTRAINED}
"""The variants that start from random weights."""
_VALUES: Mapping[str, Callable[[Network, str], dict[str, Any]]] = {
    "li": li.values_of,
    "thinet": thinet.values_of,
    "fpgm": fpgm.values_of,
}


def named_recipe(name: str, variant: str = "paper", weights: str | None = None) -> Recipe:
    """The recipe of a network in a paper: a key of ``NETWORKS``, in one of its paper's ``VARIANTS``.

    ``weights``: a file of the dense network's weights; ``None``: the recipe trains it first.

    Raises ``BadRequest`` for a name or a variant that is not known, and for weights where training starts from none.
    """
    return make_recipe(named_values(name, variant, weights), name=name)


def named_values(name: str, variant: str = "paper", weights: str | None = None) -> dict[str, Any]:
    """The same as the values of a recipe's keys, those with the default left out. Raises as ``named_recipe`` does."""
    if name not in NETWORKS:
        raise BadRequest(f"there is no recipe called {name!r}{nearest(name, NETWORKS)}")
    paper = name.partition("/")[0]
    if variant not in VARIANTS[paper]:
        raise BadRequest(f"{name} has no variant {variant!r}{nearest(variant, VARIANTS[paper])}")
    untrained = variant in UNTRAINED[paper]
    if untrained and weights is not None:
        others = [other for other in VARIANTS[paper] if other not in UNTRAINED[paper]]
        raise BadRequest(
            f"{name}: the variant {variant!r} starts from random weights, and cannot from those in {weights}\n"
            f"  do: leave the weights out, or choose one of the variants {', '.join(others)}"
        )
    found = NETWORKS[name]
    values = {"model": {"name": f"zoo:{found.model}"}, **_VALUES[paper](found, variant)}
    if found.head != "own":
        values["model"]["head"] = found.head
    if untrained:
        weights = RANDOM
    if weights is not None:
        values["model"]["weights"] = weights
        values.pop("train", None)
    return values

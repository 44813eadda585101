"""What was measured about latencies, as plain data: layers at some widths, and some whole networks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.errors import BadArtifact, BadRequest

FORMAT = 1


@dataclass(frozen=True)
class Whole:
    """A whole network: the ``widths`` of its groups, and the ``ms`` that one batch takes. ``decided``: it was timed
    because a plan had come to it, and not to learn about widths in general."""

    widths: Mapping[str, int]
    ms: float
    decided: bool = False


@dataclass(frozen=True)
class Latencies:
    """Latencies of the layers of one network, and of a few whole ones, on one machine, in one engine.

    ``points``: ``{geometry: {"INxOUT": ms}}`` (``Geometry.text``). ``whole``: the dense network first. ``network``: a
    digest of the network's shapes and of how it is pruned. ``steps``: ``{family: step}``, what the widths of layers are
    to be multiples of (``staircases.py``). ``seconds``: what measuring took, without what was known before.
    """

    engine: str
    version: str
    threads: int
    batch: int
    machine: str
    network: str
    points: Mapping[str, Mapping[str, float]]
    whole: tuple[Whole, ...]
    steps: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> str:
        """As JSON text, which ``from_json`` reads: measured on a device, used where the network is planned."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Latencies:
        """Raises ``BadArtifact`` for text that is no such JSON, and tells the first thing that is wrong."""
        from pydantic import TypeAdapter, ValidationError

        try:
            values = json.loads(text)
            if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
                raise BadArtifact(f"these are no latencies of format {FORMAT}\n  do: measure them again")
            return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise BadArtifact(f"the latencies are damaged: {where}: {first['msg'].lower()}") from None
        except ValueError as error:
            raise BadArtifact(f"the latencies are no JSON: {error}") from None


def check_setting(found: Latencies, wanted: Mapping[str, Any]) -> None:
    """Raises ``BadRequest`` where latencies were measured in another engine, or with other threads, or another batch,
    than is ``wanted``."""
    for name, value in wanted.items():
        if getattr(found, name) != value:
            raise BadRequest(
                f"the budget is one of {name}={value!r}, and the latencies are of {name}={getattr(found, name)!r}\n"
                f"  do: say {name}={getattr(found, name)!r} in the budget, or measure again"
            )


def digest(*values: Any) -> str:
    """A short name of JSON values that is the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]

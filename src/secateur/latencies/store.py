"""Where latencies are kept between calls: a file for each machine, engine, version, number of threads and batch.

The folder is ``$SECATEUR_CACHE``, else ``secateur`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``. A file says which
machine it is of; one that lies there under the name of another is refused, not used.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import BadArtifact, SecateurWarning
from secateur.files import written_aside
from secateur.latencies.records import FORMAT, Whole, digest
from secateur.machines import machine

PLACE = "SECATEUR_CACHE"


@dataclass(frozen=True)
class Setting:
    """What a latency depends on besides the network."""

    engine: str
    version: str
    threads: int
    batch: int

    def as_values(self) -> dict[str, Any]:
        return {**vars(self), "machine": machine()}


@dataclass
class Store:
    """The latencies known in one setting: of ``layers`` ``{geometry: {"INxOUT": ms}}``, and of ``networks``
    the values of each ``Whole``, by digest. ``path``: where ``keep`` writes them; nowhere, if None."""

    setting: Setting
    path: Path | None
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    networks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def keep(self) -> None:
        """Write all that is known. Warns, and goes on without, where the folder cannot be written."""
        if self.path is None:
            return
        values = {
            "format": FORMAT, **self.setting.as_values(), "layers": self.layers, "networks": self.networks,
        }  # fmt: skip
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(self.path) as aside:
                aside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            warnings.warn(
                f"latencies cannot be kept in {self.path.parent}: {error.strerror or error}; they will be measured "
                f"again the next time\n  do: set {PLACE} to a folder that can be written",
                SecateurWarning,
                stacklevel=2,
            )
            self.path = None


def open_store(setting: Setting, *, cache: bool = True) -> Store:
    """What is known in this setting. Without ``cache`` nothing is, and nothing is kept.

    Raises ``BadArtifact`` for a file that is damaged, or that was measured in another setting or on another machine.
    """
    if not cache:
        return Store(setting, None)
    wanted = setting.as_values()
    path = folder() / f"latency-{setting.engine}-{setting.threads}t-{setting.batch}b-{digest(wanted)}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return Store(setting, path)
    except (OSError, ValueError) as error:
        raise BadArtifact(f"{path} cannot be read: {error}\n  do: delete it, and measure again") from error
    _check(path, values, wanted)
    return Store(setting, path, values["layers"], values["networks"])


def folder() -> Path:
    """Where latencies are kept."""
    own = os.environ.get(PLACE)
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "secateur"


def _check(path: Path, values: Any, wanted: Mapping[str, Any]) -> None:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BadArtifact(f"{path} holds no latencies of format {FORMAT}\n  do: delete it, and measure again")
    for key, own in wanted.items():
        if values.get(key) != own:
            raise BadArtifact(
                f"{path} was measured with another {key}: {values.get(key)!r}, and here it is {own!r}\n"
                "  do: delete the file (it was copied, or renamed), and measure here"
            )
    try:
        times = [ms for own in values["layers"].values() for ms in own.values()]
        times += [Whole(**one).ms for own in values["networks"].values() for one in own]
    except (AttributeError, KeyError, TypeError):
        times = [None]
    if not all(isinstance(ms, (int, float)) and 0 <= ms < float("inf") for ms in times):
        raise BadArtifact(f"{path} is damaged: not all times in it are numbers\n  do: delete it, and measure again")

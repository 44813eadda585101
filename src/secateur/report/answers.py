"""The answer that a report begins with: how much smaller, how much faster, and at what accuracy.

Speed compares each network in the engine that runs it fastest: the fastest dense network against the fastest pruned
one. Against the dense network in a slow engine, any pruned one would look better than it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.report.content import Row

ENGINE_NAMES = {
    "torch": "PyTorch",
    "channels_last": "PyTorch, channels last",
    "inductor": "PyTorch, inductor",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
    "tensorrt": "TensorRT",
}
FEW = 2000
"""Of fewer test images than this it is told what one of them is worth."""
UNCHANGED = 0.005
"""A change of fewer points of accuracy than this, or of fewer parts of a time, is told as none."""


@dataclass(frozen=True)
class Card:
    """A headline figure: ``what`` changed by how much (``change``), from what to what (``span``), and what to know
    about it (``note``). ``share``: what is left of it, as a fraction, for a bar, or None. ``good``: whether that is to
    the better; None is neither."""

    what: str
    change: str
    span: str
    note: str = ""
    share: float | None = None
    good: bool | None = None


def cards(dense: Row, final: Row, *, images: int = 0) -> list[Card]:
    """The headline figures, of those that were measured; ``images``: how many the accuracies are of."""
    found = [_accuracy_card(dense.accuracy, final.accuracy, images)]
    if dense.fastest is not None and final.fastest is not None:
        found.append(_speed_card(dense.fastest, final.fastest))
    found.append(_cost_card("MACs", dense.macs, final.macs, short_count))
    found.append(_cost_card("Parameters", dense.params, final.params, short_count))
    if dense.size and final.size:
        found.append(_cost_card("File", dense.size, final.size, short_bytes))
    if dense.memory and final.memory:
        found.append(_cost_card("Peak of activations", dense.memory, final.memory, short_bytes))
    return [card for card in found if card is not None]


def _cost_card(what: str, before: int, after: int, text: object) -> Card:
    assert callable(text)
    good = None if after == before else after < before
    share = after / before if before else None
    return Card(what, change(before, after), f"{text(before)} → {text(after)}", share=share, good=good)


def _speed_card(before: tuple[str, float], after: tuple[str, float]) -> Card:
    (engine, old), (other, new) = before, after
    note = f"in {engine_name(engine)}"
    if engine != other:
        note = f"from {engine_name(engine)} to {engine_name(other)}, the fastest for each"
    good = None if abs(new / old - 1) < UNCHANGED else new < old
    return Card("Speed", times(old, new), f"{ms_text(old)} → {ms_text(new)} ms", note, new / old, good)


def _accuracy_card(before: float | None, after: float | None, images: int) -> Card | None:
    if before is None or after is None:
        return None
    points = 100 * (after - before)
    span = f"{100 * before:.2f} → {100 * after:.2f} %"
    note = f"of {images:,} test images" if images else ""
    if images and images < FEW:
        note += f"; one is {100 / images:.2f} points"
    good = None if abs(points) < UNCHANGED else points > 0
    return Card("Accuracy", f"{points_text(points)} points", span, note, good=good)


def lead(dense: Row, final: Row) -> list[tuple[str, str]]:
    """The answer as a sentence, in pairs of what is said plainly and what is said loudly behind it."""
    said = [
        (f"The {final.name} network takes ", per_cent(final.macs, dense.macs)),
        (" of the MACs and ", per_cent(final.params, dense.params)),
    ]
    plain = f" of the parameters of the {dense.name} one"
    if dense.fastest is not None and final.fastest is not None:
        said.append((f"{plain}, runs ", times(dense.fastest[1], final.fastest[1])))
        plain = ""
    if dense.accuracy is not None and final.accuracy is not None:
        said.append((f"{plain}{', and gets ' if plain == '' else ', gets '}", f"{100 * final.accuracy:.2f} %"))
        points = 100 * (final.accuracy - dense.accuracy)
        if abs(points) < UNCHANGED:
            plain = " of the test images right, as many as before"
        else:
            plain = f" of the test images right, {abs(points):.2f} points {'more' if points > 0 else 'fewer'}"
    return [*said, (f"{plain}.", "")]


def speed_text(rows: Sequence[Row], final: Row) -> str:
    """How the speeds of ``rows[0]`` and ``final`` are meant, and what they are in each engine by itself."""
    dense = rows[0]
    if dense.fastest is None or final.fastest is None:
        return ""
    (engine, old), (other, new) = dense.fastest, final.fastest
    text = f"Fastest against fastest: {dense.name} takes {ms_text(old)} ms in {engine_name(engine)}, {final.name} "
    text += f"{ms_text(new)} ms in {engine_name(other)}."
    shared = [each for each in dense.latencies_ms if each in final.latencies_ms]
    if len(shared) > 1:
        gains = {each: dense.latencies_ms[each] / final.latencies_ms[each] for each in shared}
        low, high = min(gains, key=lambda each: gains[each]), max(gains, key=lambda each: gains[each])
        text += (
            f" In one and the same engine {final.name} is between {gains[low]:.2f} ({engine_name(low)}) and "
            f"{gains[high]:.2f} times ({engine_name(high)}) as fast."
        )
    return text


def engine_name(engine: str) -> str:
    """What people call it."""
    return ENGINE_NAMES.get(engine, engine)


def times(before: float, after: float) -> str:
    """``1.77 × faster``, of two times of the same work."""
    if abs(after / before - 1) < UNCHANGED:
        return "as fast"
    return f"{before / after:.2f} × faster" if after < before else f"{after / before:.2f} × slower"


def points_text(points: float) -> str:
    """A difference of two percentages, with its sign: ``−0.56``."""
    sign = "±" if abs(points) < UNCHANGED else "+" if points > 0 else "−"
    return f"{sign}{abs(points):.2f}"


def per_cent(part: float, whole: float) -> str:
    """``49.7 %``; a dash of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def ms_text(ms: float) -> str:
    """Milliseconds by three digits: ``0.834``, ``12.3``, ``1,234``."""
    return f"{ms:,.{max(0, 3 - len(str(int(ms))))}f}" if ms >= 1 else f"{ms:.3f}"


def change(before: float, after: float) -> str:
    """The relative change, as ``−50.0 %``."""
    if not before:
        return "–"
    percent = 100 * (after - before) / before
    return f"{'−' if percent < 0 else '+' if percent > 0 else '±'}{abs(percent):.1f} %"


def short_count(number: float) -> str:
    """``41.5 M``: three digits and a letter, thousands written out below 10,000."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            unit = 1e3 if letter == "k" else size
            value = number / unit
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {letter}"
    return f"{number:,.0f}"


def short_bytes(number: float) -> str:
    """``1.1 MB``, in powers of ten as file managers show them."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            value = number / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    return f"{number:.0f} B"

"""How long a network takes as a function of its widths: measured, so that a plan can meet a budget in milliseconds.

    found = sc.measure_latencies(model, inputs, engine="onnxruntime")
    plan = sc.plan(model, inputs, budget=sc.Budget(keep=0.5, of="latency", engine="onnxruntime"), latencies=found)

Layers are timed at a grid of widths (``timers``), the widths that the engine is fast at are found on the way
(``staircases``), and a few whole networks tell what layers alone do not (``fits``). ``network_latency`` puts it
together: a cost, as MACs are one, that allocation can be given.
"""

from secateur.latencies.deciding import Decision, decide_within
from secateur.latencies.measuring import latencies_of, measure_latencies
from secateur.latencies.prediction import network_latency, predicted_ms, width_steps
from secateur.latencies.records import Latencies, Whole

__all__ = [
    "Decision",
    "Latencies",
    "Whole",
    "decide_within",
    "latencies_of",
    "measure_latencies",
    "network_latency",
    "predicted_ms",
    "width_steps",
]

"""One short rule for every operation, in a literal dict. Add your own with ``RULES["my_op"] = my_rule``.

``elementwise``: values change, channels stay where they are. ``movement``: channels move, values stay.
``contraction``: channels are summed over and new ones begin. ``norms``: statistics over channels or beside them.
"""

from __future__ import annotations

from secateur.propagation import Rule
from secateur.rules import contraction, elementwise, movement, norms

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **movement.RULES,
    **contraction.RULES,
    **norms.RULES,
}

"""What pagenet-bench measures: every figure beside its floor, which is a bare loop in C that does the least any page mover
must do, run in the same call and in turn with what it is compared to.
"""

from __future__ import annotations

from ._environment import environment
from ._fault import LIMIT_SECONDS, FaultOptions, FaultResult, measure_faults
from ._figures import Sample, median
from ._null import NullResult, measure_null
from ._peers import Source
from ._plot import check_plot, plot_latencies
from ._scale import ScaleOptions, ScaleResult, measure_scale
from ._stream import PLACEMENTS, SOURCES, StreamOptions, StreamResult, measure_streams

__all__ = [
    "LIMIT_SECONDS",
    "PLACEMENTS",
    "SOURCES",
    "FaultOptions",
    "FaultResult",
    "NullResult",
    "Sample",
    "ScaleOptions",
    "ScaleResult",
    "Source",
    "StreamOptions",
    "StreamResult",
    "check_plot",
    "environment",
    "measure_faults",
    "measure_null",
    "measure_scale",
    "measure_streams",
    "median",
    "plot_latencies",
]

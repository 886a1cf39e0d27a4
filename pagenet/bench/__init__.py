"""What pagenet-bench measures. Every figure stands beside its floor: a bare loop in C that does
only what any page mover must do. Both run in the same call, in turn.
"""

from __future__ import annotations

from ._content import CONTENTS
from ._encoding import (
    ENCODINGS,
    EncodingOptions,
    EncodingResult,
    EncodingTarget,
    encoding_targets,
    measure_encodings,
)
from ._environment import environment
from ._far import serve_floors
from ._fault import LIMIT_SECONDS, FaultOptions, FaultResult, measure_faults
from ._figures import Sample, median
from ._guard import GuardOptions, GuardResult, measure_guard
from ._hostile import MOST_BESIDE, HostileOptions, HostileResult, measure_hostile
from ._null import NullResult, measure_null
from ._peers import Source
from ._plot import plot_latencies, plot_work
from ._rdma import RdmaOptions, RdmaResult, measure_rdma
from ._scale import ScaleOptions, ScaleResult, measure_scale
from ._stream import FLOORS, PLACEMENTS, SOURCES, StreamOptions, StreamResult, measure_streams
from ._tls import TlsOptions, TlsResult, measure_tls
from ._track import TrackOptions, TrackResult, measure_tracking
from .pace._pace import AS_GOOD, Cell, CellResult, PaceOptions, measure_pace
from .pace._pace import FIGURES as PACE_FIGURES
from .pace._pace import WINDOWS as PACE_WINDOWS
from .qemu._qemu import Migration, QemuOptions, QemuResult, Target, measure_qemu, targets_of
from .qemu._qemu_guest import find_guest
from .qemu._qemu_methods import METHODS as QEMU_METHODS
from .qemu._qemu_methods import USUAL as USUAL_QEMU_METHODS
from .restore._plot import plot_restore
from .restore._restore import RestoreResult, measure_restore
from .restore._what import RESTORE_ROWS, Figure, GuestKind, RestoreOptions
from .workload._least import Least
from .workload._traces import TRACES
from .workload._tracing import DATA, trace_program
from .workload._workload import (
    ORDERS,
    USUAL_WORK_US,
    WorkloadOptions,
    WorkloadResult,
    WorkloadTarget,
    least_possible,
    measure_workload,
    workload_targets,
)
from .workload._workload_plot import plot_workload

__all__ = [
    "AS_GOOD",
    "CONTENTS",
    "DATA",
    "ENCODINGS",
    "FLOORS",
    "LIMIT_SECONDS",
    "MOST_BESIDE",
    "ORDERS",
    "PACE_FIGURES",
    "PACE_WINDOWS",
    "PLACEMENTS",
    "QEMU_METHODS",
    "RESTORE_ROWS",
    "SOURCES",
    "TRACES",
    "USUAL_QEMU_METHODS",
    "USUAL_WORK_US",
    "Cell",
    "CellResult",
    "EncodingOptions",
    "EncodingResult",
    "EncodingTarget",
    "FaultOptions",
    "FaultResult",
    "Figure",
    "GuardOptions",
    "GuardResult",
    "GuestKind",
    "HostileOptions",
    "HostileResult",
    "Least",
    "Migration",
    "NullResult",
    "PaceOptions",
    "QemuOptions",
    "QemuResult",
    "RdmaOptions",
    "RdmaResult",
    "RestoreOptions",
    "RestoreResult",
    "Sample",
    "ScaleOptions",
    "ScaleResult",
    "Source",
    "StreamOptions",
    "StreamResult",
    "Target",
    "TlsOptions",
    "TlsResult",
    "TrackOptions",
    "TrackResult",
    "WorkloadOptions",
    "WorkloadResult",
    "WorkloadTarget",
    "encoding_targets",
    "environment",
    "find_guest",
    "least_possible",
    "measure_encodings",
    "measure_faults",
    "measure_guard",
    "measure_hostile",
    "measure_null",
    "measure_pace",
    "measure_qemu",
    "measure_rdma",
    "measure_restore",
    "measure_scale",
    "measure_streams",
    "measure_tls",
    "measure_tracking",
    "measure_workload",
    "median",
    "plot_latencies",
    "plot_restore",
    "plot_work",
    "plot_workload",
    "serve_floors",
    "targets_of",
    "trace_program",
    "workload_targets",
]

"""How fast a process writes to its memory, how much it works on, and what that means for moving it:
the library behind ``pagenet-dirty``.

::

    _memory.py    the memory to watch: of a process, or of a QEMU
    _watching.py  a bitmap of the written pages each second
    _history.py   rates, and working sets over windows
    _forecast.py  what a migration over a given link would take
    _recorded.py  the bitmaps on disk
    _plot.py      a picture of them
    _qemu.py      what QEMU itself says
"""

from __future__ import annotations

from ._forecast import Forecast, forecast
from ._history import WINDOWS, Figures, History, Second
from ._memory import WatchedMemory, memory_of, memory_of_qemu, parse_range
from ._plot import plot_figures
from ._qemu import ask_forever
from ._recorded import DirtyRecorder, DirtyRecording, dirty_file, load_dirty, write_dirty
from ._watching import EARLY, Watch, watch

__all__ = [
    "EARLY",
    "WINDOWS",
    "DirtyRecorder",
    "DirtyRecording",
    "Figures",
    "Forecast",
    "History",
    "Second",
    "Watch",
    "WatchedMemory",
    "ask_forever",
    "dirty_file",
    "forecast",
    "load_dirty",
    "memory_of",
    "memory_of_qemu",
    "parse_range",
    "plot_figures",
    "watch",
    "write_dirty",
]

"""Other sources of pagenet, as sources of pages for one here.

:class:`PeerSource` is a session with one, in a thread of its own; :class:`PeerBlock` a block of it,
as an origin of :mod:`pagenet.objects`.
"""

from __future__ import annotations

from ._source import PeerBlock, PeerSource

__all__ = ["PeerBlock", "PeerSource"]

"""Other sources of pagenet, as sources of pages for one here.

:class:`PeerSource` is a session with one, in a thread of its own; :class:`PeerBlock` a block of it,
as an origin of :mod:`pagenet.objects`. :class:`Peers` are some that may have the same pages, and
are asked for what they hold; :class:`PeeredObject` is an object for which they are asked first.
"""

from __future__ import annotations

from ._peers import PeeredObject, Peers
from ._source import PeerBlock, PeerSource

__all__ = ["PeerBlock", "PeerSource", "PeeredObject", "Peers"]

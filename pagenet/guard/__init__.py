"""A process that holds descriptors for a daemon, and starts it again if it is killed.

See ``native/guard.c``, which is its program.
"""

from ._guard import Guard, dismiss, follow, guarding

__all__ = ["Guard", "dismiss", "follow", "guarding"]

"""A thread that all of a process shares, and that runs while anything needs it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

__all__ = ["SharedThread"]


class SharedThread(ABC):
    """The thread runs while anything has it open: :meth:`open` it, and close that. Each subclass
    has a thread of its own, which is started when one is made."""

    _lock: ClassVar[threading.Lock]
    _shared: ClassVar[Any]
    _users: ClassVar[int]

    def __init_subclass__(cls) -> None:
        cls._lock, cls._shared, cls._users = threading.Lock(), None, 0

    @classmethod
    def open(cls) -> Self:
        """That of this process."""
        with cls._lock:
            if cls._shared is None:
                cls._shared = cls()
            cls._users += 1
            shared: Self = cls._shared
            return shared

    def close(self) -> None:
        """Call once for each :meth:`open`. The last call ends the thread, and what it does."""
        cls = type(self)
        with cls._lock:
            cls._users -= 1
            if cls._users:
                return
            cls._shared = None
        self._end()

    @abstractmethod
    def _end(self) -> None:
        """End the thread, and wait for its end."""

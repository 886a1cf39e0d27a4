"""What this host can do of what pagenet may use, found out by trying (``pagenet-doctor``)."""

from ._check import Check, Level
from ._examination import examine

__all__ = ["Check", "Level", "examine"]

"""Policy of the destination: in which order pages come that nobody waits for, at which pace, and
from when on."""

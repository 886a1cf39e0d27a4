"""What may be in flight, beside fixed windows: ``pagenet-bench pace``."""

"""Metrics of a daemon, for Prometheus: ``--metrics`` (docs/metrics.md).

prometheus_client and h11 (``pip install 'pagenet[metrics]'``) are needed once metrics are served,
and not before.
"""

from ._address import MetricsAddress, parse_address
from ._endpoint import serve_metrics

__all__ = ["MetricsAddress", "parse_address", "serve_metrics"]

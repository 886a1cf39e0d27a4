"""These tests need an RDMA device: ../test_rdma.py runs them in a guest that has one. Elsewhere
they are not collected."""

from __future__ import annotations

import os

collect_ignore_glob = [] if "PAGENET_RDMA_GUEST" in os.environ else ["test_*.py"]

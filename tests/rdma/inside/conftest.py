"""These tests need an RDMA device: ../test_rdma.py runs them in a guest that has one. Elsewhere they are not collected."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

collect_ignore_glob = [] if "PAGENET_RDMA_GUEST" in os.environ else ["test_*.py"]

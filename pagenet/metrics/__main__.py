"""Prints the dashboard for Grafana, which imports it: ``python -m pagenet.metrics``."""

import sys
from importlib.resources import files

sys.stdout.write(files("pagenet.metrics").joinpath("dashboard.json").read_text())

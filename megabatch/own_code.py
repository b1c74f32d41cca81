"""The folder of megabatch's own code: what a job's snapshot copies, and what ranks on this machine import."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent
"""The package's folder, in a checkout or installed."""

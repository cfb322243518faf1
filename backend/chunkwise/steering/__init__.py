"""Steering: which rank, scale and KV format each chunk of each request gets. Pure; the folder's law is in README.md."""

from chunkwise.steering.controller import SteeringController
from chunkwise.steering.plans import check_sections
from chunkwise.steering.report import ChunkReport, SteeringReport

__all__ = ["ChunkReport", "SteeringController", "SteeringReport", "check_sections"]

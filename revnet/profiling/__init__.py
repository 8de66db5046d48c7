"""Instruments: memory and time of any module's training step, measured and estimated."""

from revnet.profiling.allocator import KEEP_FREED_MEMORY
from revnet.profiling.budget import max_batch, parse_bytes
from revnet.profiling.device import device_name
from revnet.profiling.estimate import estimate
from revnet.profiling.measure import measure, measure_memory, measure_time
from revnet.profiling.measurement import Measurement, Time
from revnet.profiling.memory import Memory
from revnet.profiling.plan import Plan, plan
from revnet.profiling.resident import measure_resident
from revnet.profiling.timeline import MemoryTimeline

__all__ = [
    "KEEP_FREED_MEMORY",
    "Measurement",
    "Memory",
    "MemoryTimeline",
    "Plan",
    "Time",
    "device_name",
    "estimate",
    "max_batch",
    "measure",
    "measure_memory",
    "measure_resident",
    "measure_time",
    "parse_bytes",
    "plan",
]

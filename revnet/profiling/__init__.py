"""Instruments: memory and time of any module's training step."""

from revnet.profiling.measure import Measurement, Memory, Time, measure, measure_memory, measure_time
from revnet.profiling.timeline import MemoryTimeline

__all__ = ["Measurement", "Memory", "MemoryTimeline", "Time", "measure", "measure_memory", "measure_time"]

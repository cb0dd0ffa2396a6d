"""Observers of a pipeline, one file each: verification, timing, dumps, numerical damage."""

from .base import Observer, Step
from .damage import Damage, OutputDamage
from .dump import Dump
from .timing import StepTime, Timing
from .verify import Verify

__all__ = ["Damage", "Dump", "Observer", "OutputDamage", "Step", "StepTime", "Timing", "Verify"]

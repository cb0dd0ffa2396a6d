"""Plans: lowered Programs as a flat list of native steps. ``compile`` makes them, ``runner`` uses them."""

from .compile import Coverage, NoPlan, compile_plan
from .plan_pass import Plan, is_lowered

__all__ = ["Coverage", "NoPlan", "Plan", "compile_plan", "is_lowered"]

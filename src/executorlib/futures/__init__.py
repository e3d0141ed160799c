"""Futures: their class, their use as inputs of calls, and futures made from other futures."""

"""Tests of single modules; those that state properties run the same examples every time."""

from hypothesis import HealthCheck, Phase, settings

# However slow the machine is; and without the search for an explanation, which takes longer than a failed test may.
repeatable = settings(
    derandomize=True,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)

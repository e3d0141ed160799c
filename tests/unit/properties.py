"""Settings of property tests: the same examples every time."""

from hypothesis import HealthCheck, Phase, settings

# However slow the machine is; and without the search for an explanation, which takes longer than a failed test may.
repeatable = settings(
    derandomize=True,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)


def examples(number: int) -> int:
    """As many examples as a property deserves; fewer where a profile has fewer than the usual 100 (`make quick`)."""
    return max(1, number * settings.default.max_examples // 100)

"""Docstrings for users, which are completed from descriptions that are written once."""

from __future__ import annotations

import inspect

import pytest

from executorlib.options import documented


class Described:
    """Has arguments.

    Args:
        one: The first
            of two.
        two: The second.
    """


def test_descriptions_come_in_the_order_of_the_arguments() -> None:
    @documented(Described)
    class Made:
        """Is made.

        Args:
            three: The last.
            two: Another one.

        Raises:
            ValueError: Always.
        """

        def __init__(self, one: int, two: int, three: int) -> None: ...

    assert Made.__doc__ == inspect.cleandoc(
        """Is made.

        Args:
            one: The first
                of two.
            two: Another one.
            three: The last.

        Raises:
            ValueError: Always.
        """
    )


def test_description_of_an_argument_that_is_gone() -> None:
    class Made:
        """Is made.

        Args:
            one: The first.
            tow: The second.
        """

        def __init__(self, one: int, two: int) -> None: ...

    with pytest.raises(TypeError, match="Made has no argument tow, which its docstring describes"):
        documented(Described)(Made)

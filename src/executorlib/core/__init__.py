"""Decides which call runs next and where, which is pure, and carries it out, which is the loop's."""

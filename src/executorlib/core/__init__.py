"""The scheduler, which decides which call runs next and where, and the loop, which carries that out."""

"""The demonstration, `python -m adam_transforms`: a next-word model of Python's own source."""

CONTEXT = 4  # words before the predicted one
NEGATIVES = 1024  # negative samples of one step


class DemoError(Exception):
    """An expected failure of the demonstration, reported to the user in one line."""

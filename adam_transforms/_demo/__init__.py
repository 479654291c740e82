"""The demonstration behind `python -m adam_transforms`: learning to predict Python's own source."""

CONTEXT = 4  # words the model sees before the one it predicts
NEGATIVES = 1024  # words drawn for the sampled softmax of one step


class DemoError(Exception):
    """What keeps the demonstration from going on, told to its user in one line."""

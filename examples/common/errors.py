"""The one error of the examples that is the user's to mend."""


class InputError(ValueError):
    """What was asked for cannot be done; the message is one line that says why."""

"""The one exception that stands for a user's mistake."""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one line that names the value, what is allowed and the remedy. Command lines
    print it and exit with status 2; everything else that goes wrong keeps its traceback.
    """

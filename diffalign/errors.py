"""The one exception a user is meant to see."""


class DiffalignError(Exception):
    """Bad input or an unusable machine: says what was seen, what was expected and what to do next.

    The command line prints the message without a traceback and exits with code 2.
    """


def nearest(name: str, allowed: list[str]) -> str:
    """The allowed name closest to a mistyped one, or an empty string when none is close."""
    import difflib

    matches = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    return matches[0] if matches else ""


def did_you_mean(name: str, allowed: list[str]) -> str:
    """` Did you mean 'x'?` to append to a message, or an empty string when no allowed name is close."""
    close = nearest(name, allowed)
    return f" Did you mean {close!r}?" if close else ""

"""The one exception that a user is meant to read."""


class TocomError(Exception):
    """A problem with what the user gave: one line that names the cause and the fix.

    The command line prints it without a traceback and exits with status 1. What it quotes of files and their names
    cannot break the line, nor make it endless, nor reach a terminal as control characters.
    """

    def __str__(self) -> str:
        """Return it on one line."""
        words = super().__str__().split()
        text = " ".join(word if len(word) < 500 else f"{word[:200]}...{word[-100:]}" for word in words)
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def suggest(word: str, known) -> str:
    """Return `` (did you mean 'x'?)`` for the entry of ``known`` closest to ``word``, or ``''``."""
    from difflib import get_close_matches

    close = get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: Exception) -> str:
    """Return the first line of what an error of a library says, or its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

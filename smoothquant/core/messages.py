"""Error messages in the words of whoever reads them.

A message starts with the name of an argument of the Python function that raised it, such as
"group_size must be >= 1; got 0". A command line has other names for it: `in_words` puts them in,
and `one_line` makes the whole message fit for a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import CheckpointError

# What a command line reports in one line; all other errors are faults of the program.
REPORTED_ERRORS = (
    ValueError, TypeError, CheckpointError, RuntimeError, OSError, ImportError, MemoryError,
)  # fmt: skip

LONGEST = 280  # characters of a message: with the program's name, it stays below 300
LONGEST_WORD = 80  # in a message that is too long

# Arguments of Python functions -> names that commands give them; the first one counts that the
# command has.
ALIASES = {
    "name_or_folder": ("model", "source", "folder", "model_path"),
    "folder": ("source",),
    "n_samples": ("windows",),
    "seq_len": ("seqlen",),
    "seqlen": ("seq_len",),
    "dataset": ("text", "dataset_path"),
    "calibration": ("calibration_path",),
    "num_blocks": ("calibration_blocks",),
    "group_size": ("group_sizes",),
    "salient_prop": ("salient_props",),
    "sort": ("sorts",),
    "backend": ("backends",),
    "recipe": ("recipes",),
    "method": ("methods",),
}

_LEAD = re.compile(r"\w+(?:(?: \+ | and | or |, )\w+)*(?= must\b| needs\b| exclude\b|:)")
# Anything in quotes, a name with an underscore, or a name before "="; not in the middle of a path.
_NAMES = re.compile(
    r"""(?<!\w)'[^']*'|"[^"]*"|(?<![\w./-])(?:[a-z]+(?:_[a-z]+)+(?![\w/-]|\.\w)|[a-z]\w*(?==))"""
)


def option_words(parameters: Iterable[Any]) -> dict[str, str]:
    """Map Python names to the words of a command line.

    Args:
        parameters: the parameters of a Typer command, or the actions of an argparse parser.

    Returns:
        {name of a parameter or of an alias: its long option, or the metavar of an argument}.
    """
    words = {}
    for parameter in parameters:
        name = getattr(parameter, "name", None) or getattr(parameter, "dest", None)
        options = getattr(parameter, "opts", None) or getattr(parameter, "option_strings", None)
        word = max(options or [""], key=len)
        if not word.startswith("-"):
            word = (parameter.metavar or word).strip("[]")
        if name:
            words[name] = word
    for alias, names in ALIASES.items():
        own = [words[name] for name in names if name in words]
        if own and alias not in words:
            words[alias] = own[0]
    return words


def in_words(message: str, words: Mapping[str, str]) -> str:
    """Replace names of arguments in a message by `words`.

    Replaced are the names that the message starts with, names before "=", and names with an
    underscore, which can be no English; never what is quoted.
    """

    def word(match: re.Match[str]) -> str:
        return words.get(match[0], match[0])

    lead = _LEAD.match(message)
    end = lead.end() if lead else 0
    return re.sub(r"\w+", word, message[:end]) + _NAMES.sub(word, message[end:])


@contextmanager
def naming(**words: str) -> Iterator[None]:
    """Replace names of arguments in the message of a ValueError or TypeError from this block."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(in_words(str(error), words)) from error


def one_line(error: BaseException, words: Mapping[str, str] | None = None) -> str:
    """Describe an error in one line of at most `LONGEST` characters, in a command line's words."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:  # without "[Errno 2]"
        file = "" if error.filename is None else f": {error.filename!r}"
        message = f"{error.strerror}{file}"
    return shortened(in_words(message, words or {})) or type(error).__name__


def shortened(message: str) -> str:
    """Fold a message into one printable line and leave out what makes it longer than `LONGEST`."""
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(line) > LONGEST:
        line = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda m: f"{m[0][:50]}...{m[0][-20:]}", line)
    if len(line) > LONGEST:
        line = f"{line[: LONGEST - 65]} ... {line[-60:]}"
    return line

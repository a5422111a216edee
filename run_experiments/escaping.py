"""Text of users in every output format: one function per format, used wherever text is written.

Model names, commands, config values, chip names and error texts may hold any character. JSON files
hold them exactly; every other format shows them through one of these functions. Figures need no
function of their own beyond `visible`: `drawing` turns matplotlib's math text off.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import shlex
import unicodedata
from pathlib import Path
from typing import Any

# Programs that open CSV files take a text that starts like this for a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
STEM_BYTES = 120  # of the 255 that most file systems allow, the rest is for suffixes
# Names that Windows reserves for devices, whatever their suffix.
_RESERVED = re.compile(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)(\.|$)", re.IGNORECASE)
# An underscore within a word is plain text in Markdown.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&~$#]|(?<!\w)_|_(?!\w)")
_INVISIBLE = ("Cc", "Cs", "Zl", "Zp")  # controls, lone surrogates, line and paragraph separators
# Characters that turn the direction of the text around them.
_TURNING = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""Return the text on one line, with escapes such as \n for characters that have no shape."""
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in _INVISIBLE or _TURNING.match(c)
        else c
        for c in text
    )


def encodable(text: str) -> str:
    """Return the text with an escape for each lone surrogate, which UTF-8 cannot hold."""
    return text.encode(errors="backslashreplace").decode()


def for_html(text: str) -> str:
    """Escape text for HTML, inside elements and attributes, and for the labels of plotly."""
    return html.escape(visible(text))


def for_script(value: Any) -> str:
    """Return JSON that a script element can hold: no "<" may end it, or start a comment in it."""
    return json.dumps(value).replace("<", "\\u003c")


def for_markdown(text: str) -> str:
    """Escape text for a Markdown paragraph, heading or table cell."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(text))


def for_csv(value: Any) -> Any:
    """Return a CSV field; text that a spreadsheet would compute gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    formula = text.startswith(FORMULA_STARTS) or text[:1].isspace()
    return f"'{text}" if formula else text


def for_shell(words: list[str]) -> str:
    """Return a shell command of one printable line that passes exactly these words."""
    return " ".join(
        shlex.quote(word)
        if word == visible(word)
        else "$'" + "".join(map(_shell_byte, os.fsencode(word))) + "'"
        for word in words
    )


def _shell_byte(byte: int) -> str:
    plain = 0x20 <= byte < 0x7F and byte not in b"'\\"
    return chr(byte) if plain else f"\\x{byte:02x}"


def short_name(model_name: str) -> str:
    """Return the last part of a model's path or id, for titles."""
    return Path(os.path.abspath(model_name)).name or "model"


def file_stem(model_name: str) -> str:
    """Return the start of file names for a model: `file_name` of its `short_name`."""
    return file_name(short_name(model_name))


def file_name(name: str) -> str:
    """Return a name for a file that any file system takes, without a suffix.

    A name that must change gets a digest, so that two names never share a file.
    """
    safe = re.sub(r'[<>:"/\\|?*]', "_", visible(name))
    safe = re.sub(r"^[-. ]|[. ]$", "_", safe)
    if _RESERVED.match(safe):
        safe = f"_{safe}"
    if len(safe.encode()) > STEM_BYTES:
        safe = safe.encode()[:STEM_BYTES].decode(errors="ignore")
    if safe == name:
        return name
    return f"{safe}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"

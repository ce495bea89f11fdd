"""The text of a shell (sh, cmd or PowerShell) as commands of words.

    split_commands('accelerate launch a.py ^\\n --vae="D:\\my files\\vae.safetensors"')
    -> [Command(("accelerate", "launch", "a.py", "--vae=D:\\my files\\vae.safetensors"))]

Quotes, continued lines, comments, several commands and variables that the text itself sets are
read; what else a shell can do is refused by name. Nothing is ever run. Every text is rewritten in
the quotes of sh, and `shlex` splits that.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from anima_fast.errors import UserError

# Set by every shell; others might hold passwords.
_FOLDERS = ("HOME", "USERPROFILE", "PWD")
# A drive letter, a cmd or PowerShell continuation, or a batch file's own words.
_WINDOWS = re.compile(
    r"(?m)(?<![A-Za-z])[A-Za-z]:\\|\.\.?\\\w|[\^`][ \t]*$|^\s*@?echo off|^\s*@?set \w+=|\$env:"
)
_CONTINUED = re.compile(r"[ \t]*[\\^`][ \t]*\r?\n[ \t]*")
# Remarks of cmd, lines that only print, and the exclamation mark before a notebook's command.
_IGNORED = re.compile(
    r"(?mi)^[ \t]*(?:@?(?:rem\b|::).*"
    r"|@?(?:echo|write-host|printf|title|pause|color)\b(?!.*\.py\b).*|!)"
)
_START = r"(?mi)(?:^|;|&&)\s*"
# What is refused -> how it looks, quotes and comments aside.
_REFUSED = {
    "an array": r"(?m)^\s*(?:[a-z]+\s+(?:-\w+\s+)*)?\w+\+?=\(|=\s*@\(|\$\{\w+\[",
    "a condition (if, case)": rf"{_START}(?:\}}\s*)?(?:if|elif|elseif|else|case|switch)\b",
    "a loop": rf"{_START}(?:for|foreach|while|until)\b",
    "the output of another command, as in $(...)": r"\$\(|`\w[^`\n]*`",
    "an expansion such as ${NAME:-value}": r"\$\{(?!env:)(?:\w+[^\w}\[]|[^\w{])",
    "a function": rf"{_START}(?:function\s+[\w-]+|\w+\s*\(\))\s*\{{",
    "a jump (goto)": rf"{_START}goto\b",
    "a here-document": r"<<",
    "a shell within the shell": r"\b(?:ba|z|da)?sh\s+-\w*c\b|\bcmd(?:\.exe)?\s+/[ck]\b",
}
# What a shell reads inside double quotes too.
_EXPANSION = re.compile(r"(?<![\\`])(?:\$\([^)]*\)?|\$\{[^}]*\}?)|`[^`\n]*`")
# The variables of cmd are put in before a line is read, also into quotes.
_PERCENT = re.compile(r"%(?P<name>[A-Za-z_]\w*)%|%(?P<script>~dp0)")
_CMD_SET = re.compile(r"(?i)\s*@?set\s+(\")?(?P<name>[A-Za-z_]\w*)=(?P<value>.*?)(?(1)\"\s*)")
# Stand for a dollar sign in single and in double quotes, a space in a value, the end of a command.
_LITERAL, _QUOTED, _SPACE, _END = "\ue000", "\ue001", "\ue002", "\ue003"
_VARIABLE = re.compile(
    rf"(?P<dollar>[${_QUOTED}])(?:\{{(?:env:)?(?P<braced>[A-Za-z_]\w*)\}}|(?:env:)?(?P<plain>[A-Za-z_]\w*))"
)
_SET = re.compile(
    rf"(?:\$(?:env:)?)?(?P<name>[A-Za-z_]\w*){_SPACE}?(?P<add>\+?)={_SPACE}?(?P<value>.*)",
    re.DOTALL,
)
_PS_SET = re.compile(r"(?m)^\s*\$(?:env:)?\w+\s*\+?=")
_DECLARES = ("export", "local", "readonly", "declare", "typeset")
# Inside double quotes, what a backslash or a backtick before it makes a plain character.
_ESCAPE = {
    False: re.compile(r'\\(?P<of>["$`\\])'),
    True: re.compile(r'`(?P<of>["$`])|\\(?P<quote>")'),
}


def _pieces(windows: bool) -> re.Pattern[str]:
    """What has a meaning of its own in a line; everything else is part of a plain word."""
    # In "D:\folder\" the last backslash belongs to the path.
    path = r'`["$`]|`(?!["$`])|\\"(?!\s|$)|\\(?!"(?!\s|$))|[^"`\\]'
    inside = path if windows else r'\\.|[^"\\]'
    return re.compile(
        rf"\"(?P<double>(?:{inside})*)\"|'(?P<single>[^']*)'|(?P<comment>(?<!\S)#[^\n]*)"
        r"|(?P<redirection>(?<!\S)[\d&]?[<>]>?\s*(?:&\d|\"[^\"]*\"|'[^']*'|[^\s;|&]+))"
        r"|(?P<end>&&|\|\|?|;|\n|&(?=\s|$))"
        # A continuation mark whose line break was lost in copying.
        r"|(?P<lost>(?<!\S)[\\^`](?=\s|$))"
        r"|(?P<escape>[\\`])(?P<of>.?)|(?P<open>[\"'])",
        re.DOTALL,
    )


_PIECES = {windows: _pieces(windows) for windows in (False, True)}


@dataclass(frozen=True)
class Command:
    """One command: its words without quotes, the folder that a `cd` before it went to, and what
    was exported before it and is used nowhere in the text itself."""

    words: tuple[str, ...]
    folder: str | None = None
    exported: Mapping[str, str] = field(default_factory=dict)


def split_commands(text: str, script_folder: Path | None = None) -> list[Command]:
    """The commands of a text; lines that only set variables or change the folder are none.

    Args:
        text: a script or a command line.
        script_folder: where the script is, which `%~dp0` and `$PSScriptRoot` stand for.
    Raises:
        UserError: a quote that is never closed, or a construct that is refused.
    """
    return _Script(text, script_folder).commands


def variable_names(text: str) -> list[str]:
    """Names of the shell variables in a text."""
    found = [match["braced"] or match["plain"] for match in _VARIABLE.finditer(text)]
    return [*found, *(match["name"] for match in _PERCENT.finditer(text) if match["name"])]


class _Script:
    """Reads a text, and keeps what it sets; names of variables are in small letters."""

    def __init__(self, text: str, folder: Path | None) -> None:
        self.windows = bool(_WINDOWS.search(text))
        text = _IGNORED.sub("", _CONTINUED.sub(" ", text.replace("\r\n", "\n")))
        _refuse(text, self.windows)
        self.variables = {n.lower(): os.environ[n] for n in _FOLDERS if n in os.environ}
        if folder is not None:
            self.variables |= {"~dp0": f"{folder}{os.sep}", "psscriptroot": str(folder)}
        self.used = {name.lower() for name in variable_names(_PS_SET.sub("", text))}
        self.exported: dict[str, str] = {}
        self.folder: str | None = None
        self.commands: list[Command] = []
        words = shlex.split(self._in_quotes_of_sh(self._percent(text)))
        for is_end, command in itertools.groupby(words, _END.__eq__):
            if not is_end:
                self._command(list(command))

    def _percent(self, text: str) -> str:
        """The text with cmd's variables put in, without the lines that set them."""
        lines = []
        for line in text.split("\n") if self.windows else [text]:
            if self.windows:
                line = _PERCENT.sub(lambda m: self._value(m["name"] or m["script"], m[0]), line)
            if match := _CMD_SET.fullmatch(line):
                self._set(match["name"], match["value"], exports=True)
            else:
                lines.append(line)
        return "\n".join(lines)

    def _in_quotes_of_sh(self, text: str) -> str:
        """The text as `shlex` reads it: marks for what is more than a word, quotes of sh."""

        def rewritten(match: re.Match[str]) -> str:
            if (inside := match["double"]) is not None:
                escape = _ESCAPE[self.windows]
                inside = escape.sub(lambda m: _escaped(m[m.lastgroup or 0]), inside)
                return shlex.quote(inside.replace("$", _QUOTED))
            if (inside := match["single"]) is not None:
                return shlex.quote(inside.replace("$", _LITERAL))
            if match["end"]:
                return f" {_END} "
            if match["escape"]:
                # A backslash before a letter is part of a Windows path even where nothing else is.
                kept = match["escape"] == "\\" and (
                    self.windows or re.match(r"[\w./-]", match["of"])
                )
                return (
                    shlex.quote("\\") + match["of"] if kept else shlex.quote(_escaped(match["of"]))
                )
            if quote := match["open"]:
                start = match.string[match.end() : match.end() + 30]
                raise UserError(
                    f"the quote {quote} before {start!r} is never closed: put {quote} where the "
                    "text ends"
                )
            return ""

        return _PIECES[self.windows].sub(rewritten, text)

    def _command(self, words: list[str]) -> None:
        if self._sets(words):
            return
        words = [part for word in words for part in self._filled(word)]
        if not words:
            return
        if words[0].lower() in ("cd", "%cd", "pushd", "set-location", "chdir"):
            targets = [word for word in words[1:] if word.lower() not in ("/d", "-path")]
            self.folder = targets[-1] if targets else self.folder
        elif words[0].startswith("--") and self.commands:
            # A line of options whose continuation mark got lost.
            last = self.commands[-1]
            self.commands[-1] = Command((*last.words, *words), last.folder, last.exported)
        else:
            self.commands.append(Command(tuple(words), self.folder, dict(self.exported)))

    def _sets(self, words: list[str]) -> bool:
        """Take in the variables that a command sets, if that is all it does."""
        if words[0].startswith("$"):
            matches = [_SET.fullmatch(_SPACE.join(words))]
            exports = words[0].startswith("$env:")
        else:
            declared = words[0] in _DECLARES
            matches = [_SET.fullmatch(word) for word in words[declared:] if word[0:1] != "-"]
            exports = words[0] == "export"
        if not matches or not all(matches):
            return False
        for match in filter(None, matches):
            before = self._value(match["name"], "") if match["add"] else ""
            value = before + " ".join(self._filled(match["value"]))
            self._set(match["name"], value, exports=exports)
        return True

    def _set(self, name: str, value: str, *, exports: bool) -> None:
        self.variables[name.lower()] = value
        if exports and name.lower() not in self.used:
            self.exported[name] = value

    def _value(self, name: str, otherwise: str) -> str:
        return self.variables.get(name.lower(), otherwise)

    def _filled(self, word: str) -> list[str]:
        """A word with its variables put in: outside quotes, sh makes several words of a value."""

        def value(match: re.Match[str]) -> str:
            found = self._value(match["braced"] or match["plain"], match[0])
            splits = not self.windows and match["dollar"] == "$"
            return found.replace(" ", _SPACE) if splits else found

        filled = _VARIABLE.sub(value, word).replace(_LITERAL, "$").replace(_QUOTED, "$")
        parts = filled.split(_SPACE)
        return parts if self.windows or "$" not in word else [part for part in parts if part]


def _escaped(character: str) -> str:
    return _LITERAL if character == "$" else character


def _acting(match: re.Match[str]) -> str:
    """A piece of a text without what a shell only passes on: quoted words and comments."""
    if match["single"] is not None or match["comment"]:
        return "''"
    if (inside := match["double"]) is not None:
        return '"' + "".join(_EXPANSION.findall(inside)) + '"'
    return match[0]


def _refuse(text: str, windows: bool) -> None:
    """Raise `UserError` for what only running the text could tell."""
    live = _PIECES[windows].sub(_acting, text)
    for name, pattern in _REFUSED.items():
        if match := re.search(pattern, live):
            shown = " ".join(match[0].split())
            raise UserError(
                f"the text has {name}, here {shown!r}, which importing does not follow: paste the "
                "training command itself, as it is run"
            )

"""The text of a shell as commands of words: sh, cmd (batch files) and PowerShell.

    split_commands('accelerate launch a.py ^\\n --vae="D:\\my files\\vae.safetensors"')
    -> [["accelerate", "launch", "a.py", "--vae=D:\\my files\\vae.safetensors"]]

Only what launch lines use is read: quotes, lines continued with \\, ^ or `, comments, several
commands, redirections, and variables that the text itself sets. Nothing is ever run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

from anima_fast.migrate.shell_line import (
    LIST_BREAK,
    OUTPUT,
    PERCENT,
    VARIABLE,
    Line,
    Unclosed,
    fill,
)

# Set by every shell; others might hold passwords.
_FOLDERS = ("HOME", "USERPROFILE", "PWD")
# A drive letter, a cmd or PowerShell continuation, or a batch file's own words.
_WINDOWS = re.compile(
    r"(?m)(?<![A-Za-z])[A-Za-z]:\\|\.\.?\\\w|[\^`][ \t]*$|^\s*@?echo off|^\s*@?set \w+=|\$env:"
    r"|^\s*\$\w+\s*=\s*@\("
)
_CONTINUED = re.compile(r"[ \t]*[\\^`][ \t]*\r?\n[ \t]*")
_DECLARED = r"(?:(?:export|local|readonly|declare|typeset)\s+(?:-\w+\s+)*)?"
_ASSIGNMENT = re.compile(
    # sh: [export] NAME=value; PowerShell: $name = value, $env:NAME = value; cmd: set "NAME=value".
    _DECLARED + r"(?P<sh>[A-Za-z_]\w*)(?P<shadd>\+?)=(?P<shv>.*)"
    r"|\$(?:env:)?(?P<ps>[A-Za-z_]\w*)\s*(?P<psadd>\+?)=\s*(?P<psv>.*)"
    r"|@?set\s+(?P<quote>\")?(?P<cmd>[A-Za-z_]\w*)=(?P<cmdv>.*?)(?(quote)\"\s*)",
    re.IGNORECASE,
)
# sh: NAME=(words) or NAME+=(words); PowerShell: $name = @("word", "word").
_LIST = re.compile(
    rf"(?m)^[ \t]*(?:{_DECLARED}(?P<sh>[A-Za-z_]\w*)(?P<shadd>\+?)=\("
    r"|\$(?P<ps>[A-Za-z_]\w*)\s*(?P<psadd>\+?)=\s*@\()"
)
_LISTED = re.compile(r"\$\{(?P<sh>\w+)\[[@*]\]\}|[@$](?P<ps>\w+)")
_PAIR = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)
# The left side of an assignment in PowerShell.
_SET = re.compile(r"(?m)^\s*\$(env:)?\w+\s*=")
# Lines between these may never run.
_OPENS = {False: re.compile(r"(if|for|while|until|case)\b"), True: re.compile(r".*[{(]$")}
_CLOSES = {False: re.compile(r"(fi|done|esac)\b"), True: re.compile(r"[})]")}
_SHELLS = re.compile(r"(.*/)?(ba|z|da)?sh")


@dataclass(frozen=True)
class Command:
    """One command: its words without quotes, the folder that a `cd` before it went to, and what
    was exported before it and is used nowhere in the text itself."""

    words: tuple[str, ...]
    folder: str | None = None
    exported: Mapping[str, str] = field(default_factory=dict)


def is_windows(text: str) -> bool:
    """Whether backslashes in a text are parts of paths."""
    return bool(_WINDOWS.search(text))


def split_commands(text: str, script_folder: Path | None = None) -> list[Command]:
    """The commands of a text in order, with the variables and lists that it sets put in.

    Args:
        text: a script or a command line.
        script_folder: where the script lies, which `%~dp0` and `$PSScriptRoot` stand for.
    Raises:
        UserError: a quote or a list that is never closed.
    """
    return _Script(text, script_folder).read()


class _Script:
    """Reads a text line by line, and keeps what it sets."""

    def __init__(self, text: str, folder: Path | None) -> None:
        self.windows = is_windows(text)
        self.text = _CONTINUED.sub(" ", text.replace("\r\n", "\n"))
        self.variables = {name: os.environ[name] for name in _FOLDERS if name in os.environ}
        if folder is not None:
            self.variables |= {"~dp0": f"{folder}{os.sep}", "PSScriptRoot": str(folder)}
        self.used = {name.lower() for name in variable_names(_SET.sub("", self.text))}
        self.lists: dict[str, list[str]] = {}
        self.exported: dict[str, str] = {}
        self.folder: str | None = None
        self.commands: list[Command] = []
        self.depth = 0

    def read(self) -> list[Command]:
        for line in _logical_lines(_joined_lists(self.text, self.windows), self.windows):
            is_list = _LIST.match(line)
            if ".py" not in line and not is_list and not _is_closed(line, self.windows):
                continue
            self._count_depth("" if is_list else line)
            if is_list:
                self._set_list(is_list, line)
                continue
            line = fill(line, self.variables, PERCENT) if self.windows else line
            if not self._set(line):
                for words in self._line(line, splits=not self.windows).read():
                    self._command(words)
        return self.commands

    def _line(self, text: str, **how: bool) -> Line:
        return Line(text, self.variables, self.windows, **how)

    def _count_depth(self, line: str) -> None:
        # A block in one line is closed there.
        closed = re.search(r"\b(fi|done|esac)\W*$", line)
        opened = _OPENS[self.windows].match(line) and not closed
        closes = bool(_CLOSES[self.windows].match(line))
        self.depth = max(0, self.depth - closes) + bool(opened)

    def _command(self, words: list[str]) -> None:
        words = self._with_lists(words)
        if words[0].lower() in ("cd", "%cd", "pushd", "set-location", "chdir"):
            targets = [word for word in words[1:] if word.lower() not in ("/d", "-path")]
            self.folder = targets[-1] if targets else self.folder
        elif words[0].startswith("--") and self.commands:
            # A line of options whose continuation mark got lost.
            last = self.commands[-1]
            self.commands[-1] = replace(last, words=(*last.words, *words))
        elif not self.windows and (pairs := _pairs(words)):
            for name, value in pairs.items():
                self._keep({name: fill(value, self.variables)})
        elif inner := _inner(words):
            self.commands += split_commands(inner)
        else:
            self.commands.append(Command(tuple(words), self.folder, dict(self.exported)))

    def _keep(self, found: dict[str, str]) -> None:
        # Under a condition only what has no value yet gets one.
        self.variables |= {
            k: v for k, v in found.items() if not self.depth or k not in self.variables
        }

    def _set(self, line: str) -> bool:
        """Take in the variable that a line sets, if that is all it does."""
        match = _ASSIGNMENT.fullmatch(line.rstrip(";"))
        found = _assigned(match, self.variables, self.windows) if match else {}
        for name, value in found.items():
            if match["shadd"] or match["psadd"]:
                self._add(name, value)
            else:
                self._keep({name: value})
        if line.lower().startswith(("export ", "$env:", "set ", "@set ")):
            self.exported |= {k: v for k, v in found.items() if k.lower() not in self.used}
        return bool(found)

    def _add(self, name: str, value: str) -> None:
        if self.depth:
            return
        if name.lower() in self.lists:
            self.lists[name.lower()].append(value)
        else:
            self.variables[name] = self.variables.get(name, "") + value

    def _set_list(self, match: re.Match, line: str) -> None:
        reader = self._line(line[match.end() :], splits=not self.windows, in_list=True)
        words = self._with_lists(next(iter(reader.read()), []))
        name, adds = (match["sh"] or match["ps"]).lower(), match["shadd"] or match["psadd"]
        if adds and not self.depth:
            self.lists[name] = [*self.lists.get(name, []), *words]
        elif not adds and (not self.depth or name not in self.lists):
            self.lists[name] = words

    def _with_lists(self, words: list[str]) -> list[str]:
        """`${NAME[@]}` of sh, `@name` and `$name` of PowerShell, as the words of the list."""
        out = []
        for word in words:
            match = _LISTED.fullmatch(word)
            name = match and (match["sh"] or (self.windows and match["ps"]) or "").lower()
            out += self.lists.get(name, [word]) if name else [word]
        return out or words


def _joined_lists(text: str, windows: bool) -> str:
    """The text with every list in one line."""
    at, parts = 0, []
    while match := _LIST.search(text, at):
        reader = Line(text[match.end() :].replace("\n", LIST_BREAK), {}, windows, in_list=True)
        reader.read()
        end = match.end() + reader.at
        parts += [text[at : match.end()], text[match.end() : end].replace("\n", LIST_BREAK)]
        at = end
    return "".join([*parts, text[at:]])


def _pairs(words: list[str]) -> dict[str, str]:
    """The variables of `A=1` or `export A=1 B=2`; nothing where a command stands among them."""
    declared = words[0] in ("export", "local", "readonly", "declare", "typeset")
    matches = [_PAIR.fullmatch(word) for word in words[declared:] if not word.startswith("-")]
    return {m["name"]: m["value"] for m in matches} if matches and all(matches) else {}


def _inner(words: list[str]) -> str:
    """The text of `bash -c "text"`, "" for other commands."""
    for before, word, after in zip(words, words[1:], words[2:], strict=False):
        if _SHELLS.fullmatch(before) and re.fullmatch(r"-\w*c", word):
            return after
    return ""


def _logical_lines(text: str, windows: bool) -> Iterator[str]:
    """Lines that are no comments; quotes may go on over several."""
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        # Notebooks start a command with an exclamation mark.
        first = lines[at].strip().lstrip("!")
        at += 1
        if not first or _is_comment(first):
            continue
        longer = accumulate([first, *lines[at:]], "{}\n{}".format)
        more = next((i for i, text in enumerate(longer) if _is_closed(text, windows)), None)
        # An apostrophe that nothing closes, as in `echo it's done`, is no quote of many lines.
        yield "\n".join([first, *lines[at : at + more]]) if more else first
        at += more or 0


def _is_closed(text: str, windows: bool) -> bool:
    try:
        Line(text, {}, windows).read()
    except Unclosed:
        return False
    return True


def variable_names(text: str) -> list[str]:
    """Names of the shell variables that stand in a text; of `$(date)` the whole."""
    names = [next(filter(None, m.groups())) for m in VARIABLE.finditer(OUTPUT.sub("", text))]
    return [*names, *(match[0][1:] for match in OUTPUT.finditer(text))]


def option_names(text: str) -> list[str]:
    """The words in a text that look like --options, without those in comments."""
    lines = (line.strip().split(" #")[0] for line in text.splitlines())
    code = "\n".join(line for line in lines if not _is_comment(line))
    return re.findall(r"(?<![\w-])--([A-Za-z]\w*)", code)


def _is_comment(line: str) -> bool:
    return line.startswith(("#", "::")) or line.lower().lstrip("@").split(" ")[0] == "rem"


def _assigned(match: re.Match, variables: Mapping[str, str], windows: bool) -> dict[str, str]:
    """The variable of an assignment; nothing for `NAME=value command ...`."""
    if match["cmd"]:
        return {match["cmd"]: fill(match["cmdv"], variables)}
    name, value = (match["sh"], match["shv"]) if match["sh"] else (match["ps"], match["psv"])
    words = Line(value, variables, windows).read()
    # It is set for that command only; PowerShell's arrays are kept as text.
    if len(words) > 1 or (words and len(words[0]) > 1):
        return {} if match["sh"] else {name: " ".join(words[0])}
    return {name: words[0][0] if words and words[0] else ""}

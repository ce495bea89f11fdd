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

from anima_fast.errors import UserError

# Set by every shell; others might hold passwords.
_FOLDERS = ("HOME", "USERPROFILE", "PWD")
# A drive letter, a cmd or PowerShell continuation, or a batch file's own words.
_WINDOWS = re.compile(
    r"(?m)(?<![A-Za-z])[A-Za-z]:\\|\.\.?\\\w|[\^`][ \t]*$|^\s*@?echo off|^\s*@?set \w+=|\$env:"
)
_CONTINUED = re.compile(r"[ \t]*[\\^`][ \t]*\r?\n[ \t]*")
_ASSIGNMENT = re.compile(
    # sh: [export] NAME=value; PowerShell: $name = value, $env:NAME = value; cmd: set "NAME=value".
    r"(?:export\s+)?(?P<sh>[A-Za-z_]\w*)=(?P<shv>.*)"
    r"|\$(?:env:)?(?P<ps>[A-Za-z_]\w*)\s*=\s*(?P<psv>.*)"
    r"|@?set\s+(?P<quote>\")?(?P<cmd>[A-Za-z_]\w*)=(?P<cmdv>.*?)(?(quote)\"\s*)",
    re.IGNORECASE,
)
# The left side of an assignment in PowerShell.
_SET = re.compile(r"(?m)^\s*\$(env:)?\w+\s*=")
# The variables of cmd are put in before a line is read, also into quotes.
_PERCENT = re.compile(r"%(?P<cmd>[A-Za-z_]\w*)%|%(?P<script>~dp0)")
_VARIABLE = re.compile(
    # ${name:-default} may have another variable in its default.
    r"\$\{(?:env:)?(?P<braced>[A-Za-z_]\w*|\d)(?::?[-=](?P<default>(?:[^{}]|\$\{[^{}]*\})*))?\}"
    r"|\$(?:env:)?(?P<plain>[A-Za-z_]\w*)|" + _PERCENT.pattern
)
# What a command prints, which is not known here.
_OUTPUT = re.compile(r"\$\([^()]*\)")
# Lines between these may never run.
_OPENS = {False: re.compile(r"(if|for|while|until|case)\b"), True: re.compile(r".*[{(]$")}
_CLOSES = {False: re.compile(r"(fi|done|esac)\b"), True: re.compile(r"[})]")}
_REDIRECTION = re.compile(r"\d?>>?(&\d)?|<|&>")
_SEPARATOR = re.compile(r"&&|\|\|?|;|&(?=\s)")
# A continuation mark whose line break was lost in copying, or PowerShell's call operator.
_LOST_MARK = re.compile(r"[\\^`&](?=\s|$)")


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


def split_commands(text: str) -> list[Command]:
    """The commands of a text in order, with the variables that it sets put in.

    Raises:
        UserError: a quote that is never closed.
    """
    windows = is_windows(text)
    text = _CONTINUED.sub(" ", text.replace("\r\n", "\n"))
    variables = {name: os.environ[name] for name in _FOLDERS if name in os.environ}
    used = {name.lower() for name in variable_names(_SET.sub("", text))}
    exported: dict[str, str] = {}
    folder: str | None = None
    commands: list[Command] = []
    depth = 0
    for line in _logical_lines(text, windows):
        if ".py" not in line and not _is_closed(line, windows):
            continue
        # A block in one line is closed there.
        opened = _OPENS[windows].match(line) and not re.search(r"\b(fi|done|esac)\W*$", line)
        depth = max(0, depth - bool(_CLOSES[windows].match(line))) + bool(opened)
        line = _fill(line, variables, _PERCENT) if windows else line
        if found := _assigned(line, variables, windows):
            # Under a condition only what has no value yet gets one.
            variables |= {k: v for k, v in found.items() if not depth or k not in variables}
            if line.lower().startswith(("export ", "$env:", "set ", "@set ")):
                exported |= {k: v for k, v in found.items() if k.lower() not in used}
            continue
        for words in _Line(line, variables, windows, splits=not windows).read():
            if words[0].lower() in ("cd", "%cd", "pushd", "set-location", "chdir"):
                targets = [word for word in words[1:] if word.lower() not in ("/d", "-path")]
                folder = targets[-1] if targets else folder
            elif words[0].startswith("--") and commands:
                # A line of options whose continuation mark got lost.
                last = commands[-1]
                commands[-1] = replace(last, words=(*last.words, *words))
            else:
                commands.append(Command(tuple(words), folder, dict(exported)))
    return commands


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
        _Line(text, {}, windows).read()
    except _Unclosed:
        return False
    return True


def variable_names(text: str) -> list[str]:
    """Names of the shell variables that stand in a text; of `$(date)` the whole."""
    names = [next(filter(None, m.groups())) for m in _VARIABLE.finditer(_OUTPUT.sub("", text))]
    return [*names, *(match[0][1:] for match in _OUTPUT.finditer(text))]


def option_names(text: str) -> list[str]:
    """The words in a text that look like --options, without those in comments."""
    lines = (line.strip().split(" #")[0] for line in text.splitlines())
    code = "\n".join(line for line in lines if not _is_comment(line))
    return re.findall(r"(?<![\w-])--([A-Za-z]\w*)", code)


def _is_comment(line: str) -> bool:
    return line.startswith(("#", "::")) or line.lower().lstrip("@").split(" ")[0] == "rem"


def _assigned(line: str, variables: Mapping[str, str], windows: bool) -> dict[str, str]:
    """The variable that a line sets, if that is all it does."""
    match = _ASSIGNMENT.fullmatch(line.rstrip(";"))
    if match is None:
        return {}
    if match["cmd"]:
        return {match["cmd"]: _fill(match["cmdv"], variables)}
    name, value = (match["sh"], match["shv"]) if match["sh"] else (match["ps"], match["psv"])
    words = _Line(value, variables, windows).read()
    # `NAME=value command ...` sets it for that command only; PowerShell's arrays are kept as text.
    if len(words) > 1 or (words and len(words[0]) > 1):
        return {} if match["sh"] else {name: " ".join(words[0])}
    return {name: words[0][0] if words and words[0] else ""}


def _fill(text: str, variables: Mapping[str, str], pattern: re.Pattern = _VARIABLE) -> str:
    by_lower = {key.lower(): value for key, value in variables.items()}

    def value(match: re.Match) -> str:
        found = by_lower.get(next(filter(None, match.groups())).lower())
        default = match.groupdict().get("default")
        if default is not None and not found:
            return _fill(default.strip("\"'"), variables)
        return match[0] if found is None else found

    return pattern.sub(value, text)


class _Unclosed(UserError):
    """A quote is not closed in a line."""


class _Line:
    """Reads one line, character by character, into commands of words."""

    def __init__(
        self, text: str, variables: Mapping[str, str], windows: bool, splits: bool = False
    ) -> None:
        self.text, self.variables, self.windows, self.splits = text, variables, windows, splits
        self.at = 0
        self.word: list[str] | None = None
        self.skip_next = False
        self.commands: list[list[str]] = [[]]

    def read(self) -> list[list[str]]:
        """The commands of the line; empty ones are left out."""
        while self.at < len(self.text):
            if self.text[self.at] == "#" and self.word is None:
                break
            self._step(self.text[self.at :])
        self._end_word()
        return [words for words in self.commands if words]

    def _step(self, rest: str) -> None:
        if rest[0].isspace():
            self._end_word()
            self.at += 1
        elif self.word is None and _LOST_MARK.match(rest):
            self.at += 1
        elif separator := _SEPARATOR.match(rest):
            self._end_word()
            self.commands.append([])
            self.at += separator.end()
        elif self.word is None and (mark := _REDIRECTION.match(rest)):
            # `2>&1` is whole, `> log.txt` takes the next word along.
            self.skip_next = mark[1] is None
            self.at += mark.end()
        elif rest[0] in "\"'":
            self._quoted(rest[0])
        elif len(rest) > 1 and self._escaped(rest):
            self._append(rest[1], 2)
        elif output := _OUTPUT.match(rest):
            self._append(output[0], output.end())
        elif variable := _VARIABLE.match(rest):
            self._put_in(_fill(variable[0], self.variables))
            self.at += variable.end()
        else:
            self._append(rest[0], 1)

    def _append(self, part: str, read: int) -> None:
        self.word = [*(self.word or []), part]
        self.at += read

    def _put_in(self, value: str) -> None:
        """A variable outside quotes: sh makes several words of it, or none."""
        parts = value.split(" ") if self.splits and "$(" not in value else [value]
        for i, part in enumerate(parts):
            if i:
                self._end_word()
            if part or not self.splits:
                self._append(part, 0)

    def _end_word(self) -> None:
        if self.word is not None:
            if not self.skip_next:
                self.commands[-1].append("".join(self.word))
            self.word, self.skip_next = None, False

    def _escaped(self, rest: str) -> bool:
        """Whether the first character takes its meaning from the second, outside quotes."""
        if rest[0] == "`":
            return True
        plain = rest[1].isalnum() or rest[1] in "_./-"
        return rest[0] == "\\" and not self.windows and not plain

    def _quoted(self, quote: str) -> None:
        start, out = self.at, []
        self.at += 1
        while self.at < len(self.text):
            rest = self.text[self.at :]
            if rest[0] == quote:
                text = "".join(out)
                self._append(text if quote == "'" else _fill(text, self.variables), 1)
                return
            escaped = quote == '"' and len(rest) > 1 and self._escaped_in_quotes(rest)
            out.append(rest[escaped])
            self.at += 1 + escaped
        raise _Unclosed(
            f"the quote {quote} before {self.text[start + 1 : start + 31]!r} is never closed: put "
            f"{quote} where the text ends"
        )

    def _escaped_in_quotes(self, rest: str) -> bool:
        if not self.windows:
            return rest[0] == "\\" and rest[1] in '"$`\\'
        # In "D:\\folder\\" the last backslash belongs to the path.
        closing = not rest[2:3].strip()
        return (rest[0] == "`" and rest[1] in '"$`') or (rest[:2] == '\\"' and not closing)

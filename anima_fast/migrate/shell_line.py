"""One line of a shell, read character by character into commands of words."""

from __future__ import annotations

import re
from collections.abc import Mapping

from anima_fast.errors import UserError

# The variables of cmd are put in before a line is read, also into quotes.
PERCENT = re.compile(r"%(?P<cmd>[A-Za-z_]\w*)%|%(?P<script>~dp0)")
VARIABLE = re.compile(
    # ${name:-default} may have another variable in its default.
    r"\$\{(?:env:)?(?P<braced>[A-Za-z_]\w*|\d)(?::?[-=](?P<default>(?:[^{}]|\$\{[^{}]*\})*))?\}"
    r"|\$(?:env:)?(?P<plain>[A-Za-z_]\w*)|" + PERCENT.pattern
)
# What a command prints, which is not known here.
OUTPUT = re.compile(r"\$\([^()]*\)")
# Stands for the line breaks inside a list, which is read as one line.
LIST_BREAK = "\v"
# How far a variable or the output of a command reaches at most.
_AHEAD = 2000
_REDIRECTION = re.compile(r"\d?>>?(&\d)?|<|&>")
_SEPARATOR = re.compile(r"&&|\|\|?|;|&(?=\s)")
# A continuation mark whose line break was lost in copying, or PowerShell's call operator.
_LOST_MARK = re.compile(r"[\\^`&](?=\s|$)")


def fill(text: str, variables: Mapping[str, str], pattern: re.Pattern = VARIABLE) -> str:
    """A text with the variables that are known put in."""
    by_lower = {key.lower(): value for key, value in variables.items()}

    def value(match: re.Match) -> str:
        found = by_lower.get(next(filter(None, match.groups())).lower())
        default = match.groupdict().get("default")
        if default is not None and not found:
            return fill(default.strip("\"'"), variables)
        return match[0] if found is None else found

    return pattern.sub(value, text)


class Unclosed(UserError):
    """A quote is not closed in a line, or a list."""


class Line:
    """Reads one line; with `in_list` the inside of a list up to its closing bracket.

    Attributes:
        at: where the reader is; behind the bracket of a list that was read.
    """

    def __init__(
        self,
        text: str,
        variables: Mapping[str, str],
        windows: bool,
        *,
        splits: bool = False,
        in_list: bool = False,
    ) -> None:
        self.text, self.variables, self.windows, self.splits = text, variables, windows, splits
        self.in_list = in_list
        self.at = 0
        self.word: list[str] | None = None
        self.skip_next = False
        self.commands: list[list[str]] = [[]]

    def read(self) -> list[list[str]]:
        """The commands of the line; empty ones are left out."""
        while self.at < len(self.text):
            if self.text[self.at] == "#" and self.word is None:
                if not self.in_list:
                    break
                self.at = (self.text + LIST_BREAK).index(LIST_BREAK, self.at)
            elif self.in_list and self.text[self.at] == ")":
                self.at += 1
                break
            else:
                self._step(self.text[self.at : self.at + _AHEAD])
        else:
            if self.in_list:
                raise Unclosed("a list is never closed: put ) at its end")
        self._end_word()
        return [words for words in self.commands if words]

    def _step(self, rest: str) -> None:
        if rest[0].isspace() or (rest[0] == "," and self.in_list and self.windows):
            self._end_word()
            self.at += 1
        elif self.word is None and _LOST_MARK.match(rest):
            self.at += 1
        elif not self.in_list and (separator := _SEPARATOR.match(rest)):
            self._end_word()
            self.commands.append([])
            self.at += separator.end()
        elif self.word is None and not self.in_list and (mark := _REDIRECTION.match(rest)):
            # `2>&1` is whole, `> log.txt` takes the next word along.
            self.skip_next = mark[1] is None
            self.at += mark.end()
        elif rest[0] in "\"'":
            self._quoted(rest[0])
        elif len(rest) > 1 and self._escaped(rest):
            self._append(rest[1], 2)
        elif output := OUTPUT.match(rest):
            self._append(output[0], output.end())
        elif variable := VARIABLE.match(rest):
            self._put_in(fill(variable[0], self.variables))
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
            rest = self.text[self.at : self.at + 3]
            if rest[0] == quote:
                text = "".join(out)
                self._append(text if quote == "'" else fill(text, self.variables), 1)
                return
            escaped = quote == '"' and len(rest) > 1 and self._escaped_in_quotes(rest)
            out.append(rest[escaped])
            self.at += 1 + escaped
        raise Unclosed(
            f"the quote {quote} before {self.text[start + 1 : start + 31]!r} is never closed: put "
            f"{quote} where the text ends"
        )

    def _escaped_in_quotes(self, rest: str) -> bool:
        if not self.windows:
            return rest[0] == "\\" and rest[1] in '"$`\\'
        # In "D:\\folder\\" the last backslash belongs to the path.
        closing = not rest[2:3].strip()
        return (rest[0] == "`" and rest[1] in '"$`') or (rest[:2] == '\\"' and not closing)

"""The tables of options in the documentation: `python -m anima_fast.options.docs_table`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from anima_fast.options.declare import Spec, specs
from anima_fast.options.finetune import network_options
from anima_fast.options.other_names import ALIASES, IGNORED, REFUSED
from anima_fast.options.run import FinetuneOptions, TrainOptions
from anima_fast.options.sample import SampleOptions

HEADER = ("| Option | Value | Default | Meaning |", "|---|---|---|---|")


def option_table_markdown(cls: type = TrainOptions) -> str:
    """The documentation's table of options, by group; for `TrainOptions` the other names too."""
    lines: list[str] = []
    groups: dict[str, list[str]] = {}
    for spec in specs(cls).values():
        groups.setdefault(spec.group, []).append(_row(spec))
    for group, rows in groups.items():
        lines += [f"### {group}", "", *HEADER, *rows, ""]
    if cls is TrainOptions:
        lines += _named("Other spellings", {n: f"`{a.target}`" for n, a in ALIASES.items()})
        lines += _named("Accepted without effect", IGNORED)
        lines += _named("Refused", REFUSED)
    return "\n".join(lines)


def finetune_table_markdown() -> str:
    """The options that full fine-tuning has and LoRA training does not, and those it refuses."""
    shared = specs(TrainOptions)
    own = [
        spec
        for name, spec in specs(FinetuneOptions).items()
        if name not in shared or spec.default != shared[name].default
    ]
    return "\n".join([*HEADER, *map(_row, own), "", *_named("Refused", network_options())])


def option_page() -> str:
    """`docs/options.md`: the tables with a heading and a sentence each."""
    return (
        "# Options\n\n"
        "Made from the code by `python -m anima_fast.options.docs_table`; a test compares the "
        "two.\n\n"
        "## `anima-fast train`\n\n"
        "Underscores and hyphens mean the same, and every option is a key of the TOML file of "
        "`--config_file`.\n\n"
        f"{option_table_markdown()}\n"
        "## `anima-fast finetune`\n\n"
        "Trains all weights of the model. It has the options of `train` except those of the "
        "network, and these; a default that differs is shown.\n\n"
        f"{finetune_table_markdown()}\n"
        "## `anima-fast sample`\n\n"
        f"{option_table_markdown(SampleOptions)}"
    )


def _row(spec: Spec) -> str:
    default = "" if spec.default in (None, (), "") else f"`{spec.default}`"
    value = (spec.metavar or "flag").replace("|", "\\|")
    return f"| `--{spec.name}` | {value} | {default} | {spec.help.replace('|', chr(92) + '|')} |"


def _named(title: str, entries: Mapping[str, str]) -> list[str]:
    rows = [f"| `--{name}` | {text} |" for name, text in entries.items()]
    return [f"### {title}", "", "| Option | |", "|---|---|", *rows, ""]


if __name__ == "__main__":
    sys.stdout.write(option_page())

"""Writes docs/troubleshooting/*.md: every message that a person may see, by where it arises, with cause and fix.

python docs/tools/update_messages.py

The words come from the code (docs/tools/messages.py), causes and fixes from docs/tools/messages.yaml. A module in no
group, a group without messages, and a note that fits no message are mistakes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from messages import ROOT, Message, messages

SOURCE = Path(__file__).with_name("messages.yaml")
FOLDER = "docs/troubleshooting"
UPDATE = "run: python docs/tools/update_messages.py"
HEAD = (
    "Words as they stand in the code, `{name}` for a value. A line that says what to do says it in its second half, "
    "after `:` or `;`; the\nsentence above each list is for all of it. [Where to begin](../troubleshooting.md) has the "
    "exit statuses and the other pages.\n"
)


@dataclass
class Group:
    """Messages of some modules, with what is to be known of all of them."""

    title: str
    about: str
    modules: list[str]
    notes: dict[str, str] = field(default_factory=dict)
    found: list[Message] = field(default_factory=list)

    def text(self) -> str:
        words = sorted({one.words for one in self.found}, key=lambda text: text.lstrip("{'-;, .").lower())
        return f"## {self.title}\n\n{self.about}\n\n" + "\n".join(map(self._line, words)) + "\n"

    def _line(self, words: str) -> str:
        notes = [note for part, note in self.notes.items() if part in words]
        ticks = "``" if "`" in words else "`"
        space = " " if "`" in words else ""
        return f"- {ticks}{space}{words}{space}{ticks}" + "".join(f": {note}" for note in notes)


def sorted_into(pages: dict[str, Any], found: Iterable[Message]) -> tuple[dict[str, list[Group]], list[str]]:
    """The groups of each page with their messages, and what is wrong with the source: lines that say what to do."""
    groups = {name: [Group(**group) for group in page["groups"]] for name, page in pages.items()}
    everywhere = [group for of in groups.values() for group in of]
    wrong = []
    for one in found:
        exact = [group for group in everywhere if one.module in group.modules]
        fitting = exact or [group for group in everywhere if any(fnmatch.fnmatch(one.module, p) for p in group.modules)]
        if len(fitting) == 1:
            fitting[0].found.append(one)
        else:
            names = " and ".join(f"'{group.title}'" for group in fitting) or "no group"
            wrong.append(f"{one.module}: is in {names} of docs/tools/messages.yaml; name it in one, then {UPDATE}")
    for group in everywhere:
        for module in group.modules:
            if not any(ROOT.glob(module)):
                wrong.append(f"docs/tools/messages.yaml: '{group.title}': {module} is not there; remove it")
        if not group.found:
            wrong.append(f"docs/tools/messages.yaml: '{group.title}' has no messages any more; remove the group")
        for part in group.notes:
            if not any(part in one.words for one in group.found):
                wrong.append(
                    f"docs/tools/messages.yaml: '{group.title}': no message holds \"{part}\"; change the note's key"
                )
    return groups, list(dict.fromkeys(wrong))


def files() -> tuple[dict[str, str], list[str]]:
    """Path in the repository -> text, and what is wrong with docs/tools/messages.yaml."""
    pages = yaml.safe_load(SOURCE.read_text())
    groups, wrong = sorted_into(pages, messages())
    made = {}
    for name, page in pages.items():
        head = f"# Messages: {page['title']}\n\n{page['about']}\n\n{HEAD}\n"
        made[f"{FOLDER}/{name}.md"] = head + "\n".join(group.text() for group in groups[name])
    return made, wrong


if __name__ == "__main__":
    made, wrong = files()
    for name, text in made.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_text(text)
        print(name)
    if wrong:
        raise SystemExit("\n".join(wrong))

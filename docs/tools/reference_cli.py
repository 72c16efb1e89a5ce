"""The site's page of the command line: every verb, argument and option, as typer describes its own parser."""

from __future__ import annotations

import re
import subprocess
import sys

HEAD = """# The command line

Every verb with its arguments and options; `scoreray VERB --help` prints the same. What they do together:
[the first page](../index.md). Exit status: 0 done, 2 a mistake of the caller's (one line says which), 3 data, storage,
the machine or a loss that is not finite, 130 stopped, 1 a bug.
"""


def page() -> str:
    command = [sys.executable, "-m", "typer", "scoreray.cluster.cli.main", "utils", "docs", "--name", "scoreray"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    summaries = dict(re.findall(r"^#+ `([^`]+)`\n\n((?:.+\n)+)", text, re.M))
    path = ""

    def line(match: re.Match[str]) -> str:
        """A heading, or a verb in the list of its group, which typer cuts short."""
        nonlocal path
        if match[1]:
            path = match[1]
            return match[0]
        verb = f"{path} {match[2]}"
        return f"* [`{verb}`](#{verb.replace(' ', '-')}): {' '.join(summaries[verb].split())}"

    text = re.sub(r"^#+ `([^`]+)`$|^\* `([a-z][\w-]*)`: .*$", line, text, flags=re.M)
    return HEAD + text.partition("\n")[2].replace("```console\n$ ", "```text\n")

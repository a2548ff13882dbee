"""What mkdocs makes while it builds: the command line's reference, from the program itself."""

import contextlib
import io
import os
from typing import Any

MARKER = "<!-- commands -->"


def help_of(command: str) -> str:
    """What `dfrot COMMAND --help-all` prints, 100 columns wide."""
    from dfrot import cli

    printed = io.StringIO()
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.parse([command, "--help-all"])
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put every command's help where the page has the marker."""
    if MARKER not in markdown:
        return markdown
    import dfrot_command

    sections = (f"## dfrot {name}\n\n```text\n{help_of(name)}\n```" for name in dfrot_command.COMMANDS)
    return markdown.replace(MARKER, "\n\n".join(sections))

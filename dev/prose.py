"""The house's list of phrases that a native reader stumbles over, and what to write. `make check` runs it.

python dev/prose.py [FILE …]        (default: README.md, the pages in docs/, and their like)
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# pattern → what to write
PHRASES = {
    r"otherwise than": "differently from",
    r"what is said\b": "the message",
    r"\bof anyone\b": "anyone's",
    r"\bare none\b|\bis none\b": "there is no …",
    r"\bwithout a word\b": "silently",
    r"\bsticks? out\b": "stands out",
    r"\bpedantry\b": "this matters",
    r"\butili[sz]e": "use",
    r"\bin order to\b": "to",
    r"\bdue to the fact\b": "because",
    r"\bvery unique\b": "unique",
    r"\b(simply|obviously|of course|just)\b(?= [a-z])": "nothing: delete it",
    r"\bplease note\b": "nothing: delete it",
    r"\ba number of\b": "some, or the number",
    r"\b(\w+) \1\b(?<!\bthat that)": "one of the two words",
}
PAGES = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "docs/**/*.md")


def text_of(markdown: str) -> str:
    """The prose of a page: code, links' addresses and HTML are blanked, lines stay where they are."""
    for pattern in (r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)", r"<[^>]*>"):
        markdown = re.sub(pattern, lambda found: re.sub(r"[^\n]", "_", found[0]), markdown, flags=re.S)
    return markdown


def findings(markdown: str) -> list[tuple[int, str, str]]:
    """Line, words and advice of each phrase in a page."""
    text, found = text_of(markdown), []
    for pattern, advice in PHRASES.items():
        for match in re.finditer(pattern, text, re.I):
            found.append((text.count("\n", 0, match.start()) + 1, match[0], advice))
    return sorted(found)


def main() -> int:
    pages = [Path(name) for name in sys.argv[1:]] or [page for name in PAGES for page in sorted(ROOT.glob(name))]
    wrong = [(page, *each) for page in pages for each in findings(page.read_text())]
    for page, line, words, advice in wrong:
        print(f"{page.relative_to(ROOT) if page.is_absolute() else page}:{line}: '{words}': write {advice}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

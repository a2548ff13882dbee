"""Papers, for the citations in model cards: each method and rounding lists those that it implements or builds on."""

from typing import NamedTuple


class Paper(NamedTuple):
    """One paper on arXiv."""

    key: str  # of the BibTeX entry
    arxiv: str  # the identifier, such as 2404.00456
    authors: str  # in BibTeX's form
    title: str

    def bibtex(self) -> str:
        return (
            f"@article{{{self.key}, title={{{self.title}}}, author={{{self.authors}}}, "
            f"journal={{arXiv:{self.arxiv}}}, year={{20{self.arxiv[:2]}}}}}"  # an identifier begins with the year
        )

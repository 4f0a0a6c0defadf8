"""How Sphinx makes the pages in this folder, and the reference from the docstrings: `make docs`.

The pages link to files of the repository, which are not among them. GRL_EXT_REPOSITORY says where those are; without
it, only their names are left.
"""

import os
import re

import grl_ext

project = "grl_ext"
author = "the authors of grl_ext"
release = version = grl_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"grl_ext {release}"
exclude_patterns = ["requirements.txt"]

myst_heading_anchors = 3  # links to headings are those that GitHub makes
strip_signature_backslash = True  # with it napoleon takes `lambda_` for a name and not for a link
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False  # "A view of x: nothing is copied" is a sentence, and no type

# References to names that do not exist are errors, but for those of other projects: their lists are on the network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!grl_ext\.)(?!GRL)(?!Adversarial)(?!Heads)(?!Lambda).*")]

REPOSITORY = os.environ.get("GRL_EXT_REPOSITORY", "").rstrip("/")


def to_repository(app, docname: str, source: list[str]) -> None:
    """Links that leave this folder lead into the repository. Pictures are taken from where they lie."""

    def link(found: re.Match) -> str:
        text, path = found[1], found[2]
        return f"[{text}]({REPOSITORY}/blob/main/{path})" if REPOSITORY else text

    source[0] = re.sub(r"(?<!!)\[([^\]]*)\]\(\.\./([^)\s]+)\)", link, source[0])


def setup(app) -> None:
    app.connect("source-read", to_repository)

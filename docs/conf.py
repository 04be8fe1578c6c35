"""Sphinx: the pages of this folder as a site, with the API and the commands (``make docs``)."""

import protoclip

project = "protoclip"
release = protoclip.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinxarg.ext",
]
# The source folder is the root of the repository, so that links to ../README.md work.
root_doc = "docs/README"
include_patterns = ["*.md", "docs/*.md", "benchmarks/results/*.md", "protoclip/data/NOTICE.md"]
suppress_warnings = ["toc.not_included"]  # README, NOTICE and records are linked, not listed
smartquotes_action = "qe"  # no dashes: help texts name flags, such as --epochs
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"protoclip {release}"
html_show_copyright = False
myst_heading_anchors = 4
napoleon_custom_sections = [("Source", "notes_style")]
autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
doctest_global_setup = "import torch\nimport protoclip"

"""The site: Sphinx reads docs/*.md by MyST, furo lays it out. `make docs` builds it.

Nothing of it comes from a network: the theme brings its fonts and scripts, equations are MathML.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from building import reference  # noqa: E402

project = "safelatent"
author = "The safelatent authors"
copyright = "the safelatent authors, Apache-2.0"
html_title = "safelatent"

extensions = ["myst_parser", "sphinx.ext.autodoc", "building.links", "building.mathml"]
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
exclude_patterns = ["building/*", "pictures/*"]

html_theme = "furo"
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
pygments_style = "default"

reference.write(HERE)

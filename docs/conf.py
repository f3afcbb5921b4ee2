"""Sphinx's configuration. docs/build.py says what is built."""

project = "Patchclamp"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "Patchclamp"
# Nothing is fetched when a page is read, and pages need no copy of their source beside them.
html_copy_source = False
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]
# Blocks of a terminal, of which there are most, have no language.
highlight_language = "none"
exclude_patterns = ["_build"]

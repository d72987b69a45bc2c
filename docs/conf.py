"""Sphinx configuration of the manual; `make docs` builds it with warnings as errors."""

import viommu

project = "viommu"
author = "viommu contributors"
copyright = "viommu contributors; Apache License 2.0"  # noqa: A001  # Sphinx's name
release = viommu.__version__
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
highlight_language = "text"

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
# Two modules may each have an Event; an annotation says the name without the module.
suppress_warnings = ["ref.python"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"viommu {release}"

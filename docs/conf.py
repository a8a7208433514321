"""Settings of the site: `make site` builds it from the pages of this folder, without a network."""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

project = "A laboratory for spurious correlations"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # GitHub's anchors, so that a link resolves in both places
nitpicky = True
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
html_show_copyright = False
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"

log = logging.getLogger(__name__)


def _visit(as_block: bool):
    """Write a formula as MathML; one that cannot be converted is a warning with its place."""

    def visit(translator, node):
        try:
            formula = tex2mathml(node.astext(), as_block=as_block)
            # Without a font for mathematics browsers draw accents, such as bars, into the letter.
            formula = formula.replace(' accent="true"', "").replace("ˉ", "¯")
            translator.body.append(formula)
        except MathError as error:
            log.warning("formula %r: %s", node.astext(), error, location=node)
        raise nodes.SkipNode

    return visit


def setup(app):
    # Sphinx's MathJax is fetched from the network by every reader, and its imgmath needs LaTeX.
    # Browsers render MathML by themselves, and docutils, which Sphinx is made with, writes it.
    app.add_html_math_renderer("mathml", (_visit(False), None), (_visit(True), None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Pages and tables about a finished run."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.report.diagnostics import DIAGNOSTICS as DIAGNOSTICS
    from fastalign.report.diagnostics import Finding as Finding
    from fastalign.report.diagnostics import diagnose as diagnose
    from fastalign.report.page import write_report as write_report
    from fastalign.report.rendering import format_number as format_number
    from fastalign.report.rendering import format_text as format_text
    from fastalign.report.tax import show_tax as show_tax
    from fastalign.report.tax import write_tax as write_tax

lazy_exports(
    __name__,
    {
        "DIAGNOSTICS": "fastalign.report.diagnostics",
        "Finding": "fastalign.report.diagnostics",
        "diagnose": "fastalign.report.diagnostics",
        "format_number": "fastalign.report.rendering",
        "format_text": "fastalign.report.rendering",
        "show_tax": "fastalign.report.tax",
        "write_report": "fastalign.report.page",
        "write_tax": "fastalign.report.tax",
    },
)

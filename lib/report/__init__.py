"""The page of a run: what the notebooks show, joined into one self-contained HTML file; and the README's quotes."""

from lib.report.report import Section, Table, write_notebook_page, write_report

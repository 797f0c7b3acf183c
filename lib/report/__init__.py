"""The page of a run: what the notebooks show, joined into one self-contained HTML file.

- `report`: `Section` and `Table`, through which a notebook shows and stores its results; `write_report`
- `page`: any self-contained page; `write_notebook_page`, an executed notebook as a page
- `quotes`: what the README quotes of a record
- `templates`: the pages' HTML and CSS
"""

from lib.report.page import write_notebook_page
from lib.report.report import Section, Table, write_report

"""Whether anybody is watching: live widgets and redrawn figures need a front end, a headless run gets static ones."""

import re

from IPython import get_ipython


def can_show_widgets() -> bool:
    """Whether the cell that runs now was sent by a front end in a browser.

    Papermill, nbval and nbconvert send cells through jupyter_client, whose message ids end in _<process>_<number>;
    JupyterLab and its kin send ids of their own.
    """
    shell = get_ipython()
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return False
    message_id = kernel.get_parent().get("header", {}).get("msg_id", "")
    return bool(message_id) and re.search(r"_\d+_\d+$", message_id) is None

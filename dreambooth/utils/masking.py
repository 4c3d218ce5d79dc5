"""Masks the secrets in URLs before a text is shown, logged or kept.

The secrets are the user info (such as USER:PASSWORD@) and the query (such as ?signature=...) of a URL.
"""

import contextlib
import logging
import re
from pathlib import Path
from typing import Any

from dreambooth.utils import atomic_files

_USER_INFO = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"(?<=://)([^\s?'\"]*)\?[^\s'\"<>`]+?(?=[).,:;\]}]*(?:[\s'\"<>`]|$))")
_ASSIGNMENT = re.compile(r"(?i)(password|token|signature)=[^&\s'\"]+")  # also outside of a URL


def mask_urls(text: str, uri: str = "") -> str:
    """Return `text` with the user info and the query of every URL masked: `https://host/file?***`.

    The values of `password=`, `token=` and `signature=` are masked, too.

    Args:
        uri: a URL that may have user info. This user info is removed from `text`, even where it is not part of a URL.
    """
    login = re.match(r"[\w+.-]+://([^/\s]*)@", uri)
    text = _QUERY.sub(r"\1?***", _USER_INFO.sub("", text))
    for secret in (login[1] + "@", login[1].partition(":")[2]) if login else ():
        text = text.replace(secret, "") if secret else text
    return _ASSIGNMENT.sub(r"\1=***", text)


def mask_file(path: Path) -> None:
    """Mask the URLs in a text file. Do nothing if the file does not exist."""
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8")
        if (masked := mask_urls(text)) != text:
            with atomic_files.write_file(path) as temporary:
                temporary.write_text(masked, encoding="utf-8")


def mask_log_records() -> None:
    """Mask the URLs in the messages that this process logs from now on, by any library. A second call does nothing."""
    make_record = logging.getLogRecordFactory()
    if getattr(make_record, "masks_urls", False):
        return

    def make_masked_record(*args: Any, **options: Any) -> logging.LogRecord:
        record = make_record(*args, **options)
        with contextlib.suppress(Exception):  # wrong arguments of a message are reported where it is written
            record.msg, record.args = mask_urls(record.getMessage()), None
        return record

    make_masked_record.masks_urls = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_masked_record)

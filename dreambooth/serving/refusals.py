"""Why a request gets no picture: an HTTP status, one sentence, and after how many seconds to try again."""


class Refused(Exception):
    """A request is not answered with a picture.

    Args:
        status: the HTTP status, such as 429.
        sentence: what the client is told. Half a pair of surrogates, which UTF-8 cannot express, becomes an escape
            such as \\ud800.
        retry_after: seconds after which the client may try again; None: the same request would fail again.
    """

    def __init__(self, status: int, sentence: str, retry_after: int | None = None) -> None:
        sentence = sentence.encode("utf-8", "backslashreplace").decode()
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after = status, sentence, retry_after


class Gone(Exception):
    """The client has closed its connection: nobody waits for the answer."""

"""An upload as browsers and SDKs send it, `multipart/form-data`: the bytes of its file as they come, and its fields.

It holds no more of the file than the last piece given to it. It knows nothing of HTTP or of where files are kept.
"""

from __future__ import annotations

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from shared.errors import BadRequest, InvalidValue, MissingField

MAX_PARTS = 16
MAX_FIELD_BYTES = 4096                                  # of all fields together
MAX_NAME_CHARS = 255                                    # of a file; longer names are cut off
MIN_EXPIRES_S = 3600
PURPOSES = ("batch", "user_data")


def require_lifetime(seconds: int, max_s: float, param: str) -> None:
    """Raises InvalidValue."""
    if not MIN_EXPIRES_S <= seconds <= max_s:
        raise InvalidValue(f"A file expires after {MIN_EXPIRES_S} to {max_s:.0f} seconds.", param=param)


class Upload:
    """Fed with a body, piece by piece."""

    def __init__(self, content_type: str) -> None:
        """Raises BadRequest when the body is not a form."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise BadRequest("Send the file as multipart/form-data, in a part named file.")
        self.filename: str | None = None                # known once the file has begun
        self.fields: dict[str, str] = {}
        self.is_whole = False                           # the form is complete
        self._num_parts = 0
        self._num_field_bytes = 0
        self._name = ""                                 # of the current part
        self._header = [b"", b""]
        self._value = b""
        self._pieces: list[bytes] = []                  # of the file
        try:
            self._parser = MultipartParser(options[b"boundary"], {
                "on_part_begin": self._begin_part, "on_part_data": self._part_data, "on_part_end": self._end_part,
                "on_header_field": self._header_name, "on_header_value": self._header_value,
                "on_header_end": self._end_header, "on_headers_finished": self._end_headers, "on_end": self._end})
        except FormParserError:
            raise BadRequest("The boundary of the form is none.") from None

    def feed(self, data: bytes) -> bytes:
        """The bytes of the file in this piece. Raises BadRequest."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise BadRequest("The form cannot be read.") from None
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)

    @property
    def purpose(self) -> str:
        """Raises BadRequest."""
        purpose = self.fields.get("purpose")
        if purpose is None:
            raise MissingField("purpose: a form of an upload has this field.", param="purpose")
        if purpose not in PURPOSES:
            raise InvalidValue(f"purpose is one of {', '.join(PURPOSES)}.", param="purpose")
        return purpose

    def lifetime_s(self, max_s: float) -> float:
        """How long the file is to be kept. Raises InvalidValue."""
        anchor, seconds = self.fields.get("expires_after[anchor]"), self.fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return max_s
        if anchor != "created_at":
            raise InvalidValue("The anchor of expires_after is created_at.", param="expires_after")
        is_number = seconds and seconds.isascii() and seconds.isdigit() and len(seconds) < 12
        lifetime_s = int(seconds or 0) if is_number else 0
        require_lifetime(lifetime_s, max_s, "expires_after")
        return lifetime_s

    # ── what the parser finds ──

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise BadRequest(f"The form of an upload has at most {MAX_PARTS} parts.")
        self._name, self._header, self._value = "", [b"", b""], b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def _end_header(self) -> None:
        (name, value), self._header = self._header, [b"", b""]
        if name.lower() != b"content-disposition":
            return
        _, options = parse_options_header(value)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file":
            if self.filename is not None:
                raise BadRequest("The form of an upload has one file.")
            self.filename = options.get(b"filename", b"file").decode(errors="replace")[:MAX_NAME_CHARS]

    def _end_headers(self) -> None:
        if not self._name:
            raise BadRequest("A part of the form has no name.")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._pieces.append(data[start:end])
            return
        self._num_field_bytes += end - start
        if self._num_field_bytes > MAX_FIELD_BYTES:
            raise BadRequest(f"The fields of an upload have at most {MAX_FIELD_BYTES} bytes.")
        self._value += data[start:end]

    def _end_part(self) -> None:
        if self._name != "file":
            self.fields[self._name] = self._value.decode(errors="replace")

    def _end(self) -> None:
        self.is_whole = True

"""Whatever a server answers to an import, it is the file, a reason to come back, or a refusal that says what to do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.addresses import Unanswered
from app.errors import IntakeError
from app.outbound import Incoming
from app.services.import_answers import Busy, body_bytes, check_answer, strong_etag

URL = "https://example.org/a"
LATIN = st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=40)
HEADERS = st.dictionaries(
    st.sampled_from(
        ["location", "etag", "content-length", "content-range", "content-encoding", "retry-after"]
    ),
    LATIN | st.sampled_from(["bytes 7-9/10", "http://[", "//user:hush@a?b", "gzip", '"one"', "9" * 30]),
)


def answer(status: int, **headers: str) -> Incoming:
    return Incoming(status, {name.replace("_", "-"): value for name, value in headers.items()}, iter(()))


def outcome(came: Incoming, asked: int) -> int | IntakeError | Unanswered:
    try:
        return check_answer(came, URL, asked)
    except (IntakeError, Unanswered) as error:
        return error


@settings(max_examples=100, deadline=None)
@given(st.integers(100, 599), HEADERS, st.sampled_from([0, 7]))
def test_any_answer_is_understood_or_refused(status: int, headers: dict[str, str], asked: int) -> None:
    came = Incoming(status, headers, iter(()))
    found = outcome(came, asked)
    if isinstance(found, int):
        assert status in (200, 206)
        assert found in (0, asked)
    else:
        assert "hush" not in str(found)
        assert isinstance(found, Unanswered) or found.hint
    assert (body_bytes(came) or 0) < 10**18
    etag = strong_etag(came)
    assert etag is None or etag.startswith('"')


@pytest.mark.parametrize("found", ["bytes 6-9/10", "bytes 8-9/10", "bytes */10", ""])
def test_another_part_than_was_asked_for_is_refused(found: str) -> None:
    assert check_answer(answer(206, content_range="bytes 7-9/10"), URL, 7) == 7
    with pytest.raises(IntakeError, match="another part"):
        check_answer(answer(206, content_range=found), URL, 7)


@pytest.mark.parametrize(("asked", "seconds"), [("120", 120.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)])
def test_a_busy_server_may_say_for_how_long(asked: str, seconds: float) -> None:
    with pytest.raises(Busy, match="429 Too Many Requests") as busy:
        check_answer(answer(429, retry_after=asked), URL, 0)
    assert busy.value.seconds == seconds


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("/b?c=hush", "https://example.org/b;"),
        ("https://u:hush@other.example/b#c", "https://other.example/b;"),
        ("http://[", "what is no URL"),
    ],
)
def test_a_redirect_names_where_it_leads(location: str, shown: str) -> None:
    with pytest.raises(IntakeError) as refused:
        check_answer(answer(307, location=location), URL, 0)
    assert shown in refused.value.detail
    assert "hush" not in refused.value.detail

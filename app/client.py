"""A small client of the HTTP API, for the command line and the demo. Uploads and downloads survive broken connections.

ClientError
├── ServiceProblem   the service answered with a problem (RFC 9457)
├── Unreachable      nothing answers at the URL, or it went away for longer than we retry
└── DigestMismatch   a download is not the file the service says it is
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import httpx

from app.begun_uploads import BegunUploads

TERMINAL = ("succeeded", "failed", "cancelled")

_ATTEMPTS = 6
_PIECE = 1 << 20
_SECONDS = httpx.Timeout(60, connect=5)
_RETRY_STATUS = (502, 503, 504)
_POLL_SECONDS = 1.0

Json = dict[str, Any]
OnBytes = Callable[[int], None]
"""Called with the number of bytes that have just gone over the wire."""


class ClientError(Exception):
    """What went wrong, in words for people."""


class Unreachable(ClientError):
    """Nothing answers."""


class DigestMismatch(ClientError):
    """The bytes that came are not those the service promised."""


class ServiceProblem(ClientError):
    """The service refused, and says why."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status = status
        self.code = str(problem.get("code", ""))
        self.detail = str(problem.get("detail") or problem.get("title") or f"HTTP {status}")
        self.hint = problem.get("hint")
        self.faults = list(problem.get("errors") or [])
        super().__init__(self.detail)

    def __str__(self) -> str:
        """The problem as lines of text: what, where, what to do."""
        where = (
            f"  {f.get('pointer') or f.get('parameter') or '(body)'}: {f['detail']}" for f in self.faults
        )
        return "\n".join([self.detail, *where, *([self.hint] if self.hint else [])])


@dataclass(frozen=True)
class JobEvent:
    """One event of a job, as the stream gives it."""

    number: int
    type: str
    data: Json


class Client:
    """Calls on one service. A context manager."""

    def __init__(self, url: str, *, key: str = "", transport: httpx.BaseTransport | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=_SECONDS, transport=transport)
        self.url = url.rstrip("/")
        self._reached = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> Json:
        """GET a resource."""
        return self._json("GET", path, params=params)

    def post(self, path: str, body: object = None) -> Json:
        """POST a JSON body. Its key lets it be sent again when a connection breaks, without happening twice."""
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        while True:
            try:
                return self._json("POST", path, json=body, headers=headers)
            except ServiceProblem as problem:
                # It takes longer than we wait for an answer: making a model of a large upload does.
                if problem.code != "idempotency_in_flight":
                    raise
            time.sleep(_POLL_SECONDS)

    def upload(
        self, path: Path, *, begun: BegunUploads | None = None, on_bytes: OnBytes = lambda _: None
    ) -> str:
        """Send a file in parts, each with its digest; returns the id of the completed upload.

        With `begun`, parts that an earlier, broken run has sent are skipped.
        """
        upload = self._open_upload(path, begun)
        on_bytes(sum(part["bytes"] for part in upload["parts"]))
        with path.open("rb") as file:
            for number in upload["missing"]:
                self._send_part(upload, number, file)
                on_bytes(_part_length(upload, number))
        return str(self.post(upload["urls"]["complete"])["id"])

    def import_url(self, url: str, *, on_change: Callable[[Json], None] = lambda _: None) -> Json:
        """Have the service fetch a file; returns the completed upload. `on_change` is given the upload again and again.

        Raises ServiceProblem when the import fails. On Ctrl-C the service is told to stop as well.
        """
        upload = self.post("/v1/imports", {"url": url})
        try:
            while upload["status"] == "importing":
                on_change(upload)
                time.sleep(_POLL_SECONDS)
                upload = self.get(upload["urls"]["self"])
        except KeyboardInterrupt:
            self._json("DELETE", upload["urls"]["self"])
            raise
        if upload["status"] == "failed":
            raise ServiceProblem(httpx.codes.UNPROCESSABLE_ENTITY, upload["fetch"]["error"])
        on_change(upload)
        return upload

    def events(self, job: Json) -> Iterator[JobEvent]:
        """A job's events as they happen, from the first, until it has ended; a broken stream is taken up again."""
        last, misses = 0, 0
        while misses < _ATTEMPTS:
            with contextlib.suppress(httpx.TransportError):
                for event in self._stream_events(job["urls"]["events"], last):
                    last, misses = event.number, 0
                    yield event
            # A stream also ends when a proxy has had enough of it.
            if self.get(job["urls"]["self"])["status"] in TERMINAL:
                return
            misses += 1
            time.sleep(_pause(misses))
        raise Unreachable(f"The events of {job['id']} do not come any more from {self.url}.")

    def wait(self, job: Json) -> Json:
        """The job once it has ended."""
        for _ in self.events(job):
            pass
        return self.get(job["urls"]["self"])

    def download(self, artifact: Json, target: Path, *, on_bytes: OnBytes = lambda _: None) -> None:
        """Write an artifact to `target`, which appears only once it is whole and its sha256 is right.

        What an earlier, broken download left in `target`.part is taken up.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._fetch(artifact, partial, on_bytes)
                break
            except httpx.TransportError as error:
                if attempt == _ATTEMPTS:
                    raise self._unreachable(error) from None
                time.sleep(_pause(attempt))
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != artifact["sha256"]:
            partial.unlink()
            raise DigestMismatch(
                f"{artifact['path']} arrived with sha256 {found}, not {artifact['sha256']}: it was removed."
            )
        partial.replace(target)

    def _open_upload(self, path: Path, begun: BegunUploads | None) -> Json:
        known = begun.find(path) if begun else None
        if known:
            try:
                return self.get(f"/v1/uploads/{known}")
            except ServiceProblem as problem:
                if problem.status != httpx.codes.NOT_FOUND:
                    raise
        body = {"name": path.name, "size": path.stat().st_size, "direct": True}
        upload = self.post("/v1/uploads", body)
        if begun:
            begun.remember(path, upload["id"])
        return upload

    def _send_part(self, upload: Json, number: int, file: BinaryIO) -> None:
        file.seek((number - 1) * upload["part_bytes"])
        content = file.read(_part_length(upload, number))
        sha256 = hashlib.sha256(content)
        if upload["direct"]:
            self._send_part_to_store(upload, {"number": number, "sha256": sha256.hexdigest()}, content)
            return
        digest = base64.b64encode(sha256.digest()).decode()
        url = upload["urls"]["part"].replace("{number}", str(number))
        self._json("PUT", url, content=content, headers={"Content-Digest": f"sha-256=:{digest}:"})

    def _send_part_to_store(self, upload: Json, part: Json, content: bytes) -> None:
        """PUT a part where the service says, by a fresh URL for each attempt."""
        for attempt in range(1, _ATTEMPTS + 1):
            (place,) = self.post(upload["urls"]["part_urls"], {"parts": [part]})["items"]
            try:
                # Nothing that we show the service, a key least of all, goes to the store.
                answer = httpx.put(place["url"], content=content, headers=place["headers"], timeout=_SECONDS)
            except httpx.TransportError as error:
                why = f"it does not answer ({error})"
            else:
                if answer.is_success:
                    return
                why = f"it answers {answer.status_code}: {answer.text[:300]}"
            if attempt < _ATTEMPTS:
                time.sleep(_pause(attempt))
        raise ClientError(
            f"Part {part['number']} cannot be sent to {httpx.URL(place['url']).host}: {why}.\n"
            "Try again, or have an administrator set MODELPRESS_S3_UPLOADS=streamed: files then pass through the service."
        )

    def _stream_events(self, url: str, after: int) -> Iterator[JobEvent]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._http.stream("GET", url, headers=headers) as response:
            _raise_for_problem(response)
            fields: dict[str, str] = {}
            for line in response.iter_lines():
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                    continue
                if "data" in fields:
                    event = json.loads(fields["data"])
                    yield JobEvent(event["number"], event["type"], event["data"])
                fields = {}

    def _fetch(self, artifact: Json, partial: Path, on_bytes: OnBytes) -> None:
        have = partial.stat().st_size if partial.exists() else 0
        if have >= artifact["bytes"]:
            return
        headers = {"Range": f"bytes={have}-"} if have else {}
        with self._content(artifact["urls"]["content"], headers) as response:
            _raise_for_problem(response)
            resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
            with partial.open("ab" if resumed else "wb") as file:
                on_bytes(have if resumed else 0)
                for piece in response.iter_bytes(_PIECE):
                    file.write(piece)
                    on_bytes(len(piece))

    @contextlib.contextmanager
    def _content(self, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """The answer with the bytes: the service's own, or that of the store it sends us to."""
        with self._http.stream("GET", url, headers=headers) as response:
            elsewhere = response.headers.get("location") if response.has_redirect_location else None
            if elsewhere is None:
                yield response
                return
        # A client of its own: nothing that we show the service, a key least of all, goes to the store.
        with (
            httpx.Client(timeout=_SECONDS) as bare,
            bare.stream("GET", elsewhere, headers=headers) as response,
        ):
            yield response

    def _json(self, method: str, url: str, **request: Any) -> Json:
        """One call, sent again when the connection breaks or the service is busy, once it has been reached at all."""
        for attempt in range(1, _ATTEMPTS + 1):
            last = attempt == _ATTEMPTS
            try:
                response = self._http.request(method, url, **request)
            except httpx.TransportError as error:
                never_there = isinstance(error, httpx.ConnectError) and not self._reached
                if last or never_there:
                    raise self._unreachable(error) from None
            else:
                self._reached = True
                if last or response.status_code not in _RETRY_STATUS:
                    _raise_for_problem(response)
                    return dict(response.json()) if response.content else {}
            time.sleep(_pause(attempt))
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, error: httpx.TransportError) -> Unreachable:
        return Unreachable(
            f"Nothing answers at {self.url} ({error}).\n"
            "Start the service with `modelpress serve`, or say where it is with --url or MODELPRESS_URL."
        )


def _raise_for_problem(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    raise ServiceProblem(response.status_code, problem if isinstance(problem, dict) else {})


def _part_length(upload: Json, number: int) -> int:
    return int(min(upload["part_bytes"], upload["size"] - (number - 1) * upload["part_bytes"]))


def _pause(attempt: int) -> float:
    """Seconds before the next attempt: doubling, 4 s at most."""
    return min(4.0, 0.25 * 2.0**attempt)

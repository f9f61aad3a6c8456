"""A client that never gives up: it uploads models and submits jobs through outages, and remembers what was accepted."""

from __future__ import annotations

import hashlib
import io
import threading
import time
import uuid
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx

SPEC = {
    "steps": [{"technique": "quantize.weights", "bits": 8}],
    "evaluation": {"tokens": 256, "sequence_length": 64, "latency_rounds": 3},
}
_AGAIN = (409, 429, 502, 503, 504, 507)


class Refused(Exception):  # noqa: N818 - what happened, not an error of ours
    """The service said no to something that is right."""


@dataclass
class Accepted:
    """What the service has answered with success: it must keep all of it."""

    models: dict[str, str] = field(default_factory=dict)
    """Model id to the sha256 of its weights."""
    jobs: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    """Jobs a cancel was accepted for; each may also have ended before."""
    requests: int = 0


class Workload(threading.Thread):
    """Uploads, submits and cancels, one after the other, until so many jobs are accepted."""

    def __init__(self, url: str, model: Path, *, jobs: int, seed: int) -> None:
        super().__init__(name="workload")
        self.accepted = Accepted()
        self.failure: Exception | None = None
        self._url, self._model, self._jobs = url, model, jobs
        self._random = Random(seed)

    def run(self) -> None:
        try:
            with httpx.Client(base_url=self._url, timeout=30) as client:
                self._client = client
                while len(self.accepted.jobs) < self._jobs:
                    self._round()
        except Exception as error:  # noqa: BLE001 - shown by the test
            self.failure = error

    def _round(self) -> None:
        model_id = self._upload()
        for _ in range(3):
            job = self._call("POST", "/v1/jobs", json={"model": model_id, "spec": SPEC, "use_cache": False})
            self.accepted.jobs.add(job["id"])
            if self._random.random() < 0.1:
                self._cancel(job["id"])
            time.sleep(self._random.uniform(0, 1))

    def _upload(self) -> str:
        """A model no other is equal to, in parts; what breaks is sent again."""
        packed, weights = self._packed()
        facts = {"name": "tiny.zip", "size": len(packed), "sha256": hashlib.sha256(packed).hexdigest()}
        upload = self._call("POST", "/v1/uploads", json=facts)
        size = upload["part_bytes"]
        for number in range(1, upload["part_count"] + 1):
            part = packed[(number - 1) * size : number * size]
            self._call("PUT", f"/v1/uploads/{upload['id']}/parts/{number}", content=part)
        self._call("POST", f"/v1/uploads/{upload['id']}/complete")
        model = self._call("POST", "/v1/models", json={"upload": upload["id"]})
        self.accepted.models[model["id"]] = weights
        return str(model["id"])

    def _packed(self) -> tuple[bytes, str]:
        """The model as a zip with one weight changed, and the sha256 of its weights."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for path in sorted(self._model.iterdir()):
                content = bytearray(path.read_bytes())
                if path.name == "model.safetensors":
                    # Low mantissa bits of some weight: still a number, no longer the same.
                    content[-8:-6] = self._random.randbytes(2)
                    weights = hashlib.sha256(content).hexdigest()
                archive.writestr(path.name, bytes(content))
        return packed.getvalue(), weights

    def _cancel(self, job_id: str) -> None:
        # Before the call: it may be carried out although its answer never comes.
        self.accepted.cancelled.add(job_id)
        self._call("POST", f"/v1/jobs/{job_id}/cancel", fine=(409,))

    def _call(self, method: str, path: str, *, fine: tuple[int, ...] = (), **body: Any) -> dict[str, Any]:
        """Call until it is answered; the same key makes a repeated POST harmless."""
        headers = {"Idempotency-Key": uuid.uuid4().hex} if method == "POST" else {}
        give_up = time.monotonic() + 120
        while True:
            self.accepted.requests += 1
            try:
                answer = self._client.request(method, path, headers=headers, **body)
            except httpx.TransportError as error:
                last = repr(error)
            else:
                if answer.is_success or answer.status_code in fine:
                    return dict(answer.json())
                last = f"{answer.status_code} {answer.text}"
                if answer.status_code not in _AGAIN:
                    raise Refused(f"{method} {path}: {last}")
            if time.monotonic() > give_up:
                raise Refused(f"{method} {path}: nothing but {last}")
            time.sleep(0.2)

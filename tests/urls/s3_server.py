"""An S3 service on this machine: moto's, with its users and signatures, behind a counter that fails as it is told."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
import requests
from moto import settings
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

BUCKET = "models"
CREDENTIAL = re.compile(r"Credential=([^/]+)/")
ERRORS = {"503": ("SlowDown", "Please reduce your request rate."), "403": ("AccessDenied", "Access Denied")}


class S3Server:
    """Serves a folder as s3://models/NAME while it is a context. Every request must be signed by one of its users."""

    protocol = "s3"
    missing = "s3://models/none"

    def __init__(self, folder: Path, clients: Iterable[str]) -> None:
        self.sent: Counter[tuple[str, str]] = Counter()  # bytes of weights, by client and file name
        self.failures: dict[str, list[str]] = {}  # by file name: how the first requests fail
        self.url = f"s3://{BUCKET}/{folder.name}"
        self._folder, self._clients = folder, tuple(clients)
        self._keys: dict[str, tuple[str, str]] = {}
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> S3Server:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        requests.post(f"{self.address}/moto-api/reset", timeout=10)  # of what an earlier server in this process holds
        self._upload()
        self._before, settings.INITIAL_NO_AUTH_ACTION_COUNT = settings.INITIAL_NO_AUTH_ACTION_COUNT, 0.0
        return self

    def __exit__(self, *_: object) -> None:
        settings.INITIAL_NO_AUTH_ACTION_COUNT = self._before
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def environment(self, client: str) -> dict[str, str]:
        """Return how a client finds and signs in to the service. `stranger` has a key that is not known."""
        key, secret = self._keys.get(client, ("AKIASTRANGER00000000", "stranger-secret"))
        return {**self.anonymous(), "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}

    def anonymous(self) -> dict[str, str]:
        """Return the environment of a client without credentials."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_CONFIG_FILE": "/nonexistent",
        }

    def secrets(self) -> list[str]:
        """Return what may appear in no message."""
        return [part for pair in self._keys.values() for part in pair] + ["AKIASTRANGER", "stranger-secret"]

    def replace(self, name: str, content: bytes) -> None:
        """Write another version of a file."""
        self._client("s3", "owner").put_object(Bucket=BUCKET, Key=f"{self._folder.name}/{name}", Body=content)

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._client("s3", "owner").delete_object(Bucket=BUCKET, Key=f"{self._folder.name}/{name}")

    def _upload(self) -> None:
        may = {"owner": "s3:*", **dict.fromkeys(self._clients, "s3:*"), "forbidden": "s3:ListAllMyBuckets"}
        iam = self._client("iam", "")
        for client, action in may.items():
            iam.create_user(UserName=client)
            policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": action, "Resource": "*"}]}
            iam.put_user_policy(UserName=client, PolicyName="may", PolicyDocument=json.dumps(policy))
            created = iam.create_access_key(UserName=client)["AccessKey"]
            self._keys[client] = created["AccessKeyId"], created["SecretAccessKey"]
        self._client("s3", "owner").create_bucket(Bucket=BUCKET)
        for path in self._folder.iterdir():
            self.replace(path.name, path.read_bytes())

    def _client(self, service: str, client: str) -> Any:
        key, secret = self._keys.get(client, ("setup", "setup"))
        return boto3.client(
            service,
            endpoint_url=self.address,
            region_name="us-east-1",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
        )

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        name = environ["PATH_INFO"].rpartition("/")[2]
        failures = self.failures.get(name, []) if environ["REQUEST_METHOD"] == "GET" else []
        failure = failures.pop(0) if failures else ""
        if failure.isdecimal():
            code, text = ERRORS[failure]
            start_response(f"{failure} Error", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()]
        parts = self._application(environ, start_response)
        if environ["REQUEST_METHOD"] != "GET" or not name.endswith(".safetensors"):
            return parts
        return self._counted(parts, self._name_of_client(environ), name, cut=failure == "cut")

    def _counted(self, parts: Iterable[bytes], client: str, name: str, *, cut: bool) -> Iterator[bytes]:
        for part in parts:
            sent = part[: len(part) // 2] if cut else part
            self.sent[client, name] += len(sent)
            yield sent
            if cut:
                return

    def _name_of_client(self, environ: dict[str, Any]) -> str:
        found = CREDENTIAL.search(environ.get("HTTP_AUTHORIZATION", ""))
        key = found.group(1) if found else ""
        return next((client for client, (known, _) in self._keys.items() if known == key), key)

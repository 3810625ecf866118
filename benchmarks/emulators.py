"""Emulators of cloud storage on this machine: a bucket of Google Cloud Storage, and one of S3."""

import contextlib
import importlib
import importlib.util
import logging
import os
import socket
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any
from unittest import mock

NEEDED = {"gs": ("gcsfs", "google.cloud.storage", "gcp_storage_emulator"), "s3": ("s3fs", "moto", "flask")}


def list_missing(scheme: str) -> list[str]:
    """Return the modules that the emulator of gs or s3 needs and that are not installed."""

    def is_there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            return False

    return [name for name in NEEDED[scheme] if not is_there(name)]


@contextlib.contextmanager
def emulate_gcs() -> Iterator[str]:
    """Serve an empty bucket of Google Cloud Storage, whose URL this yields, to this process and its children.

    TensorStore and the clients read the address of the emulator from the environment, once in a process.
    """
    server: Any = importlib.import_module("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # of TensorStore
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks Google for the kind of the bucket
    }
    with mock.patch.dict(os.environ, environment), _teach_generations():
        emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        emulator.start()
        try:
            yield "gs://bucket"
        finally:
            emulator.stop()


@contextlib.contextmanager
def _teach_generations() -> Iterator[None]:
    """Have the emulator state the generation of an object, and refuse a write that another generation was meant for."""
    objects: Any = importlib.import_module("gcp_storage_emulator.handlers.objects")

    def find_generation(storage, request) -> str:
        name = request.params.get("object_id") or request.query.get("name", [""])[0] or request.data["meta"]["name"]
        try:
            return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except objects.NotFound:
            return "0"

    def download(request, response, storage):
        response["x-goog-generation"] = find_generation(storage, request)
        return originals["download"](request, response, storage)

    def upload(kind: str):
        def handle(request, response, storage):
            wanted = request.query.get("ifGenerationMatch")
            if wanted and wanted[0] != find_generation(storage, request):
                response.status = HTTPStatus.PRECONDITION_FAILED
                return None
            return originals[kind](request, response, storage)

        return handle

    originals = {name: getattr(objects, name) for name in ("download", "_media_upload", "_multipart_upload")}
    changed = {"download": download, **{kind: upload(kind) for kind in ("_media_upload", "_multipart_upload")}}
    with mock.patch.multiple(objects, **changed):
        yield


@contextlib.contextmanager
def emulate_s3() -> Iterator[str]:
    """Serve an empty bucket of S3, whose URL this yields, to this process and its children."""
    server: Any = importlib.import_module("moto.server")
    s3fs: Any = importlib.import_module("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    emulator = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    emulator.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{emulator.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, environment):
            s3fs.S3FileSystem().mkdir("bucket")
            yield "s3://bucket"
    finally:
        emulator.stop()

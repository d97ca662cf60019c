# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A real MONAI Label server on this machine's loopback, and its REST calls as the viewers make them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

__all__ = ["LabelServer", "RefusedError"]

_START_SECONDS, _TASK_SECONDS = 180, 600


class RefusedError(Exception):
    """An answer other than 200; its text is what the viewer would show."""


class LabelServer:
    """Start MONAI Label with an app, bundles and a folder of images; stop it at the end of the ``with`` block.

    Args:
        python: interpreter that has MONAI Label.
        app: folder with ``main.py``; bundles are copied to ``model`` in it.
        bundles: folders of exported bundles.
        images: NIfTI files, copied to a folder of studies of the server's own.
        work: empty folder for studies and log.
        conf: further ``--conf`` pairs.
    """

    def __init__(
        self,
        python: Path,
        app: Path,
        bundles: Sequence[Path],
        images: Sequence[Path],
        work: Path,
        conf: dict[str, str] | None = None,
    ) -> None:
        self.app, self.studies, self.log = app, work / "studies", work / "server.log"
        self.studies.mkdir(parents=True, exist_ok=True)
        for image in images:
            shutil.copy(image, self.studies)
        for bundle in bundles:
            shutil.copytree(bundle, app / "model" / bundle.name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        settings = {"models": ",".join(b.name for b in bundles), "zoo_source": "local", "sam2": "false"} | (conf or {})
        self.command = [
            *(str(python), "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(self.studies)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *(part for name, value in settings.items() for part in ("--conf", name, value)),
        ]

    def __enter__(self) -> LabelServer:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.studies.parent,
                start_new_session=True,
            )
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.info()
            except requests.ConnectionError:
                time.sleep(0.5)
            else:
                return self
        self.__exit__(None, None, None)
        raise RuntimeError(f"the server did not start:\n{self.log_tail()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            group = os.getpgid(self.process.pid)
            os.killpg(group, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(group, signal.SIGKILL)
                self.process.wait()

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])

    def models(self, bundle: str) -> Path:
        """Return the folder of a bundle's weights, inside the app."""
        return self.app / "model" / bundle / "models"

    def _call(self, method: str, path: str, **options: Any) -> requests.Response:
        answer = requests.request(method, f"{self.url}/{path}", timeout=_TASK_SECONDS, **options)
        if not answer.ok:
            raise RefusedError(answer.text)
        return answer

    def info(self) -> dict[str, Any]:
        return self._call("GET", "info/").json()

    def next_sample(self, strategy: str) -> dict[str, Any]:
        return self._call("POST", f"activelearning/{strategy}", json={}).json()

    def infer(self, model: str, image: str, to: Path, **params: Any) -> Path:
        """Write the predicted label map to ``to``."""
        answer = self._call(
            "POST",
            f"infer/{model}",
            params={"image": image, "output": "image"},
            data={"params": json.dumps(params)},
        )
        to.write_bytes(answer.content)
        return to

    def save_label(self, image: str, file: Path) -> None:
        with file.open("rb") as content:
            self._call(
                "PUT",
                "datastore/label",
                params={"image": image, "tag": "final"},
                files={"label": (file.name, content)},
                data={"params": "{}"},
            )

    def wait_for_image(self, image: str, *, there: bool = True) -> None:
        """Wait until the server has seen that a file was put among its studies, or taken away."""
        end = time.monotonic() + 60
        while there != (image in self._call("GET", "datastore/", params={"output": "all"}).json()["objects"]):
            if time.monotonic() > end:
                raise TimeoutError(f"the server does not see what became of {image}\n{self.log_tail()}")
            time.sleep(0.5)

    def image_info(self, image: str) -> dict[str, Any]:
        return self._call("GET", "datastore/image/info", params={"image": image}).json()

    def task(self, kind: str, name: str, **request: Any) -> tuple[str, str]:
        """Run ``train`` or ``scoring`` to its end; return its status and its last lines."""
        self.wait(kind)  # the server starts scoring by itself
        before = len(self._tasks(kind))
        self._call("POST", f"{kind}/{name}", json=request)
        end = time.monotonic() + _TASK_SECONDS
        while time.monotonic() < end:
            tasks = self._tasks(kind)
            if len(tasks) > before and tasks[before]["status"] in ("DONE", "ERROR", "STOPPED"):
                return tasks[before]["status"], "\n".join(tasks[before].get("details", []))
            time.sleep(0.5)
        raise TimeoutError(f"{kind} {name} took more than {_TASK_SECONDS} s\n{self.log_tail()}")

    def wait(self, kind: str) -> None:
        """Wait until no task of this kind runs or waits."""
        end = time.monotonic() + _TASK_SECONDS
        while any(task["status"] in ("RUNNING", "SUBMITTED") for task in self._tasks(kind)):
            if time.monotonic() > end:
                raise TimeoutError(f"{kind} does not end\n{self.log_tail()}")
            time.sleep(0.5)

    def _tasks(self, kind: str) -> list[dict[str, Any]]:
        try:
            return self._call("GET", f"{kind}/", params={"all": True}).json()
        except RefusedError:  # 404: none yet
            return []

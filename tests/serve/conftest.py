"""A bundle of the demo model with a chat template, and servers of it on ports of their own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

import compiler
import runtime
from runtime.model import Model
from serve.app import Server
from serve.process import listen
from tests.cli.conftest import DEMO

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VERSE = "In the beginning God created the heaven and"


def checkpoint(folder: Path, **settings: Any) -> Path:
    """The demo checkpoint with a tokenizer_config.json of these keys."""
    folder.mkdir()
    for path in DEMO.iterdir():
        (folder / path.name).symlink_to(path)
    content = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    source = checkpoint(folder / "chatty", chat_template=TEMPLATE)
    return compiler.compile(source, out=folder / "bundle", max_batch=4, max_sequence=256)


@pytest.fixture(scope="session")
def model(bundle: Path) -> Iterator[Model]:
    with runtime.load(bundle, threads=1) as loaded:
        yield loaded


@contextmanager
def served(server: Server) -> Iterator[httpx2.Client]:
    """A server in a thread, and a client of it."""
    listener = listen("127.0.0.1", 0)
    process = uvicorn.Server(uvicorn.Config(server.app, lifespan="on", log_level="warning"))
    thread = threading.Thread(target=process.run, args=([listener],))
    thread.start()
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
            yield client
    finally:
        process.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(model: Model) -> Server:
    return Server(model, name="demo")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx2.Client]:
    with served(server) as client:
        yield client


@pytest.fixture
def slow(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take long enough for something to happen between them."""
    step = model.engine.step

    def slowly() -> Any:
        time.sleep(0.03)
        return step()

    monkeypatch.setattr(model.engine, "step", slowly)


def until(true: Callable[[], bool], seconds: float = 2.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()

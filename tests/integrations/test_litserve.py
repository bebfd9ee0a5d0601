"""The LitAPI as LitServe calls it, and in LitServe where that is installed: real workers, a real client."""

import asyncio
import sys
from base64 import b64encode
from types import ModuleType

import pytest
import torch

import eefast


class HTTPException(Exception):
    def __init__(self, status_code, detail):
        super().__init__(detail)
        self.status_code = status_code


@pytest.fixture
def api(served_folder, monkeypatch):
    """The class on a LitServe that does nothing."""
    litserve, fastapi = ModuleType("litserve"), ModuleType("fastapi")
    litserve.LitAPI = type("LitAPI", (), {"__init__": lambda self, **options: None})
    fastapi.HTTPException = HTTPException
    for module in (litserve, fastapi):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "eefast.integrations.litserve", raising=False)
    from eefast.integrations.litserve import EarlyExits

    made = EarlyExits(served_folder, engine="reference")
    made.setup("cpu")
    yield made
    made.server.close(0)
    sys.modules.pop("eefast.integrations.litserve")


def test_bodies_of_other_types_are_refused(api):
    image = b64encode(bytes(432)).decode()
    found, deadline = asyncio.run(api.decode_request({"image": image, "deadline_ms": 500}))
    assert (found.shape, deadline) == ((3, 12, 12), 0.5)
    for wrong in (
        [1],
        "text",
        None,
        {"image": image, "type": 5},
        {"image": image, "type": None},
        {"image": 5},
        {"image": image, "deadline_ms": None},
        {"image": image, "deadline_ms": 10**400},
    ):
        with pytest.raises(HTTPException) as refused:
            asyncio.run(api.decode_request(wrong))
        assert refused.value.status_code == 400, wrong


def test_answers_and_refusals(served_folder):
    litserve = pytest.importorskip("litserve", reason="litserve is not installed; pip install litserve brings it")
    from litserve.utils import wrap_litserve_start
    from starlette.testclient import TestClient

    from eefast.integrations.litserve import EarlyExits

    x = torch.randint(0, 256, (5, 3, 12, 12), dtype=torch.uint8)
    texts = [b64encode(image.numpy().tobytes()).decode() for image in x]
    expected = eefast.load(served_folder)(x)
    server = litserve.LitServer(EarlyExits(served_folder), accelerator="cpu", timeout=120)
    with wrap_litserve_start(server) as running, TestClient(running.app) as client:
        for i, text in enumerate(texts):
            answer = client.post("/predict", json={"image": text, "deadline_ms": 60000}).json()
            assert (answer["label"], answer["exit"]) == (int(expected.labels[i]), int(expected.exit_index[i]))
            assert answer["class"] == "abcdefghij"[answer["label"]]
        for status, wrong in (
            (400, {}),
            (400, {"image": "?"}),
            (400, {"image": texts[0] + texts[1]}),
            (400, {"image": texts[0], "type": "image/png"}),
            (415, {"image": texts[0], "type": "text/html"}),
            (400, {"image": texts[0], "deadline_ms": "soon"}),
            (422, {"image": texts[0], "deadline_ms": -1}),
        ):
            found = client.post("/predict", json=wrong)
            assert found.status_code == status, (wrong, found.text)

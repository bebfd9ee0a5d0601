"""The LitAPI in LitServe, where that is installed: real workers, a real client."""

from base64 import b64encode

import pytest
import torch

import eefast

litserve = pytest.importorskip("litserve", reason="litserve is not installed; pip install litserve brings it")


def test_answers_and_refusals(served_folder):
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

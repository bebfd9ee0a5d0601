"""A network as an HTTP server in a process of its own → answers to a client, each as soon as its image exits."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import eefast
from eefast.data.mnist import mnist_test

SHIPPED = Path(eefast.__file__).parent / "assets/eenet-mnist"


def wait_for(url):
    """Until the server has planned and answered its first images."""
    while True:
        try:
            return urllib.request.urlopen(url).read()
        except urllib.error.HTTPError:
            time.sleep(0.1)


if __name__ == "__main__":
    command = [sys.executable, "-m", "eefast", "serve", SHIPPED, "--port", "0", "--lame-duck", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            address = next(found[0] for line in server.stdout if (found := re.search(r"http://[\w.:]+", line)))
            wait_for(f"{address}/readyz")
            images, labels = mnist_test()
            right = 0
            for image, label in zip(images[:20], labels[:20].tolist(), strict=True):
                body, kind = image.numpy().tobytes(), {"Content-Type": "application/octet-stream"}
                request = urllib.request.Request(f"{address}/v1/predict", body, kind)
                with urllib.request.urlopen(request) as answer:
                    right += json.load(answer)["label"] == label
            print(f"{right} of 20 images are right")
        finally:
            server.terminate()

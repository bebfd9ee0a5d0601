"""Images on an edge device → answers: first stages here, survivors' features over a socket, the rest on a server."""

# Two processes of this machine, over loopback: python examples/edge_server.py [exact|float16|uint8]
import sys
import tempfile
from multiprocessing import connection, get_context

import torch
from torch.nn.functional import cross_entropy

import eefast

SHAPE, STOP_AFTER = (1, 16, 16), 1


def images(n, seed):
    patterns = torch.randn(10, *SHAPE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    noise = torch.randn(n, *SHAPE, generator=generator) * torch.rand(n, 1, 1, 1, generator=generator)
    return patterns[labels] + 2 * noise, labels


def trained():
    torch.manual_seed(0)
    net = eefast.zoo.eenet("eenet8", input_shape=SHAPE, criterion="max_probability", thresholds=[0.25, 0.6], filters=4)
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    for step in range(60):
        x, labels = images(64, 1 + step)
        sum(cross_entropy(out.logits, labels) for out in net(x)).backward()
        optimiser.step()
        optimiser.zero_grad()
    return net.eval()


def serve(folder, address):
    fast = eefast.accelerate(eefast.load(folder), stages="pytorch", engine="compact")
    with connection.Client(address) as edge:
        while data := edge.recv_bytes():
            edge.send(fast.resume(eefast.Survivors.from_bytes(data)))


if __name__ == "__main__":
    batches = []
    with tempfile.TemporaryDirectory() as folder, connection.Listener(("127.0.0.1", 0)) as listener:
        net = trained()
        net.save(folder)
        get_context("spawn").Process(target=serve, args=(folder, listener.address)).start()
        first = eefast.accelerate(net, stages="pytorch", engine="compact").until(STOP_AFTER)
        with listener.accept() as server:
            for seed in range(1000, 1004):
                x, labels = images(256, seed)
                partial = first(x)
                server.send_bytes(data := partial.survivors.to_bytes((sys.argv[1:] or ["uint8"])[0]))
                right = (partial.finished(server.recv()).labels == labels).float()
                batches.append([len(data) / len(x), float(partial.result.cost.mean()), float(right.mean())])
            server.send_bytes(b"")
    sent, cost, accuracy = torch.tensor(batches).mean(0).tolist()
    print(f"{sent:.0f} of {x[0].nbytes} bytes sent per image, cost at the edge {cost:.3f}, accuracy {accuracy:.4f}")

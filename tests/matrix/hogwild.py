"""Hogwild: a child process trains parameters in shared memory. In a process of its own, because after a first backward
PyTorch refuses to fork. Writes the parameters of every column to a file: `python hogwild.py fork|spawn FILE`."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from matrix.networks import COLUMNS, network  # noqa: E402
from matrix.rows_training import sgd_step  # noqa: E402


def train(networks) -> None:
    torch.set_num_threads(1)
    for made in networks:
        sgd_step(made)


if __name__ == "__main__":
    method, file = sys.argv[1:]
    networks = [network(column).share_memory() for column in COLUMNS]
    child = torch.multiprocessing.get_context(method).Process(target=train, args=(networks,))
    child.start()
    child.join()
    assert child.exitcode == 0
    result = {
        column: [p.detach().clone() for p in made.parameters()] for column, made in zip(COLUMNS, networks, strict=True)
    }
    torch.save(result, file)

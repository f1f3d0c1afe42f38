"""How many functions, files and classes of ours one warm item passes through in a worker.

    python -m benchmarks.hops              the three figures
    python -m benchmarks.hops --list       and each function

From the Celery message to the recorded outcome, with the simulated provider and a quota that holds
nobody up. The worker has answered other items before; background threads (the heartbeat) are left
out, and so is the package of Celery, redis-py and the provider's SDK.
"""

from __future__ import annotations

import argparse
import json
import time

from batchllm_celery.simulation import spawn
from benchmarks.lab import UNHINDERED, Lab, prompts, wait


def measure() -> list[tuple[str, str]]:
    """File (within the package) and qualified name of each function entered."""
    with Lab() as lab, spawn() as provider:
        worker = lab.start_worker(
            slots=10,
            BATCHLLM_APP="benchmarks.hops_app",
            BATCHLLM_SIMULATED_URL=provider.url,
            BATCHLLM_OFFER_SECONDS="600",
            BATCHLLM_LEASE_SECONDS="3600",
        )
        for _ in range(20):
            _run_one(lab)
        time.sleep(1.0)  # what was put off until the last item's end is not the next one's
        order, answer = lab.folder / "record", lab.folder / "hops.json"
        order.touch()
        time.sleep(0.1)
        _run_one(lab)
        time.sleep(0.3)
        order.unlink()
        wait(answer.exists, [worker])
        return [(file, name) for file, name in json.loads(answer.read_text())]


def _run_one(lab: Lab) -> None:
    batch = lab.producer.submit(prompts(1), strategy="simulated", quota=UNHINDERED)
    lab.wait(batch, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", action="store_true", help="name each function")
    options = parser.parse_args()
    hops = measure()
    if options.list:
        print("\n".join(f"{file}: {name}" for file, name in hops))
    classes = {(file, name.rpartition(".")[0]) for file, name in hops if _in_class(name)}
    files = {file for file, _ in hops}
    print(f"{len(hops)} functions, {len(files)} files, {len(classes)} classes")


def _in_class(name: str) -> bool:
    owner = name.rpartition(".")[0]
    return bool(owner) and not owner.endswith("<locals>")


if __name__ == "__main__":
    main()

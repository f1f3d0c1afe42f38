"""`python -m batchllm_celery.simulation '{"rpm": 600}'`: serve a configuration given as JSON."""

from __future__ import annotations

import sys

from batchllm_celery.simulation.config import SimulationConfig
from batchllm_celery.simulation.server import serve

if __name__ == "__main__":
    serve(SimulationConfig.model_validate_json(sys.argv[1] if len(sys.argv) > 1 else "{}"))

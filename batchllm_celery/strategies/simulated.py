"""A documented path; the code is in `providers.simulated`."""

from batchllm_celery.providers.simulated import SimulatedStrategy, open_simulated_client

__all__ = ["SimulatedStrategy", "open_simulated_client"]

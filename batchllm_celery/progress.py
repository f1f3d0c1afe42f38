"""A documented path; the code is in `compat.progress`."""

from batchllm_celery.compat.progress import ProgressCallback, ProgressReporter, RichProgressBar

__all__ = ["ProgressCallback", "ProgressReporter", "RichProgressBar"]

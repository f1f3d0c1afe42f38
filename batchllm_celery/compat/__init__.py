"""batch-llm's API on this package's parts, for those who come from it: the processor, middlewares,
observers, metrics, progress callbacks, rate limit strategies. A fleet uses none of them."""

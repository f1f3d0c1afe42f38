"""The commands of `batchllm`, one module each; loaded when the command is named."""

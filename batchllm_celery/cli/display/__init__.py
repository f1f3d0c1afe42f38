"""What a person sees: progress, summary, quotas, and numbers in words."""

"""The providers' wire formats as pure functions: bodies, answers, errors and batch files.

Each dialect reads and writes requests (`read_request`, `write_request`) and answers
(`read_answer`, `write_answer`). No translation has a default: a field that it does not know is
refused by its path, and what a provider has no word for is refused by name.
"""

"""Input files as rows, and result files: for the commands, and for programs of your own."""

"""One lazily imported file per verb: `add_parser(verbs, summary)` and `run(args) -> exit status`."""

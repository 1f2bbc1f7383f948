"""One module per subcommand: reads artifacts, writes artifacts, returns a result dataclass."""

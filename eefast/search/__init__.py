"""A backbone → the exits, their heads, rule and thresholds that pay, see `eefast.search.run.search`."""

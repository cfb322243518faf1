"""One module per engine, each run in a process of its own, in whichever Python has that engine; see `protocol`."""

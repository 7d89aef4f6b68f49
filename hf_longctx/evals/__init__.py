"""One file a task family: the folder is the registry, this file stays empty."""
